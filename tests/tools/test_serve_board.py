"""`recipe serve RUN --hw BOARD`: what it prints, stages, refuses and starts, on stand-ins for board and servers."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from common import config as configs
from common.errors import MachineError, UsageError, VerificationError
from common.files import read_pins, sha256_file, try_lock
from common.hardware import get, table
from common.model.llama import hf_config
from common.paths import ROOT
from tests.doubles.machines import MACHINES, bare_environment, fake_host, fake_machine
from tests.doubles.tiny_recipe import FINE_TUNE
from tests.support.run_folders import write_run
from tools.cli import main
from tools.results import grade, schema
from tools.runs.folder import read_run
from tools.serve.board import roads, stage
from tools.serve.board.preflight import GB, check_model, choose_context, mesh_of, pool_bytes, weight_bytes
from tools.serve.board.roads import ROADS, Command, Served, command_for
from tools.serve.board.stage import digest_of, misread, name_of
from tools.serve.board.start import Options, serve_on

SNAPSHOT = Path(__file__).with_name("serve_board.txt")
PRESETS = ROOT / "recipes/nano-transformer-scratch/presets"
BOARDS = [name for name, hw in table().items() if not hw.is_cpu]
DIGEST = "0123456789abcdef" * 4
FOLDER = Path("/runs/a-run/serve/a-run-40-01234567")


def llama(hidden: int, wide: int, layers: int, heads: int, keys: int) -> dict[str, Any]:
    sizes = {"vocab_size": 256, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": 256}


SMALL = llama(192, 512, 4, 6, 6)
ONE_CHIP = llama(384, 1024, 6, 6, 3)  # no number of chips but 1 divides its 3 heads
LARGE = llama(2048, 5632, 22, 32, 32)  # a pool that no Wormhole chip holds


def presets() -> dict[str, dict[str, Any]]:
    """Return the architectures that this repository ships: presets of random weights, and pinned bases."""
    found = {path.stem: yaml.safe_load(path.read_text())["model_config"]["architecture"] for path in PRESETS.glob("*")}
    for name, base in read_pins(ROOT / "common/models.lock.yaml", "bases").items():
        found[name] = base["architecture"]
    return dict(sorted(found.items(), key=lambda item: item[1]["hidden_size"] * item[1]["num_hidden_layers"]))


# --- the snapshot ---------------------------------------------------------------------------------------------------


def command_of(architecture: Mapping[str, Any], board: str, road: str) -> Command:
    context = choose_context(architecture, None)
    served = Served(FOLDER, DIGEST, mesh_of(get(board)), "127.0.0.1", 8000, context, 32, {"temperature": 0})
    return command_for(road, served, None)


def settings_of(command: Command) -> dict[str, Any]:
    """Return every setting of a command under its name: variables, options, and what is in those of JSON."""
    found: dict[str, Any] = dict(command.environment)
    options = [at for at, word in enumerate(command.words) if word.startswith("--")]
    for at, end in zip(options, [*options[1:], None], strict=True):
        value = " ".join(command.words[at + 1 : end])
        inner = json.loads(value) if value.startswith("{") else {"": value}
        found |= {f"{command.words[at]}{'.' if key else ''}{key}": part for key, part in inner.items()}
    found["words"] = command.words[: options[0]]
    return found


def cell(architecture: Mapping[str, Any], board: str, reference: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what is said of a model on a board: its memory and how each command is another than the reference."""
    hw = get(board)
    try:
        check_model(architecture, hw, mesh_of(hw), 32)
    except MachineError as error:
        return [f"no: {error.what.partition(': ')[2]}", f"    {error.todo}"]
    mesh = mesh_of(hw)
    sizes = f"{pool_bytes(architecture, mesh, 32) / GB:.1f} + {weight_bytes(architecture, mesh) / GB:.1f} GB"
    lines = [f"{mesh.rows} x {mesh.columns} chips, {sizes} of {mesh.dram / GB:.1f} on each"]
    for road in ROADS:
        try:
            settings = settings_of(command_of(architecture, board, road))
        except UsageError as error:
            lines.append(f"    {road}: no, {error.what}")
            continue
        lines.append(f"    {road}: {' '.join(difference(settings, reference[road])) or 'that'}")
    return lines


