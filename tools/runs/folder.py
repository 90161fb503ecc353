"""The one reader of a run's folder: whatever can be read is, and what cannot is said in sentences (`faults`).

`manifest`, `config` and `recipe_dir` raise where they cannot be had; `read_run(folder, strict=True)` asks for all that
a judgment of the run rests on. Nothing in the folder is changed, and nothing is imported that trains: a board's host,
which has no numpy, reads runs too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from common import config as configs
from common.config import Config
from common.engine import BackendInfo
from common.errors import MachineError, RecipeError, UsageError
from common.paths import ROOT
from common.train import metrics
from common.train.manifest import FORMAT, NAME, Manifest
from tools.recipes import find_recipe

if TYPE_CHECKING:
    from common.train.checkpoint import Checkpoint
    from common.train.evaluate import HeldOut

Record = dict[str, Any]
Say = Callable[[str], None]
WARM_UP = 5  # steps whose speed does not count: compilation, caches, the first touch of memory
LARGEST = 2**63  # above any step or count of tokens; whole numbers of a record lie below it
HISTORY = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens")  # of a step's record: all but its seconds
NUMBERS = {*HISTORY, "seconds", "eval_loss", "eval_loss_se", "eval_tokens", "bits_per_byte", "bits_per_byte_se"}


def is_locked(folder: Path) -> bool:
    """Return whether a process has the lock of a run's folder. Writes nothing: the folder may be somebody else's."""
    try:
        with (folder / ".lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or one that may not be read
        return False
    return False


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it. `faults` are sentences about what could not be read, complete once it was asked for.

    With `strict`, a damaged line of its records is an error.
    """

    folder: Path
    strict: bool = False
    faults: list[str] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        return self.folder.name

    # --- what ran -----------------------------------------------------------------------------------------------------

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """Return manifest.json of any version, as far as it can be read; what cannot is left out, with a fault."""
        try:
            text = (self.folder / NAME).read_text(encoding="utf-8")
            values = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            self.faults.append(f"{NAME} cannot be read ({type(error).__name__})")
            return {}
        if not isinstance(values, dict):
            self.faults.append(f"{NAME} is no manifest")
            return {}
        if values.get("format") != FORMAT:
            self.faults.append(f"{NAME} has format {values.get('format')!r}, this version reads {FORMAT}")
        for key in misfits(text):
            values.pop(key, None)
            self.faults.append(f"{NAME}: left out, not of the known form: {key}")
        return values

    def fact(self, *keys: str) -> Any:
        """Return a value of manifest.json by its keys; None where it has none."""
        value: Any = self.facts
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @cached_property
    def manifest(self) -> Manifest:
        """Return the manifest. Raises MachineError, which says what the file lacks."""
        return Manifest.load(self.folder)

    @property
    def backend(self) -> BackendInfo:
        """Return the engine as it described itself. Raises MachineError where the run did not open one."""
        if self.manifest.backend is None:
            raise MachineError(f"{NAME} names no backend: the run ended before it had one", where=str(self.folder))
        return self.manifest.backend

    @cached_property
    def config(self) -> Config:
        """Return the resolved config. Raises UsageError or MachineError where it cannot be read."""
        return configs.load_resolved(self.folder / "config.resolved.yaml")

    @cached_property
    def known_config(self) -> Config | None:
        """Return the resolved config; None, with a fault, where it cannot be read."""
        try:
            return self.config
        except RecipeError as error:
            self.faults.append(f"config.resolved.yaml: {error.what}")
            return None

    @property
    def recipe_dir(self) -> Path:
        """Return the recipe's folder: where the run had it, else that of its name under recipes/. Raises UsageError.

        Commands run its code, and who made the run's folder could name any: another user's is not taken.
        """
        was = self.fact("recipe_dir")
        if was and (Path(was) / "config.yaml").is_file() and is_trusted(Path(was)):
            return Path(was)
        return find_recipe(self.fact("recipe") or self.config.recipe)

    @property
    def known_recipe_dir(self) -> Path | None:
        """Return the recipe's folder; None where it is not here any more."""
        try:
            return self.recipe_dir
        except RecipeError:
            return None

    @cached_property
    def state(self) -> str:
        """Return done, running, stopped, failed, or killed: ended with no time to say how."""
        reason = str(self.facts.get("exit_reason", "unknown"))
        if reason == "running":
            return "running" if is_locked(self.folder) else "killed"
        return reason.partition(":")[0]

    @property
    def image(self) -> str | None:
        """Return digest or id of the image that the run was in; None for the machine's own Python."""
        return self.fact("image", "reference")  # type: ignore[no-any-return]

    @property
    def environment(self) -> dict[str, Any]:
        """Return what fixes a CPU run's bits besides its config and data; None where the manifest does not say."""
        keys = ("lock_sha256",), ("cpu_class",), ("backend", "threads"), ("backend", "world"), ("backend", "compiled")
        return {path[-1]: self.fact(*path) for path in keys}

    @property
    def evaluated_in(self) -> str:
        """Return what the run's held-out losses were computed in: fp32 on a CPU, bf16 on a board."""
        return "bf16" if self.fact("backend", "backend") == "ttml" else "fp32"

    # --- its records --------------------------------------------------------------------------------------------------

    @cached_property
    def _metrics(self) -> list[Record]:
        return self._records("metrics.jsonl")

    @cached_property
    def steps(self) -> list[Record]:
        """Return metrics.jsonl's records of updates, by step."""
        return [record for record in self._metrics if "loss" in record]

    @cached_property
    def scores(self) -> list[Record]:
        """Return metrics.jsonl's records of evaluations: step, eval_loss, eval_loss_se and, for text, bits_per_byte."""
        return [record for record in self._metrics if "eval_loss" in record]

    @cached_property
    def evaluations(self) -> list[Record]:
        """Return evaluations.jsonl: nll and tokens by held-out row, answers to prompts. Step 0: the untrained model."""
        return self._records("evaluations.jsonl", "nll", "tokens", "samples")

    def _records(self, name: str, *keys: str) -> list[Record]:
        """Return the records of a file that have a step and `keys`, by step; whatever is left out is a fault."""
        faults = []
        try:
            records, unreadable = metrics.scan(self.folder / name)
        except OSError as error:
            records, unreadable = [], []
            faults.append(f"{name} cannot be read ({error.strerror})")
        whole = [record for record in records if is_whole(record, keys)]
        if unreadable == [len(records) + 1]:  # what a kill leaves, and a resumption cuts off: no damage
            self.faults.append(f"{name}: the last line is cut off, as by a process that was killed; left out")
        elif unreadable:
            faults.append(f"{name}: left out, no JSON: lines {few(unreadable)}")
        if len(whole) < len(records):
            faults.append(f"{name}: left out, not of the known form: {len(records) - len(whole)} records")
        if faults and self.strict:
            raise MachineError(faults[0], where=str(self.folder), todo="restore the file")
        self.faults.extend(faults)
        return sorted(whole, key=lambda record: record["step"])

    @property
    def last_step(self) -> int:
        """Return the last step on record; 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def last_score(self) -> Record:
        """Return the figures of the last evaluation; empty before the first."""
        return self.scores[-1] if self.scores else {}

    @property
    def losses(self) -> dict[int, float]:
        """Return the training loss by step, nats a token."""
        return {record["step"]: record["loss"] for record in self.steps}

    def evaluation(self, step: int) -> Record | None:
        """Return the record of evaluations.jsonl of one step."""
        return at_step(self.evaluations, step)

    def held_out(self, step: int | None = None) -> HeldOut | None:
        """Return the held-out rows as evaluated after `step`, or last; None where they were not."""
        from common.train.evaluate import from_rows

        found = self.evaluation(step) if step is not None else next(reversed(self.evaluations), None)
        return from_rows(found["nll"], found["tokens"]) if found else None

    @property
    def tokens_per_second(self) -> float | None:
        """Return the median of the steps after warm-up: what other programs do for a moment does not move it."""
        timed = [record for record in self.steps if record["step"] > WARM_UP and record.get("seconds")]
        rates = [record["tokens"] / record["seconds"] for record in timed if "tokens" in record]
        return statistics.median(rates) if rates else None

    @property
    def history_sha256(self) -> str:
        """Return the hash over every step and evaluation at full precision, their seconds and answers left out."""
        steps = [[record.get(key) for key in HISTORY] for record in self.steps]
        evaluations = [[record["step"], record["nll"], record["tokens"]] for record in self.evaluations]
        return hashlib.sha256(json.dumps([steps, evaluations]).encode()).hexdigest()

    # --- its checkpoints ----------------------------------------------------------------------------------------------

    def newest_checkpoint(self, say: Say) -> Checkpoint:
        """Return the newest checkpoint that verifies, saying what is passed over. Raises MachineError without one."""
        from common.train import checkpoint

        found = checkpoint.newest(self.folder / "checkpoints", say)
        if found is None:
            raise MachineError("the run has no checkpoint that verifies", where=str(self.folder), todo="train it again")
        return found

    @property
    def weights_sha256(self) -> str:
        """Return the hash of the weights in the newest checkpoint that verifies. Raises MachineError without one."""
        hashes = self.newest_checkpoint(lambda _line: None).state["sha256"]
        return str(hashes.get("adapter_model.safetensors") or hashes["model.safetensors"])

    def result(self, say: Say) -> Checkpoint:
        """Return the checkpoint that stands for the run: the newest that verifies; with keep_best, the best one."""
        from common.train import checkpoint
        from common.train.evaluate import from_rows

        found = self.newest_checkpoint(say)
        if not self.config.checkpoint.keep_best:
            return found
        scored = [
            (from_rows(record["nll"], record["tokens"]).loss, record["step"])
            for record in self.evaluations
            if 0 < record["step"] <= found.step
        ]
        for _, step in sorted(scored):
            try:
                return checkpoint.verify(checkpoint.folder_of(self.folder / "checkpoints", step))
            except MachineError:  # not the best at the time, and pruned; or damaged
                continue
        return found


def misfits(text: str) -> list[str]:
    """Return the keys of a manifest's text whose values are of another form than this version knows them to have."""
    try:
        Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        wrong = (item for item in error.errors(include_url=False) if item["type"] != "missing" and item["loc"])
        return [key for key in dict.fromkeys(str(item["loc"][0]) for item in wrong) if key != "format"]
    return []


