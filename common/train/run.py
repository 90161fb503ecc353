"""One training run: what a recipe's loop talks to.

`open_run` resolves the launch, makes or reopens the run folder, opens the engine and restores the state; whatever
ends the run, the engine is closed and the manifest says how it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from common.backends.base import Backend, BackendInfo, StepStats, open_backend, read_weights
from common.config import Config
from common.data.tokens import TokenDataset
from common.errors import RecipeError, Stopped, TrainingError
from common.models import sha256_file
from common.train import checkpoint, metrics
from common.train.checkpoint import Checkpoint
from common.train.console import LEVELS, Console, Progress, clock
from common.train.evaluate import HeldOut, from_rows, held_out
from common.train.files import disk_errors, write_atomic
from common.train.generate import generate
from common.train.manifest import Manifest, code_facts, utc_now
from common.train.metrics import JsonLines
from common.train.plan import Launch, Plan, make_plan, with_launch
from common.train.resume import Start, find_start
from common.train.schedule import learning_rate
from common.train.trackers import Trackers


@contextlib.contextmanager
def open_run(launch: Launch) -> Iterator[Run]:
    """Open the run that `launch` asks for; see the module."""
    console = Console()
    with contextlib.closing(console), disk_errors("write the run's files", launch.out):
        plan = make_plan(launch, console.say, console.warn)
        console.level = LEVELS[plan.config.logging.log_level]
        start = find_start(plan, console.say)
        with start.lock:
            plan = keep_decisions(plan, start)
            console.open_log(start.folder / "train.log")
            manifest = open_manifest(plan, start)
            with recorded_end(manifest, console), open_backend(plan.hw, plan.config) as backend:
                run = Run(plan, start, backend, console, manifest)
                with contextlib.closing(run):
                    yield run


class Run:
    """The state of one run, ready at the step it starts from."""

    def __init__(self, plan: Plan, start: Start, backend: Backend, console: Console, manifest: Manifest) -> None:
        self.plan, self.start, self.backend = plan, start, backend
        self.config: Config = plan.config
        self.dataset: TokenDataset = plan.dataset
        self.folder: Path = start.folder
        self.console, self.manifest = console, manifest
        self.checkpoints = self.folder / "checkpoints"
        self.progress = Progress(console, self.last_step, self.config.logging.log_every)
        self._restore()
        self.trackers = Trackers(self.config, self.folder, console.say)
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.evaluations = JsonLines(self.folder / "evaluations.jsonl")

    def _restore(self) -> None:
        """Put model, optimizer and records into the state of the step the run starts from."""
        plan, start = self.plan, self.start
        self.backend.build(plan.architecture)
        assert plan.base is not None
        parameters = self.backend.load(read_weights(plan.base.weight_files()))
        check_parameters(parameters, plan)
        info = self.backend.info
        self.manifest.update(backend=dataclasses.asdict(info), base_parameters=parameters)
        self.console.say(
            f"{plan.base.name}: {parameters:,} parameters; {info.backend} on {info.device}, {info.threads} threads, "
            f"{info.precision} ({plan.reasons['precision']}); {info.reason}"
        )
        for note in (*info.notes, *start.notes, *other_versions(start, info)):
            self.console.say(note)
        self.records: list[dict[str, Any]] = []
        self.saved_step = 0
        if start.checkpoint:
            self.backend.load_state(checkpoint.Tensors(start.checkpoint.folder))
            self._restore_records(start.checkpoint)

    def _restore_records(self, found: Checkpoint) -> None:
        """Metrics and evaluations up to the checkpoint's step; a branch takes them over from its parent."""
        origin = found.folder.parent.parent
        metrics.cut_back(origin / "metrics.jsonl", found.step, self.folder / "metrics.jsonl")
        if found.state["tokens_sha256"] == self.dataset.tokens_sha256:  # else they are of other rows
            self.records = metrics.cut_back(origin / "evaluations.jsonl", found.step, self.folder / "evaluations.jsonl")
        if found.folder.parent == self.checkpoints:
            self.saved_step = found.step

    @property
    def last_step(self) -> int:
        return self.config.training.max_steps or 0

    # --- what the loop calls --------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 1; saves and raises Stopped at `--stop-at`, SIGTERM or SIGINT."""
        stop_at, resume = self.plan.launch.stop_at, self.plan.launch.resume
        how = "" if resume == "auto" else " with --resume auto in place of what was given,"
        go_on = f"the same command,{how} without --stop-at, goes on from here"
        if stop_at is not None and stop_at <= self.start.step:
            raise Stopped(
                f"--stop-at {stop_at}: this run already stands after step {self.start.step}",
                where=str(self.folder),
                todo=go_on,
            )
        with catch_signals(self.console) as asked:
            for step in range(self.start.step + 1, self.last_step + 1):
                yield step
                if asked or step == stop_at:
                    self.save(step)
                    reason = asked[0] if asked else f"--stop-at {step}"
                    raise Stopped(
                        f"stopped by {reason} after step {step}, which is saved", where=str(self.folder), todo=go_on
                    )

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.training)

    def record(self, step: int, stats: StepStats) -> None:
        """One line of metrics.jsonl, and the live line."""
        rate = self.learning_rate(step)
        record = {
            "step": step,
            "loss": stats.loss,
            "lr": rate,
            "grad_norm": stats.grad_norm,
            "tokens": stats.tokens,
            "supervised_tokens": stats.supervised_tokens,
            "seconds": stats.seconds,
        }
        self.metrics.write(record)
        self.trackers.write(record)
        self.progress.update(step, stats, rate)

    def evaluate(self, step: int) -> None:
        """Held-out loss and the answers to the evaluation prompts; once a step, 0 being the untrained model."""
        if step < self.start.step or any(record["step"] == step for record in self.records):
            return
        self.console.status(f"evaluating after step {step} ...")
        started = time.perf_counter()
        rows = held_out(self.backend, self.dataset.held_out)
        if not math.isfinite(rows.loss):
            raise TrainingError(
                f"the held-out loss after step {step} is {rows.loss}: the last updates ruined the model",
                where=f"step {step}",
                todo="resume with a lower learning rate: --resume PATH --accept-changes",
            )
        record = {
            "step": step,
            "eval_loss": rows.loss,
            "eval_loss_se": rows.standard_error if len(rows.nll) > 1 else None,  # NaN is no JSON
            "eval_tokens": int(rows.tokens.sum()),
        }
        entry = {
            "step": step,
            "nll": rows.nll.tolist(),
            "tokens": rows.tokens.tolist(),
            "samples": self.samples(),
        }
        self.evaluations.write(entry)
        self.records.append(entry)
        self.metrics.write(record)
        self.trackers.write(record)
        write_atomic(self.folder / "samples.md", samples_markdown(self.records))
        self.console.say(self._evaluation_line(step, rows, time.perf_counter() - started))

    def samples(self) -> list[dict[str, Any]]:
        """The model's answers to the evaluation prompts now, by the config's sampling."""
        tokenizer, system, prompts = self.plan.tokenizer, self.config.data.system_prompt, self.plan.prompts
        ids = generate(
            self.backend,
            [tokenizer.prompt_ids(prompt, system) for prompt in prompts],
            self.config.eval,
            eos_ids=tokenizer.eos_ids,
            vocab_size=tokenizer.vocab_size,
            seed=self.config.training.seed,
        )
        return [
            {"prompt": prompt, "answer": tokenizer.decode(answer).strip(), "tokens": len(answer)}
            for prompt, answer in zip(prompts, ids, strict=True)
        ]

    def _evaluation_line(self, step: int, rows: HeldOut, seconds: float) -> str:
        line = f"held-out loss after step {step}: {rows.loss:.4f} ± {rows.standard_error:.4f}"
        if step > 0 and (base := self.base_evaluation()):
            gain, error = rows.improvement_over(base)
            line += f"; {gain:+.4f} ± {error:.4f} better than the untrained model, paired by row"
        return f"{line} ({clock(seconds)})"

    def base_evaluation(self) -> HeldOut | None:
        """The untrained model on the held-out rows, as evaluated at step 0."""
        first = next((r for r in self.records if r["step"] == 0), None)
        if first is None or len(first["nll"]) != len(self.dataset.held_out):  # a branch onto other data
            return None
        return from_rows(first["nll"], first["tokens"])

    def save(self, step: int) -> None:
        """The checkpoint of `step`, once."""
        if self.saved_step == step:
            return
        self.console.status(f"saving step {step} ...")
        self.metrics.sync()
        self.evaluations.sync()
        facts = {
            "training_digest": self.plan.training_digest,
            "config_digest": self.config.config_digest(),
            "tokens_sha256": self.dataset.tokens_sha256,
            "rng": {"rule": "seeded by (seed, step) at every step; no state is carried"},
            "compiled": self.backend.info.compiled,
            "threads": self.backend.info.threads,
            "device": self.backend.info.device,
            "versions": dict(self.backend.info.versions),
        }
        checkpoint.save(self.checkpoints, step, self.backend.state(), self.config, facts)
        self.saved_step = step
        best = [self.best_step()] if self.config.checkpoint.keep_best else []
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep_last, best, newest=step)
        self.console.say(f"saved step {step}", "DEBUG")

    def best_step(self) -> int:
        """The trained step with the lowest held-out loss so far; 0 before any was evaluated."""
        trained = [(from_rows(r["nll"], r["tokens"]).loss, r["step"]) for r in self.records if r["step"] > 0]
        return min(trained)[1] if trained else 0

    def evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.last_step or (every > 0 and step % every == 0)

    def checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        best = self.config.checkpoint.keep_best and self.evaluation_due(step) and self.best_step() == step
        return step == self.last_step or (every > 0 and step % every == 0) or best

    def finish(self) -> None:
        """After the loop: what a run killed after its last step still lacks."""
        self.evaluate(self.last_step)
        self.save(self.last_step)
        self.close()
        self.manifest.update(trained=utc_now(), metrics_sha256=sha256_file(self.folder / "metrics.jsonl"))

    def close(self) -> None:
        for file in (self.metrics, self.evaluations, self.trackers):
            file.close()