def snapshot() -> str:
    lines = [
        "What `recipe serve RUN --hw BOARD` prints, read by a person; test_serve_board.py beside it writes this file."
    ]
    first: dict[str, dict[str, Any]] = {}
    for name, architecture in presets().items():
        heads, context = architecture["num_attention_heads"], choose_context(architecture, None)
        of_values = architecture.get("num_key_value_heads", heads)
        lines += ["", f"== {name}: {heads} heads, {of_values} of keys and values; {context} tokens of context =="]
        here = {road: command_of(architecture, "n150", road) for road in ROADS}
        settings = {road: settings_of(command) for road, command in here.items()}
        for road, command in here.items():
            lines += [f"[{road}] on n150"]
            if road not in first:
                first[road] = settings[road]
                lines += command.lines()
            else:
                other = " ".join(difference(settings[road], first[road]))
                lines += [f"    the first one{', but ' if other else ''}{other}"]
        for board in BOARDS:
            own, *rest = cell(architecture, board, settings)
            lines += [f"{board}: {own}", *rest]
    return "\n".join(lines) + "\n"


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [f"{key}={value}" for key, value in one.items() if value != other[key]]


@pytest.mark.skipif(not PRESETS.is_dir(), reason="the recipe with the presets is not in this checkout")
def test_the_commands_of_every_model_and_board_are_those_that_a_person_read(monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", "/home")
    now = snapshot()
    if os.environ.get("WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(now)
    assert now == SNAPSHOT.read_text(), "after a wanted change: WRITE_SNAPSHOT=1, then read the file's diff"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a run with a verified export, whose weights are only a few bytes."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path / "bare", [])))
    monkeypatch.delenv("TT_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RECIPES_CONTAINER", raising=False)

    def make(name: str = "20260101T000000Z-from_scratch-cpu-0000", **architecture: Any) -> Path:
        run = write_run(tmp_path / "runs", name)
        export(run, {**SMALL, **architecture})
        return run

    return make


def export(run: Path, architecture: Mapping[str, Any], weights: bytes = b"weights", **more: Any) -> None:
    """Write the export of a run: what its record says of its files is so."""
    merged = run / "export/merged"
    merged.mkdir(parents=True, exist_ok=True)
    (merged / "config.json").write_text(json.dumps(hf_config(architecture)))
    (merged / "model.safetensors").write_bytes(weights)
    (merged / "tokenizer.json").write_text("{}")
    settings = {"temperature": 0.0, "max_new_tokens": 256, "eos_token_id": [2], **more}
    (merged / "generation_config.json").write_text(json.dumps(settings))
    hashes = {f"merged/{path.name}": sha256_file(path) for path in sorted(merged.iterdir())}
    record = {"format": 1, "verified": True, "status": "verified", "reason": "", "step": 40, "sha256": hashes}
    (run / "export/export.json").write_text(json.dumps(record))


class Said:
    """What is printed: commands, and what is said of them."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.said: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join(self.said)

    @property
    def command(self) -> list[str]:
        return shlex.split("\n".join(self.shown).replace("\\\n", " "), comments=True)


def serve(run: Path, board: str = "n150", **options: Any) -> Said:
    said = Said()
    assert serve_on(get(board), run, Options(**options), said.shown.append, said.said.append) == 0
    return said


def test_a_model_whose_heads_are_not_shared_out_is_told_the_mesh_that_would_do(exported):
    run = exported(**ONE_CHIP)
    with pytest.raises(MachineError, match="8 chips of a row") as caught:
        serve(run, "t3k")
    assert str(caught.value.todo).startswith("--mesh N150 (MESH_DEVICE=N150); ")
    assert "MESH_DEVICE=N150" in serve(run, "t3k", road="vllm", mesh="N150").command
    assert "n150" in serve(run, "t3k", road=ROADS[0], mesh="N150").command
    with pytest.raises(UsageError, match="no mesh 'P150'") as caught_name:
        serve(run, "t3k", mesh="P150")
    assert caught_name.value.todo == "one of N150, N300, (1,4), T3K"


def test_a_pool_that_no_chip_of_the_board_holds_is_told_the_boards_that_would(exported):
    with pytest.raises(MachineError, match=r"keys and values take 24\.0 GB of a chip .* it has 12\.9 GB") as caught:
        serve(exported(**LARGE), "n150")
    boards = str(caught.value.todo).partition(": ")[2].split(", ")
    assert {"t3k", "p150"} <= set(boards)
    assert not {"n150", "n300"} & set(boards)


@pytest.mark.parametrize(
    ("values", "options", "words", "todo"),
    [
        ({"max_position_embeddings": 3000}, {}, "3000 tokens: .* powers of two", "--context 2048"),
        ({}, {"context": 200}, "200 tokens: .* powers of two", "--context 256"),
        ({}, {"context": 64}, "64 tokens", "--context 256"),
        ({}, {"context": 512}, "256 positions", None),
        ({}, {"slots": 12}, "batches of 1, 2, 4, 8, 16, 32", "one of these"),
        ({}, {"host": "0.0.0.0"}, "no key", "ssh -L 8000"),
        ({}, {"port": 0}, "needs a port", "--port 8000"),
        ({}, {"yes": True}, "which of the two", "--road vllm"),
    ],
)
def test_settings_that_tt_metal_does_not_take_are_refused_with_ones_that_it_does(
    exported, values, options, words, todo
):
    run = exported(**values)
    with pytest.raises(UsageError, match=words) as caught:
        serve(run, **options)
    assert todo is None or todo in str(caught.value.todo)
    assert not (run / "serve").exists()


def test_sizes_and_positions_that_tt_metal_has_no_way_for_are_refused(exported):
    flat = {"hidden_size": 200, "num_attention_heads": 1, "num_key_value_heads": 1}
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2}}
    for changed, words in ((flat, "whole tiles"), (dynamic, "rope 'dynamic'")):
        with pytest.raises(MachineError, match=words):
            check_model({**SMALL, **changed}, get("n150"), mesh_of(get("n150")), 32)
    narrow = llama(512, 1536, 8, 8, 8)
    with pytest.raises(MachineError, match="whole 1024s, it is 512"):
        check_model(narrow, get("galaxy"), mesh_of(get("galaxy")), 32)
    check_model(narrow, get("n150"), mesh_of(get("n150")), 32)


def test_only_a_verified_export_goes_to_a_board(exported, tiny_base):
    run = exported()
    (run / "export/merged/tokenizer.json").write_text("{ }")
    with pytest.raises(VerificationError, match=r"tokenizer\.json is damaged"):
        serve(run)
    with pytest.raises(UsageError, match="a run's verified export"):
        serve(tiny_base)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--hw", "n151"], 2, "did you mean n150"),
        (["--hw", "cpu-x2"], 2, "--hw cpu"),
        (["--hw", "n150", "--base", "--queue", "2"], 2, "--base, --queue"),
        (["--hw", "n150", "--name", "x"], 2, "--name"),
        (["--road", "vllm", "--yes"], 2, "--road, --yes"),
        (["--hw", "n150", "--check", "http://127.0.0.1:1/v1"], 2, "leave out RUN and --hw"),
    ],
)
def test_options_that_do_not_go_together_are_named(exported, monkeypatch, capsys, words, code, said):
    monkeypatch.setattr(sys, "argv", ["recipe", "serve", str(exported()), *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "run", "name"),
    [
        ("tinyllama", "20260101T0Z-tinyllama-n150-00ff", "20260101t0z-tinyllama-n150-00ff-7-01234567"),
        ("nano", "Try One", "nano-try-one-7-01234567"),
        ("Llama-3.1-8B-chat", "a", "llama-3-1-8b-chat-a-7-01234567"),
        ("tinyllama-finetune", "revision", "model-7-01234567"),
        ("phi-4", "a", "model-7-01234567"),
    ],
)
def test_a_model_has_a_name_of_its_own_that_nothing_is_read_out_of(recipe, run, name):
    assert name_of(recipe, run, 7, DIGEST) == name
    assert misread(name, name) == ""


@pytest.mark.parametrize(
    ("name", "taken_for"),
    [("tinyllama-revision", "Llama-Vision"), ("my-Llama-3.1-8B", "size 3.1-8B"), ("x3.2-11B", "size 3.2-11B")],
)
def test_a_path_that_upstream_misreads_is_refused_where_upstream_reads_it(exported, name, taken_for):
    """vLLM is given the whole path, with the run's folder in it; a container has only the folder's own name."""
    run = exported(name=name)
    with pytest.raises(UsageError, match=taken_for) as caught:
        serve(run, road="vllm")
    assert str(run) in str(caught.value.where)
    both = serve(run)
    assert "not by vllm: tt-metal would take it for a Llama" in both.text
    assert "--road tt-inference-server --yes" in both.text
    assert "--custom-weights" in both.command
    assert "vllm" not in both.command
    served = both.command[both.command.index("--custom-weights") + 1]
    assert misread(served, served) == ""


def test_a_path_with_it_in_it_is_only_remarked(exported):
    assert "'it' is in the path" in serve(exported(name="digits"), road="vllm").text
    assert misread("/home/edith/vision/a-model", "a-model") == ""


# --- the folder -----------------------------------------------------------------------------------------------------


def test_the_export_is_staged_by_links_without_a_cap_and_the_same_again(exported):
    run = exported()
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (run / "export").rglob("*") if path.is_file()
    }
    (run / "serve/.tmp-left").mkdir(parents=True)
    (run / "serve/.tmp-left/model.safetensors").write_bytes(b"of a staging that was killed")
    (run / "serve/mine").mkdir()
    first = serve(run, road="vllm")
    folder = Path(first.command[first.command.index("serve") + 1])
    assert folder.parent == run / "serve"
    assert f"HF_MODEL={folder}" in first.command
    assert first.command[first.command.index("--served-model-name") + 1] == folder.name
    assert (folder / "model.safetensors").samefile(run / "export/merged/model.safetensors")
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.0, "eos_token_id": [2]}
    assert not any(path.is_symlink() for path in [folder, *folder.iterdir()])
    again = serve(run, road="vllm")
    assert again.shown == first.shown
    assert "staged already" in again.text
    assert sorted(path.name for path in (run / "serve").iterdir()) == [".lock", folder.name, "mine"]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_another_export_of_the_same_run_has_another_folder_and_another_cache(exported):
    run = exported()
    first = serve(run, road="vllm").command
    (run / "export").rename(run / "export.old")  # as the export does
    export(run, SMALL, b"other weights")
    second = serve(run, road="vllm").command
    for variable in ("HF_MODEL=", "TT_CACHE_PATH="):
        values = [word for command in (first, second) for word in command if word.startswith(variable)]
        assert len(set(values)) == 2, values
    old = first[first.index("serve") + 1]
    shutil.rmtree(run / "export.old")
    assert (Path(old) / "model.safetensors").read_bytes() == b"weights", "what a server has open stays"


def test_a_staged_folder_that_somebody_changed_is_neither_used_nor_mended(exported):
    run = exported()
    command = serve(run, road="vllm").command
    folder = Path(command[command.index("serve") + 1])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(MachineError, match=r"notes\.txt"):
        serve(run)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(MachineError, match=r"generation_config\.json"):
        serve(run)


def test_without_hard_links_it_is_a_copy_and_said(exported, monkeypatch):
    def no_link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", no_link)
    run = exported()
    first = serve(run, road="vllm")
    assert "copies" in first.text
    folder = Path(first.command[first.command.index("serve") + 1])
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert "staged already" in serve(run).text
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(MachineError, match=r"model\.safetensors"):
        serve(run)


def test_a_full_disk_leaves_no_half_of_a_folder(exported, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "link", full)
    run = exported()
    with pytest.raises(MachineError, match="could not stage the export"):
        serve(run)
    assert [path.name for path in (run / "serve").iterdir()] == [".lock"]


# --- what is said ---------------------------------------------------------------------------------------------------


def test_it_says_that_nobody_tried_it_until_results_yaml_has_it(exported):
    run = exported()
    assert "nothing was started" in serve(run).text
    training: dict[str, Any] = {"board": "n150", "evidence": "measured", "what": "recipe run it", "machine": "a host"}
    training |= {"overrides": [], "date": datetime.date(2026, 12, 24), "commit": "0123abc", "tokens_per_second": 9.0}
    serving = {**training, "what": "recipe serve --hw n150: an answer"}
    recipe = run.parent / "recipe"
    recipe.mkdir()
    (recipe / "config.yaml").write_text("")
    facts = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**facts, "recipe_dir": str(recipe)}))
    said = {}
    for name, entries in {
        "none": [],
        "training": [training],
        "serving": [serving],
        "both": [training, serving],
    }.items():
        tree = {"format": 1, "recipe": "recipe", "entries": entries}
        (recipe / "results.yaml").write_text(yaml.safe_dump(tree))
        said[name] = ("UNTESTED" in serve(run).text, schema.load(recipe).evidence("n150"))
    assert said["none"] == (True, "never run")
    assert said["training"] == (True, "measured")
    assert said["serving"] == (False, "never run"), "a model that was served there was not trained there by that"
    assert said["both"] == (False, "measured")
    assert "measured on n150: recipe serve --hw n150: an answer" in serve(run).text
    assert "UNTESTED" in serve(run, "n300").text


def test_no_training_is_graded_by_a_serving(exported):
    config = read_run(exported()).config
    found: Any = SimpleNamespace(config=config, manifest=SimpleNamespace(hw="cpu", steps=40), last_step=40)
    entry: dict[str, Any] = {
        "board": "cpu",
        "evidence": "measured",
        "what": "recipe run it",
        "machine": "a host",
        "overrides": [],
    }
    entry |= {"date": datetime.date(2026, 12, 24), "commit": "0123abc", "tokens_per_second": 9.0}
    graded = [
        grade.is_of(schema.Measured.model_validate({**entry, "what": what}), config, found)
        for what in ("recipe run it", "recipe serve it")
    ]
    assert graded == [True, False]


def test_what_is_other_than_on_the_cpu_is_said(exported):
    run = exported()
    assert "/v1/completions only" in serve(run).text
    assert "system prompt" not in serve(run).text
    merged = run / "export/merged"
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    export(run, SMALL, suppress_tokens=[0])
    rows = configs.load(FINE_TUNE, get("cpu"), ["data_config.system_prompt=Be kind."], 40)
    (run / "config.resolved.yaml").write_text(rows.with_values(**{"training.precision": "fp32"}).to_yaml())
    said = serve(run)
    assert "the recipe's system prompt is not put" in said.text
    assert "suppress_tokens" in said.text
    assert "/v1/completions only" not in said.text


def test_two_do_not_stage_at_once(exported):
    run = exported()
    (run / "serve").mkdir()
    with try_lock(run / "serve") as lock:  # type: ignore[union-attr]
        assert lock
        with pytest.raises(MachineError, match="another process stages"):
            serve(run)
    serve(run)


def test_a_board_beside_other_cards_is_named_to_what_would_open_them_all(exported, tmp_path, monkeypatch):
    run = exported()
    assert not {"--device-id", "TT_VISIBLE_DEVICES"} & set(" ".join(serve(run).command).replace("=", " ").split())
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path / "two", ["n150", "n150"])))
    command = serve(run).command
    assert command[command.index("--device-id") + 1] == "0"
    assert "TT_VISIBLE_DEVICES=0000:01:00.0" in command
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_machine(tmp_path / "three", ["n150", "n300"])))
    with pytest.raises(UsageError, match=r"no mesh N300 of 2 chips .* are 1 in number"):
        serve(run, "n300", road="vllm")
    command = serve(run, "n300").command
    assert command[command.index("--device-id") + 1] == "1"
    assert "vllm" not in command
    assert "MESH_DEVICE=N150" in serve(run, "n300", mesh="N150").command


# --- started --------------------------------------------------------------------------------------------------------

VLLM = """#!/bin/sh
printf '%s\\n' "$@" >"$RECORD.words"
env >"$RECORD.env"
trap 'exit 7' TERM
trap 'exit 8' INT
case $BEHAVIOR in code) exit 3 ;; killed) kill -9 $$ ;; deaf) trap '' TERM ;; esac
touch "$RECORD.up"
while :; do sleep 0.05; done
"""
RUN_PY = """import os, sys
if "--help" in sys.argv:
    sys.exit(print(os.environ["HELP"]))
