"""No secret that a person keeps in the environment for other programs comes out of ours, on the screen or in a file.

Commands of all kinds run with secrets planted, most of them against addresses where nobody answers; then everything
that they printed and wrote is searched.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import click
import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.errors import MachineError, without_secrets
from common.paths import ROOT
from tests.doubles.machines import bare_environment, fake_host
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import folders
from tools.cli import main
from tools.containers import launcher
from tools.containers.images import Image

IMAGE = "sha256:" + "ab" * 32
NOBODY = "127.0.0.1:9"  # the port of the discard service: nothing listens there
MARK = "PLANTED"
LOGIN = f"somebody:{MARK}-password%21"
SECRETS = {
    **{f"{name}_proxy": f"http://{LOGIN}@{NOBODY}" for name in ("http", "https")},
    **{f"{name}_PROXY": f"http://{LOGIN}@{NOBODY}" for name in ("HTTP", "HTTPS")},
    "HF_TOKEN": f"hf_{MARK}token",
    "HF_ENDPOINT": f"http://{LOGIN}@{NOBODY}",
    "WANDB_API_KEY": f"{MARK}0123456789abcdef",
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK}",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/secret+of/aws",
    "GITHUB_TOKEN": f"ghp_{MARK}",
    "PIP_INDEX_URL": f"http://{LOGIN}@{NOBODY}/simple",
    "PIP_RETRIES": "0",
    "TT_STUDIO_JWT_SECRET": f"{MARK}-of-another-program",
    "HF_HUB_ETAG_TIMEOUT": "1",
}


class Place:
    """A home, a machine with an n150 and a `docker` without an engine: all that commands write lies below `folder`."""

    def __init__(self, folder: Path) -> None:
        image = {"Id": IMAGE, "RepoDigests": [], "Config": {"Labels": {"recipes.lock": "cd"}}}
        self.folder = folder
        self.screen = folder / "screen.txt"
        self.double = folder / "double"
        for name in ("bin", "double", "home", "scratch"):
            (folder / name).mkdir()
        (folder / "bin/docker").symlink_to(ROOT / "tests/doubles/docker")
        for name, text in (("info", '{"ServerVersion": "1"}'), ("image", json.dumps([image])), ("end", "0")):
            (self.double / name).write_text(text)
        fake_host(folder / "machine", "n150")

    def recipe(self, *words: object, module: str = "tools.cli", **more: str) -> int:
        """Run `recipe WORDS` with the secrets, keep what it prints, and return its exit code."""
        environment: Mapping[str, str] = {
            **bare_environment(),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "scratch"),
            "RECIPES_HOME": str(self.folder / "home/cache"),
            "RECIPES_SYSFS_ROOT": str(self.folder / "machine"),
            "DOUBLE": str(self.double),
            **SECRETS,
            **more,
        }
        with self.screen.open("a", encoding="utf-8") as screen:
            print("$ recipe", *(str(word).replace(MARK, "...") for word in words), file=screen, flush=True)
            command = [sys.executable, "-m", module, *map(str, words)]
            done = subprocess.run(
                command, env=environment, cwd=self.folder, stdout=screen, stderr=subprocess.STDOUT, check=False
            )
        return done.returncode

    def found(self) -> list[str]:
        """Every file below the folder that has a secret, with the line; but for the environment of `docker` itself."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path != self.double / "environment"]
        return [
            f"{path.relative_to(self.folder)}: {line.decode(errors='replace')[:300]}"
            for path in files
            for line in path.read_bytes().splitlines()
            if MARK.encode() in line
        ]


def test_no_secret_of_the_environment_comes_out(tiny_base: Path, tmp_path: Path):
    place, out = Place(tmp_path), tmp_path / "out"
    tiny = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    run = ("run", tiny, "--out", out)

    # What goes well.
    assert place.recipe(*run, "--hw", "cpu", "--set", "logging_config.use_wandb=true") == 0
    (folder,) = folders(out)
    for words in (["export", folder], ["explain", folder], ["report", folder], ["runs", "show", folder]):
        assert place.recipe(*words) == 0
    assert place.recipe("doctor", "--hw", "n150") in (0, 4)
    assert place.recipe(*run, "--hw", "n150", "--dry-run") == 0

    # What goes to a container: docker has the secrets from its own environment, and its words have their names alone.
    assert place.recipe(*run, "--hw", "n150", module="tests.runs.test_secrets") == 0
    assert MARK in (place.double / "environment").read_text(), "docker hands them over"
    created = next(line for line in (place.double / "calls").read_text().splitlines() if line.startswith("create"))
    assert {"HF_TOKEN", "WANDB_API_KEY", "TT_STUDIO_JWT_SECRET"} <= set(created.split())

    # What goes wrong on the way to somebody else, with a traceback, too.
    here = {"GITHUB_MIRROR": f"http://{LOGIN}@{NOBODY}", "APT_MIRROR": f"http://{LOGIN}@{NOBODY}"}
    for words in (
        ["base", "add", "owner/name", "--recipe", tiny],
        ["--debug", "base", "add", "owner/name", "--recipe", tiny],
        [*run, "--hw", "cpu", "--set", "model_config.base=stories-260k"],
        [*run, "--hw", "cpu", "--resume", f"http://{LOGIN}@{NOBODY}/run"],
    ):
        assert place.recipe(*words) not in (0, 1) or "--debug" in words, place.screen.read_text()
    for verb in (("lock",), ("image", "build", "n150")):
        assert place.recipe(*verb, **here) == 2, "an address with a login would stand in the lock, or in an image"

    assert place.found() == []


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("could not reach http://me:pass@host/x", "could not reach http://***@host/x"),
        ("git@github.com said no", "git@github.com said no"),
        ("bad port 'tr%C3%A8s-secret@proxy:1'", "bad port '***@proxy:1'"),
        ("wrong key abcdefgh0123", "wrong key ***"),
        ("TOKENIZERS_PARALLELISM is a_long_value", "TOKENIZERS_PARALLELISM is a_long_value"),
    ],
)
def test_what_an_error_shows_of_a_secret(said: str, shown: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("https_proxy", "http://me:tr%C3%A8s-secret@proxy:1")
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh0123")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a_long_value")
    assert without_secrets(said) == shown
    assert str(MachineError("x", where=said)) == f"x\n  where: {shown}"


def test_what_a_library_logs_shows_none_either(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def ask() -> None:
        logging.getLogger("a.library").error("nothing came from %s", "http://me:pass@host/x")

    monkeypatch.setitem(main.recipe.commands, "ask", click.Command("ask", callback=ask))
    monkeypatch.setattr(sys, "argv", ["recipe", "ask"])
    with pytest.raises(SystemExit):
        main.main()
    assert caplog.messages == ["nothing came from http://***@host/x"]


if __name__ == "__main__":  # a run goes into its container, on a machine that has the board's image
    with (
        mock.patch.object(launcher, "find_image", return_value=Image("n150", IMAGE, "local", "cd")),
        mock.patch.object(launcher, "fetch_pinned"),
    ):
        main.main()