def keep_decisions(plan: Plan, start: Start) -> Plan:
    """On resume, decisions that fix the bits stay as they were taken: compile, and threads where not configured."""
    if start.checkpoint is None:
        return plan
    plan = with_launch(plan, **{"device.compile": "always" if start.checkpoint.state["compiled"] else "never"})
    if plan.config.device.threads is None:
        plan = with_launch(plan, **{"device.threads": start.checkpoint.state["threads"]})
    return plan


def other_versions(start: Start, info: BackendInfo) -> list[str]:
    """What the checkpoint was made with that this process does not have: its bits then end there."""
    if start.checkpoint is None:
        return []
    now = {**info.versions, "device": info.device, "compiled": info.compiled}
    state = start.checkpoint.state
    then = {**state["versions"], "device": state.get("device", info.device), "compiled": state["compiled"]}
    lines = [f"changed: {name}: {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name)]
    return [*lines, "not bit-exact from here"] if lines else []


def check_parameters(found: int, plan: Plan) -> None:
    expected = plan.base.parameters if plan.base else None
    if expected is not None and found != expected:
        raise AssertionError(f"the built model has {found:,} parameters, models.lock.yaml says {expected:,}")


def open_manifest(plan: Plan, start: Start) -> Manifest:
    """The manifest of a new run, or that of the run that goes on, with the resumption noted."""
    path = start.folder / "manifest.json"
    event = {
        "at": utc_now(),
        "step": start.step,
        "command": list(plan.launch.command),
        "overrides": list(plan.launch.overrides),
        "config_digest": plan.config.config_digest(),
        "notes": start.notes,
        **code_facts(),
    }
    if start.manifest is not None:
        manifest = Manifest(path, start.manifest)
        manifest.update(exit_reason="running", end=None)
        manifest.append("resumed", event)
        return manifest
    write_atomic(start.folder / "config.resolved.yaml", plan.config.to_yaml())
    base, data = plan.base, plan.dataset
    values: dict[str, Any] = {
        "run": start.folder.name,
        "recipe": plan.config.recipe,
        "recipe_dir": str(plan.launch.recipe_dir),
        "command": list(plan.launch.command),
        "overrides": list(plan.launch.overrides),
        "start": utc_now(),
        "end": None,
        "exit_reason": "running",
        "parent": start.parent,
        "resumed": [event] if start.parent else [],
        "hw": plan.hw.name,
        "reasons": plan.reasons,
        "seed": plan.config.training.seed,
        "steps": plan.config.training.max_steps,
        "config_digest": plan.config.config_digest(),
        "training_digest": plan.training_digest,
        "base": {"name": base.name, "identity": base.identity, "origin": base.origin, "licence": base.licence}
        if base
        else None,
        "data": {"source_key": data.source_key, "tokens_sha256": data.tokens_sha256, "length": data.length},
        "tokenizer_sha256": plan.tokenizer.sha256,
        **code_facts(),
    }
    manifest = Manifest(path, values)
    manifest.update()
    return manifest


@contextlib.contextmanager
def recorded_end(manifest: Manifest, console: Console) -> Iterator[None]:
    """Write into the manifest, and the log, how the run ended."""
    reason = "done"
    try:
        yield
    except Stopped as stop:
        reason = f"stopped: {stop.what}"
        raise
    except RecipeError as error:
        reason = f"failed: {error.what}"
        console.say(str(error), "DEBUG")
        raise
    except BaseException as error:
        reason = f"failed: {type(error).__name__}: {error}"
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
            manifest.update(exit_reason=reason, end=utc_now())


@contextlib.contextmanager
def catch_signals(console: Console) -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT until the step is over; a second one ends the process at once."""
    asked: list[str] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        with contextlib.suppress(RuntimeError):  # the signal came while this very file was being written
            console.say(f"{asked[0]}: saving after this step; once more to stop without saving")

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def samples_markdown(records: list[dict[str, Any]]) -> str:
    """samples.md: under each prompt, what the model answered after each evaluated step."""
    lines = ["# Samples", ""]
    for prompt in [sample["prompt"] for sample in records[-1]["samples"]]:
        lines += [f"## {prompt}", ""]
        for record in records:
            name = "untrained" if record["step"] == 0 else f"step {record['step']}"
            answers = [sample["answer"] for sample in record["samples"] if sample["prompt"] == prompt]
            for answer in answers:
                lines += [f"**{name}**", "", "> " + (answer.replace("\n", "\n> ") or "(nothing)"), ""]
    return "\n".join(lines)
