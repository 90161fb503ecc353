"""`recipe repro`: a run again, from its manifest alone, and how the two differ.

Code comes of the run's commit (in a worktree of its own), settings of its config.resolved.yaml, threads and compilation
of its manifest. What cannot be restored is said before anything is trained; other data or another base is refused
there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from common import hardware
from common.errors import DataError, MachineError, Stopped, TrainingError, UsageError, VerificationError
from common.files import sha256_file
from common.paths import ROOT
from common.train import checkpoint
from tools.containers.images import LOCAL, image_for
from tools.git import git, head
from tools.machine import detect
from tools.runs.folder import HISTORY, RunFolder, Say, read_run
from tools.runs.trained import find_base


@dataclass(frozen=True)
class Again:
    """What is run again: the root of the code, the recipe there, its board and settings, and its steps."""

    root: Path
    recipe: Path
    settings: tuple[str, ...]
    steps: tuple[str, ...]

    def run(self, *verb: str, options: Sequence[str], quiet: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a verb of `recipe` on it in a process of its own; what it prints is kept where `quiet`.

        It has our environment, without a board of its own, and the code of `root` before any installed one.
        """
        # Commits that have no tools/ yet have the command in common/.
        module = "tools.cli" if (self.root / "tools" / "cli").is_dir() else "common"
        words = [sys.executable, "-m", module, *verb, str(self.recipe), *self.settings, *options]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "HW": ""}
        return subprocess.run(words, cwd=self.root, capture_output=quiet, text=True, check=False, env=environment)

    def answer(self, *verb: str, options: Sequence[str]) -> str:
        """Return what a verb prints. Its error is passed on as ours."""
        done = self.run(*verb, options=options)
        if done.returncode:
            kind = {2: UsageError, 3: DataError}.get(done.returncode, MachineError)
            raise kind(f"the recipe does not resolve any more: {done.stderr.strip().removeprefix('error: ')}")
        return done.stdout


def repro(folder: Path, out: Path, say: Say) -> Path:
    """Run the run in `folder` again below `out`; return the new run's folder.

    Raises UsageError, DataError or MachineError, before training, for what makes it another run, and
    VerificationError where the same bits were to be expected and are not there.
    """
    run = read_run(folder, strict=True)
    refuse_branch(run)
    detect.choose(run.manifest.hw)
    with code_of(run, say) as (root, lost):
        again = prepare(run, root, say)
        lost += list(lost_environment(run, root))
        for line in lost:
            say(f"cannot be restored: {line}")
        check_data(run, again)
        find_base(run, say)
        say("data and base are those of the run" + ("; the same bits are expected" if not lost else ""))
        where = "--container" if image_here(run) else "--no-container"
        new = read_run(train(again, out, where), strict=True)
    compare(run, new, not lost and new.image == run.image, say)
    return new.folder


def refuse_branch(run: RunFolder) -> None:
    if parent := run.manifest.parent:
        raise UsageError(
            f"the run starts from a checkpoint of another one, {parent}",
            where=str(run.folder),
            todo="repro that one, then recipe run --resume PATH from the checkpoint it makes",
        )


@contextlib.contextmanager
def code_of(run: RunFolder, say: Say) -> Iterator[tuple[Path, list[str]]]:
    """Check out the run's commit; yield the tree, and what is lost of the code: nothing of a commit we have."""
    commit, (here, dirty) = run.manifest.git_commit, head()
    if run.manifest.git_dirty is not False or commit is None:
        yield ROOT, ["the code: the tree it ran from was not a commit as it stands; the code of now is used"]
    elif git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        yield ROOT, [f"the code: commit {commit[:12]} is not in this repository; the code of now is used"]
    elif here == commit and not dirty:
        yield ROOT, []
    else:
        changed = git("diff", "--name-only", commit, "--", f"recipes/{run.config.recipe}").stdout.split()
        say(f"code of commit {commit[:12]}" + (f"; changed since, and not used: {', '.join(changed)}" * bool(changed)))
        with tempfile.TemporaryDirectory(prefix="recipes-repro-") as scratch:
            tree = Path(scratch) / "tree"
            if (done := git("worktree", "add", "--detach", str(tree), commit)).returncode:
                raise MachineError(f"git could not check out {commit[:12]}: {done.stderr.strip()}", where=str(ROOT))
            try:
                if LOCAL.is_file() and (tree / "docker").is_dir():  # it is this machine's, and so of no commit
                    shutil.copy(LOCAL, tree / "docker")
                yield tree, []
            finally:
                git("worktree", "remove", "--force", str(tree))


def prepare(run: RunFolder, root: Path, say: Say) -> Again:
    """Return the command that runs it again, with --set for whatever the recipe in `root` resolves to otherwise."""
    manifest, engine = run.manifest, run.backend
    recipe = run.recipe_dir
    if recipe.parent.name == "recipes" and (root / "recipes" / recipe.name / "config.yaml").is_file():
        recipe = root / "recipes" / recipe.name  # of the run's commit, not of now
    asked = tuple(word for override in manifest.overrides for word in ("--set", override))
    again = Again(root, recipe, ("--hw", manifest.hw, *asked), ("--steps", str(manifest.steps)))
    changes = settings_to_restore(run, again)
    if changes:
        say(f"restored from config.resolved.yaml: {', '.join(changes)}")
    if engine.backend == "torch-cpu":
        changes |= {"device_config.threads": engine.threads}
        changes |= {"device_config.compile": "always" if engine.compiled else "never"}
    more = tuple(word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}"))
    if manifest.exit_reason != "done" and run.last_step < manifest.steps:
        again = replace(again, steps=(*again.steps, "--stop-at", str(run.last_step)))
    return replace(again, settings=(*again.settings, *more))


