"""The life of a run, as a recipe's loop sees it.

`open_run` plans the launch, makes or reopens the run folder, opens the engine and restores the state; whatever ends
the run, the engine is closed and the manifest says how it ended.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import Config
from common.data.tokens import TokenDataset
from common.engine import Backend, StepStats, load_engine, not_reached
from common.errors import Stopped, TrainingError
from common.files import disk_errors, sha256_file, utc_now, write_atomic
from common.recipe import Prompts, Splits
from common.train import checkpoint, samples
from common.train.console import LEVELS, Console, Progress, clock
from common.train.early_stop import best_step, early_stop
from common.train.ending import BEGINS, catch_signals, record_stall, recorded_end, saved_if_a_rank_dies
from common.train.evaluate import describe, evaluated_rows, evaluated_text, from_rows, held_out, scores
from common.train.first_loss import check_first_loss
from common.train.launch import Launch
from common.train.manifest import Manifest
from common.train.memorizing import memorizing
from common.train.metrics import JsonLines
from common.train.opening import Past, changed_versions, keep_decisions, open_manifest, take_over
from common.train.plan import Plan, make_plan
from common.train.resume import Start, find_start
from common.train.schedule import learning_rate
from common.train.trackers import Trackers
from common.train.watchdog import Watchdog

SAVING = "saving as soon as this step is over; once more to stop without saving"


@contextlib.contextmanager
def open_run(launch: Launch, splits: Splits, prompts: Prompts) -> Iterator[Run]:
    """Yield the run that `launch` asks for, restored and recorded, on the data of the recipe's `splits` and `prompts`.

    Whatever ends the block before its end, it is recorded how; a run that was trained is over after what follows it.
    """
    console = Console()
    with contextlib.closing(console), disk_errors("write the run's files", launch.out):
        plan = make_plan(launch, splits, prompts, console.say, console.warn)
        console.level = LEVELS[plan.config.logging.log_level]
        start = find_start(plan, console.say)
        with start.lock:
            plan = keep_decisions(plan, start)
            console.open_log(start.folder / "train.log")
            manifest = open_manifest(plan, start)
            console.say(f"{BEGINS} process {os.getpid()}", "DEBUG")
            with recorded_end(manifest, start.folder, console), catch_signals(console, SAVING) as signals:
                with (
                    load_engine(launch.engine).open_backend(plan.hw, plan.config) as backend,
                    contextlib.closing(Run(plan, start, backend, console, manifest, signals)) as run,
                    saved_if_a_rank_dies(run.folder, run.save_trained),
                ):
                    yield run
                if signals:
                    raise run.stopped(f"stopped by {signals[0]} after the last step, before the export")


class Run:
    """One run, ready at the step it starts from. `signals` grows by the name of each that asks it to stop."""

    def __init__(
        self, plan: Plan, start: Start, backend: Backend, console: Console, manifest: Manifest, signals: list[str]
    ) -> None:
        self.plan, self.start, self.backend = plan, start, backend
        self.console, self.manifest, self.signals = console, manifest, signals
        self.config: Config = plan.config
        self.dataset: TokenDataset = plan.dataset
        self.folder: Path = start.folder
        self.checkpoints = self.folder / "checkpoints"
        self.held_out = evaluated_rows(plan.dataset, plan.config.eval)
        self.text = evaluated_text(plan.dataset, plan.config.eval)
        self.notes_said = 0  # of those the engine has
        self._restore_model()
        past = Past()
        if found := start.checkpoint:
            past = take_over(found, self.folder, self.dataset, len(self.held_out), console.say)
        self.records: list[dict[str, Any]] = past.evaluations  # of evaluations.jsonl
        self.recent_losses = past.recent_losses  # of the steps since the last evaluation
        of_record = ((from_rows(record["nll"], record["tokens"]).loss, record["step"]) for record in self.records)
        self.losses = [(loss, step) for loss, step in of_record if step]  # held out, without the untrained model's
        self.trained_step = start.step  # the last one whose update is done
        self.saved_step = found.step if found and found.folder.parent == self.checkpoints else 0
        self.owes_evaluation = start.step > 0 and self.evaluation_due(start.step) and not past.evaluated
        self.progress = Progress(console, self.config.training.max_steps or 0, self.config.logging.log_every)
        self.trackers = Trackers(self.config, self.folder, console.say)
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.evaluations = JsonLines(self.folder / "evaluations.jsonl")
        stalled = functools.partial(record_stall, manifest, self.folder, console)
        device = "CPU process" if plan.hw.is_cpu else "device"
        self.watchdog = Watchdog(stalled, backend.info.world, device, console.log, plan.launch.stall_seconds)

    def _restore_model(self) -> None:
        """Bring model and optimizer into the state of the step the run starts from; say what runs."""
        plan, base, found = self.plan, self.plan.base, self.start.checkpoint
        self.backend.build(base.architecture)
        parameters = self.backend.load(base.weights())
        if base.parameters not in (None, parameters):
            raise AssertionError(f"the built model has {parameters:,} parameters, {base.name} has {base.parameters:,}")
        info = self.backend.info
        self.manifest.base_parameters = parameters
        self.console.say(
            f"{base.name}: {parameters:,} parameters; {info.backend} on {info.device}, {info.threads} threads, "
            f"{info.precision} ({plan.reasons['precision']}); {info.reason}"
        )
        for note in (*self.start.notes, *(changed_versions(found, info) if found else [])):
            self.console.say(note)
        self._say_notes()
        if found:
            self.backend.load_state(checkpoint.read_tensors(found.folder))
            self._say_notes()

    def _say_notes(self) -> None:
        """Say what the engine has had to note since the last time, and put all of it into the manifest."""
        info = self.backend.info
        for note in info.notes[self.notes_said :]:
            self.console.say(note)
        self.notes_said = len(info.notes)
        self.manifest.backend = info
        self.manifest.save(self.folder)

    # --- what the loop calls --------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do, from 1; save and raise Stopped at `--stop-at`, SIGTERM or SIGINT."""
        stop_at, start = self.plan.launch.stop_at, self.start.step
        if stop_at is not None and stop_at <= start:
            raise self.stopped(f"--stop-at {stop_at}: this run already stands after step {start}")
        if self.signals and start == 0:
            raise KeyboardInterrupt  # nothing was trained, and nothing is there to go on from
        if self.signals:
            raise self.stopped(f"stopped by {self.signals[0]} before step {start + 1}")
        if self.owes_evaluation:
            self.evaluate(start)
        for step in range(start + 1, self.last_step + 1):
            self.watchdog.begin(step)
            yield step
            if self.signals or step == stop_at:
                self.save(step)
                reason = self.signals[0] if self.signals else f"--stop-at {step}"
                raise self.stopped(f"stopped by {reason} after step {step}, which is saved")
            if step == self.last_step:  # the evaluation of this step may have ended the run early
                return

    def learning_rate(self, step: int) -> float:
        """Return what the schedule says for `step`."""
        return learning_rate(step, self.config.training)

    def record(self, step: int, stats: StepStats) -> None:
        """Write the step into metrics.jsonl and onto the live line; check gradients and loss of a first one before."""
        self.watchdog.end(stats.seconds)
        if stats.without_gradient and step == self.start.step + 1:
            raise not_reached(stats.without_gradient, f"step {step}, which is not saved")
        if step == 1 and (initial := self.plan.base.initial):
            self.manifest.first_loss = check_first_loss(stats.loss, initial, self.dataset.train.arrays.ids)
            self.console.say(self.manifest.first_loss)
            self.manifest.save(self.folder)
        if step == self.start.step + 1:  # after its first step an engine may know more: that its devices agree
            self._say_notes()
        self.trained_step = step
        self.recent_losses.append(stats.loss)
        record = {
            "step": step,
            "loss": stats.loss,
            "lr": stats.learning_rate,
            "grad_norm": stats.grad_norm,
            "tokens": stats.tokens,
            "supervised_tokens": stats.supervised_tokens,
            "seconds": stats.seconds,
        }
        self.metrics.write(record)
        self.trackers.write(record)
        self.progress.update(step, stats)

    def evaluate(self, step: int) -> None:
        """Record held-out loss and the answers to the evaluation prompts, once a step; 0 is the untrained model."""
        if step < self.start.step or any(record["step"] == step for record in self.records):
            return
        self.watchdog.end()
        self.console.status(f"evaluating after step {step} ...")
        started = time.perf_counter()
        rows = held_out(self.backend, self.held_out)
        if not math.isfinite(rows.loss):
            what = f"the held-out loss after step {step} is {rows.loss}: the last updates ruined the model"
            todo = "resume with a lower learning rate: --resume PATH --accept-changes"
            raise TrainingError(what, where=f"step {step}", todo=todo)
        entry = {
            "step": step,
            "nll": rows.nll.tolist(),
            "tokens": rows.tokens.tolist(),
            "samples": samples.answers(self.backend, self.plan.prompts, self.plan.tokenizer, self.config),
        }
        self.evaluations.write(entry)
        self.records.append(entry)
        self.losses += [(rows.loss, step)] if step else []
        record = scores(step, rows, self.text)
        self.metrics.write(record)
        self.trackers.write(record)
        write_atomic(self.folder / "samples.md", samples.markdown(self.records))
        first = self.records[0]  # of another step than 0 in a branch onto other data
        untrained = from_rows(first["nll"], first["tokens"]) if step > 0 and first["step"] == 0 else None
        line = describe(step, rows, untrained, self.text)
        self.console.say(f"{line} ({clock(time.perf_counter() - started)})")
        if self.config.data.corpus and (
            warning := memorizing(self.recent_losses, [*([(untrained.loss, 0)] if untrained else []), *self.losses])
        ):
            self.console.say(warning)
        self.recent_losses = []

    def evaluation_due(self, step: int) -> bool:
        """Return whether eval_config wants an evaluation after `step`; the last step always has one."""
        every = self.config.eval.every
        return step == self.last_step or (every > 0 and step % every == 0)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, once, and delete those that checkpoint_config does not keep."""
        if self.saved_step == step:
            return
        self.watchdog.end()
        self.console.status(f"saving step {step} ...")
        self.metrics.sync()
        self.evaluations.sync()
        info = self.backend.info
        facts = {
            "training_digest": self.plan.training_digest,
            "config_digest": self.config.config_digest(),
            "tokens_sha256": self.dataset.tokens_sha256,
            "rng": {"rule": "seeded by (seed, step) at every step; no state is carried"},
            "backend": info.backend,
            "replica": f"the first of {info.world}" if info.world > 1 else None,
            "compiled": info.compiled,
            "threads": info.threads,
            "world": info.world,
            "device": info.device,
            "versions": dict(info.versions),
        }
        checkpoint.save(self.checkpoints, step, self.backend.state(), self.config, facts)
        self.saved_step = step
        best = [best_step(self.losses)] if self.config.checkpoint.keep_best else []
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep_last, best, newest=step)
        self.console.say(f"saved step {step}", "DEBUG")

    def save_trained(self) -> int:
        """Save the last step whose update is done, if there is one; return it."""
        if self.trained_step:
            self.save(self.trained_step)
        return self.trained_step

    def checkpoint_due(self, step: int) -> bool:
        """Return whether checkpoint_config wants a checkpoint of `step`; the last step always has one."""
        every = self.config.checkpoint.every
        best = self.config.checkpoint.keep_best and self.evaluation_due(step) and best_step(self.losses) == step
        return step == self.last_step or (every > 0 and step % every == 0) or best

    def finish(self) -> None:
        """Evaluate and save the last step where that is still to do, and note in the manifest what was trained."""
        step, planned = self.last_step, self.config.training.max_steps
        if step != planned:
            self.manifest.ended_early = step
            self.console.say(
                f"ended after step {step} of {planned}: the held-out loss did not fall in "
                f"{self.config.eval.patience} evaluations; it was lowest after step {best_step(self.losses)}"
            )
        self.evaluate(step)
        self.save(step)
        self.close()
        self.manifest.trained = utc_now()
        self.manifest.metrics_sha256 = sha256_file(self.folder / "metrics.jsonl")
        self.manifest.peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # Linux has KiB
        self.manifest.replicas = self.backend.replicas() if self.backend.info.world > 1 else None
        self.manifest.save(self.folder)

    @property
    def last_step(self) -> int:
        """The run's last step: max_steps, or the one it is ended at for want of progress."""
        early = early_stop(self.losses, self.config.eval.patience, self.start.step)
        return early or self.config.training.max_steps or 0

    def stopped(self, what: str) -> Stopped:
        """Return what ends a run that was asked to stop, with the way to go on."""
        launch = self.plan.launch
        how = "" if launch.resume == "auto" else ", with --resume auto in place of what was given,"
        how += "" if launch.stop_at is None else ", without --stop-at,"
        return Stopped(what, where=str(self.folder), todo=f"the same command{how} goes on from here")

    def close(self) -> None:
        """Stop watching and close the files of records. Closing twice is harmless."""
        self.watchdog.close()
        for file in (self.metrics, self.evaluations, self.trackers):
            file.close()