open(os.environ["RECORD"] + ".words", "w").write("\\n".join(sys.argv[1:]))
os.environ["PWD"] = os.getcwd()
open(os.environ["RECORD"] + ".env", "w").write("\\n".join(f"{k}={v}" for k, v in os.environ.items()))
"""


@pytest.fixture
def machine(exported, tmp_path, monkeypatch) -> Callable[..., Path]:
    """A machine with a board, vLLM's command and a checkout of tt-inference-server, all of them stand-ins."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"vllm": VLLM, "python": "#!/bin/sh\necho $LACKS\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "server").mkdir()
    (tmp_path / "server/run.py").write_text(RUN_PY)
    monkeypatch.setattr(roads, "check_engine", lambda: "28.0")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))

    def make(board: str = "n150") -> Path:
        monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(fake_host(tmp_path / "machine", board)))
        return exported()

    return make


def recorded(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    words = (tmp_path / "record.words").read_text().splitlines()
    lines = (tmp_path / "record.env").read_text().splitlines()
    return words, dict(line.split("=", 1) for line in lines if "=" in line)


def start(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.cli", "serve", str(run), "--hw", "n150", "--road", "vllm", "--yes", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def test_without_the_board_nothing_is_started_and_what_is_missing_is_said(exported):
    run = exported()
    with pytest.raises(MachineError) as caught:
        serve(run, road="vllm", yes=True)
    assert "n150 was named but is not on this machine" in caught.value.what
    assert "the kernel module tenstorrent is not loaded" in caught.value.what
    assert "recipe doctor --hw n150" in str(caught.value.todo)
    assert not (run / "serve").exists()


def test_what_was_printed_is_what_is_started_and_its_code_is_ours(machine, tmp_path, monkeypatch):
    run = machine()
    printed = serve(run, road="vllm").command
    for behavior, code in {"code": 3, "killed": 137}.items():
        monkeypatch.setenv("BEHAVIOR", behavior)
        said = Said()
        options = Options(road="vllm", yes=True)
        assert serve_on(get("n150"), run, options, said.shown.append, said.said.append) == code
        assert f"recipe serve --check http://127.0.0.1:8000/v1 --against {run}" in said.text
    words, environment = recorded(tmp_path)
    at = printed.index("vllm")
    assert words == printed[at + 1 :]
    assert all(environment[name] == value for name, value in (word.split("=", 1) for word in printed[:at]))
    monkeypatch.setenv("BEHAVIOR", "code")
    (tmp_path / "record.words").unlink()
    assert subprocess.run(["sh", "-c", "\n".join(said.shown)], check=False).returncode == 3, "copied into a shell"
    assert recorded(tmp_path)[0] == words


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGINT, 8)])
def test_a_signal_reaches_the_server_and_the_board_is_free_afterwards(machine, tmp_path, number, code):
    run = machine()
    process = start(run)
    wait_for(tmp_path / "record.up")
    other = start(run)
    assert other.wait(60) == 4
    assert other.stderr is not None
    assert "n150 is in use by process" in other.stderr.read()
    process.send_signal(number)
    assert process.wait(60) == code
    (tmp_path / "record.up").unlink()
    free = start(run)
    wait_for(tmp_path / "record.up")
    free.send_signal(signal.SIGTERM)
    assert free.wait(60) == 7