def settings_to_restore(run: RunFolder, again: Again) -> dict[str, Any]:
    """Return the keys that the recipe resolves to another value than the run had, with the run's value."""
    now = yaml.safe_load(again.answer("config", "show", options=again.steps))
    # The code of the run's own commit reads the keys of its time; that of now reads those of now.
    text = run.config.to_yaml() if again.root == ROOT else (run.folder / "config.resolved.yaml").read_text("utf-8")
    then = yaml.safe_load(text)
    if now["training_config"]["batch_size"] != then["training_config"]["batch_size"]:
        now["training_config"].pop("micro_batch_size", None)  # it followed from the other batch
    return {
        f"{section}.{key}": value
        for section, values in then.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if now[section].get(key) != value and key not in ("max_steps", "num_epochs")
    }


def lost_environment(run: RunFolder, root: Path) -> Iterator[str]:
    """Yield what fixes the bits besides code and settings, and is another here."""
    manifest, engine = run.manifest, run.backend
    if run.image != (image := image_here(run)):
        yield f"the image: {run.image or 'none'}; here {image or 'none'}"
    if image is None:
        yield from lost_packages(run, root)
    if manifest.cpu_class != hardware.cpu_class():
        yield f"the CPU's class: {manifest.cpu_class}; here {hardware.cpu_class()}"
    if engine.backend != "torch-cpu":
        yield "bits: a board promises none"
    for event in manifest.resumed:
        if changed := [note for note in event.notes if "changed" in note or "bit-exact" in note]:
            yield f"the resumption after step {event.step}, which changed something: {'; '.join(changed)}"


def lost_packages(run: RunFolder, root: Path) -> Iterator[str]:
    """Yield what this environment has otherwise than the run's."""
    lock = root / "requirements" / f"cpu-{sys.version_info[0]}.{sys.version_info[1]}.txt"
    sha256 = sha256_file(lock) if lock.is_file() else None
    if run.manifest.lock_sha256 != sha256:
        yield f"the lock file: {lock.name} has another sha256 than the run's"
    for name, version in run.backend.versions.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if name != "python" and (here := importlib.metadata.version(name)) != version:
                yield f"{name} {version}: {here} is installed"


def image_here(run: RunFolder) -> str | None:
    """Return the image that the run is made again in: none if it was in none itself, or none is to be had here."""
    if run.image:
        with contextlib.suppress(MachineError):
            return image_for(hardware.get(run.manifest.hw)).reference
    return None


def check_data(run: RunFolder, again: Again) -> None:
    """Raise DataError where the recipe of now makes other tokens than the run was trained on."""
    built = json.loads(again.answer("data", "build", options=["--json"]))
    now, then = built["tokens_sha256"], run.manifest.data.tokens_sha256
    if now != then:
        raise DataError(
            f"the data changed since the run: its tokens had sha256 {then[:12]}..., now {now[:12]}...; nothing was run",
            where=str(again.recipe),
            todo="bring back the rows of that time (git log shows the recipe's changes)",
        )


def train(again: Again, out: Path, where: str) -> Path:
    """Train by `recipe run` in a process of its own, on this screen; return the new run's folder."""
    out = out.absolute()
    before = set(out.glob("*/manifest.json"))
    options = (*again.steps, where, "--resume", "never", "--out", str(out))
    code = again.run("run", options=options, quiet=False).returncode
    new = sorted(set(out.glob("*/manifest.json")) - before)
    if code not in (0, Stopped.code) or not new:
        raise TrainingError(f"the run ended with code {code} this time; its own message is above", where=str(out))
    return new[-1].parent


def compare(run: RunFolder, new: RunFolder, expected: bool, say: Say) -> None:
    """Say how two runs differ. Raises VerificationError where the same bits were `expected`."""
    first = first_difference(run, new)
    if first is None:
        say(f"reproduced bit for bit: {run.last_step} steps, {len(run.evaluations)} evaluations, the last checkpoint")
        return
    far = max(abs(run.losses[step] - new.losses[step]) for step in run.losses if step in new.losses)
    says = f"{first}; training losses are at most {far:.3g} nats apart"
    if expected:
        raise VerificationError(
            f"not reproduced: {says}",
            where=f"{run.folder} and {new.folder}",
            todo="the same bits were to be expected: compare their manifests, and report it",
        )
    say(f"not the same bits, which were not to be expected: {says}; by a band: recipe grade {new.folder}")


def first_difference(run: RunFolder, new: RunFolder) -> str | None:
    """Return the first thing in which two runs differ: a record of a step, an evaluation, a checkpoint's file."""
    for was, now in zip(run.steps, new.steps, strict=False):
        for key in HISTORY:
            if was[key] != now[key]:
                return f"{key} of step {was['step']}: {was[key]!r}, now {now[key]!r}"
    if len(run.steps) != len(new.steps):
        return f"{len(run.steps)} steps, now {len(new.steps)}"
    for then, now in zip(run.evaluations, new.evaluations, strict=False):
        if then != now:
            return f"the evaluation after step {then['step']}"
    if len(run.evaluations) != len(new.evaluations):
        return f"{len(run.evaluations)} evaluations, now {len(new.evaluations)}"
    hashes = [checkpoint.newest(one.folder / "checkpoints") for one in (run, new)]
    then_files, now_files = (dict(found.state["sha256"]) if found else {} for found in hashes)
    return next(
        (f"{name} of the last checkpoint" for name in then_files if then_files[name] != now_files.get(name)), None
    )