def is_whole(record: Any, keys: Sequence[str]) -> bool:
    """Return whether a record has a step and `keys`, and in each key that is known a value of its kind."""
    if not isinstance(record, dict) or type(step := record.get("step")) is not int or not 0 <= step < LARGEST:
        return False
    nll, tokens, samples = (record.get(key, []) for key in ("nll", "tokens", "samples"))
    if "nll" in record:  # an evaluation's: a list each, by row
        rows = isinstance(nll, list) and isinstance(tokens, list) and len(nll) == len(tokens) > 0
        return rows and all(map(is_number, (*nll, *tokens))) and isinstance(samples, list) and record.keys() >= {*keys}
    unknown = (key for key in NUMBERS & record.keys() if not is_number(record[key]))
    return record.keys() >= {*keys} and all(record[key] is None and key.endswith("_se") for key in unknown)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that float64 holds; NaN is one."""
    return type(value) is float or (type(value) is int and abs(value) < LARGEST)


def is_trusted(folder: Path) -> bool:
    """Return whether a folder's code may be run unasked: it is this user's, or of who installed this repository."""
    return folder.stat().st_uid in (os.getuid(), ROOT.stat().st_uid)


def read_run(folder: Path, *, strict: bool = False) -> RunFolder:
    """Return the run in `folder`. Raises UsageError where no run is there.

    `strict` raises MachineError for a manifest, a config or records that cannot be read, and UsageError before step 1.
    """
    if not is_run(folder):
        raise UsageError("no run there", where=str(folder), todo="give a folder of runs/")
    run = RunFolder(folder.resolve(), strict)
    if strict and run.manifest and run.config and not run.steps:
        raise UsageError("the run has no step yet: there is nothing to look at", where=str(folder))
    return run


def is_run(folder: Path) -> bool:
    """Return whether a run began in the folder: it wrote its config and then its manifest before anything else."""
    return (folder / NAME).is_file() or (folder / "config.resolved.yaml").is_file()


def run_of(path: Path) -> Path:
    """Return the run's folder that a path names, which is one, or that of one of its checkpoints."""
    return path.parent.parent if (path / "state.json").is_file() else path


def runs_in(out: Path) -> Iterator[RunFolder]:
    """Yield every run of a folder of runs, the newest first: their names begin with the time of their start."""
    for path in sorted(out.glob(f"*/{NAME}"), key=lambda path: path.parent.name, reverse=True):
        yield read_run(path.parent)


def at_step(records: Sequence[Record], step: int) -> Record | None:
    """Return the last record of a step."""
    return next((record for record in reversed(records) if record["step"] == step), None)


def few(numbers: Sequence[int], shown: int = 5) -> str:
    """Return `3, 4, 5, 6, 7 and 12 more`."""
    rest = len(numbers) - shown
    return ", ".join(map(str, numbers[:shown])) + (f" and {rest} more" if rest > 0 else "")