def test_the_third_signal_kills_a_server_that_does_not_listen(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("BEHAVIOR", "deaf")
    process = start(machine())
    wait_for(tmp_path / "record.up")
    for _ in range(3):
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(60) == 137


def test_an_environment_without_the_plugin_is_refused(machine, tmp_path, monkeypatch):
    run = machine()
    monkeypatch.setenv("LACKS", "vllm_tt_plugin ttnn")
    with pytest.raises(MachineError, match="has no vllm_tt_plugin, ttnn"):
        serve(run, road="vllm", yes=True)
    (tmp_path / "bin/vllm").unlink()
    with pytest.raises(MachineError, match="no vllm on PATH"):
        serve(run, road="vllm", yes=True)
    assert not (tmp_path / "record.words").exists()


def test_a_server_that_lacks_an_option_is_refused_and_one_that_has_it_is_started(machine, tmp_path, monkeypatch):
    run, server = machine(), tmp_path / "server"
    printed = serve(run, road=ROADS[0]).command
    known = " ".join(word for word in printed if word.startswith("--"))
    with pytest.raises(UsageError, match="where is tt-inference-server"):
        serve(run, road=ROADS[0], yes=True)
    monkeypatch.setenv("HELP", known.replace("--custom-weights", ""))
    with pytest.raises(MachineError, match="knows no --custom-weights"):
        serve(run, road=ROADS[0], server_dir=server, yes=True)
    assert not (tmp_path / "record.words").exists()
    monkeypatch.setenv("HELP", known)
    said = serve(run, road=ROADS[0], server_dir=server, yes=True)
    assert "its container goes on" in said.text
    words, environment = recorded(tmp_path)
    assert words == printed[printed.index("run.py") + 1 :]
    assert environment["MODEL_SOURCE"] == "local"
    assert Path(environment["PWD"]) == server
    assert f"cd {server} && MODEL_SOURCE=local" in "\n".join(said.shown)


def test_a_boards_host_needs_neither_numpy_nor_torch(exported):
    run = exported()
    code = (
        "import sys\n"
        "for name in ('numpy', 'torch', 'transformers', 'uvicorn', 'starlette'):\n"
        "    sys.modules[name] = None\n"
        "from tools.cli.main import main\n"
        f"sys.argv = ['recipe', 'serve', {str(run)!r}, '--hw', 'n150']\n"
        "main()\n"
    )
    environment = {**bare_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= {name: os.environ[name] for name in ("RECIPES_HOME", "RECIPES_SYSFS_ROOT")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "vllm serve" in done.stdout
    assert "UNTESTED" in done.stderr


def test_every_board_of_the_table_has_a_machine_here_and_a_mesh():
    assert set(BOARDS) == set(MACHINES)
    for board in BOARDS:
        mesh = mesh_of(get(board))
        assert mesh.chips == get(board).chips, board
    record: Mapping[str, Any] = {"sha256": {"merged/a": "1", "adapter/b": "2"}}
    assert digest_of(record) == digest_of({"sha256": {"merged/a": "1", "adapter/b": "3"}})
    assert digest_of(record) != digest_of({"sha256": {"merged/a": "2"}})
    assert stage.FOLDER == "serve"
