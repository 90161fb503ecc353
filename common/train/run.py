"""One training run: what a recipe's loop talks to.

`open_run` resolves the launch, makes or reopens the run folder, opens the engine and restores the state; whatever
ends the run, the engine is closed and the manifest says how it ended.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from common import known_errors
from common.config import Config
from common.data.build_corpus import UNKNOWN_ALLOWED
from common.data.tokens import TokenDataset, TokenSplit, spread
from common.engine import Array, Backend, BackendInfo, StepStats
from common.errors import RankLost, RecipeError, Stopped, TrainingError, VerificationError
from common.files import disk_errors, sha256_file, utc_now, write_atomic
from common.model.bases import Base
from common.model.init import logit_variance
from common.signals import handled
from common.train import checkpoint, metrics
from common.train.checkpoint import Checkpoint
from common.train.console import LEVELS, Console, Progress, clock
from common.train.evaluate import HeldOut, from_rows, held_out
from common.train.generate import generate
from common.train.manifest import BaseFacts, DataFacts, Manifest, Resumption, code_facts
from common.train.metrics import JsonLines
from common.train.plan import AtEnd, Launch, Plan, make_plan, with_launch
from common.train.resume import Start, find_start
from common.train.schedule import learning_rate
from common.train.trackers import Trackers
from common.train.watchdog import Watchdog
from engines.registry import open_backend

MEMORISING_MARGIN = 0.2  # nats per token: two texts of one kind differ by less
BEGINS, ENDS = "run begins:", "run ends:"  # in train.log; without the second one, the process was killed
FIRST_LOSS_BAND = 0.1  # nats per token around the loss of untrained weights, besides what the text does to it


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
            with (
                recorded_end(manifest, start.folder, console, launch.at_end),
                catch_signals(console) as asked,
                open_backend(plan.hw, plan.config) as backend,
                contextlib.closing(Run(plan, start, backend, console, manifest, asked)) as run,
                saved_if_a_rank_dies(run),
            ):
                yield run


class Run:
    """The state of one run, ready at the step it starts from."""

    def __init__(
        self, plan: Plan, start: Start, backend: Backend, console: Console, manifest: Manifest, asked: list[str]
    ) -> None:
        self.plan, self.start, self.backend = plan, start, backend
        self.asked_to_stop = asked  # names of signals that came
        self.config: Config = plan.config
        self.dataset: TokenDataset = plan.dataset
        self.held_out: TokenSplit = plan.dataset.held_out.spread(plan.config.eval.max_rows)
        self.folder: Path = start.folder
        self.console, self.manifest = console, manifest
        self.checkpoints = self.folder / "checkpoints"
        self.progress = Progress(console, self.config.training.max_steps or 0, self.config.logging.log_every)
        self._restore()
        self.trackers = Trackers(self.config, self.folder, console.say)
        self.metrics = JsonLines(self.folder / "metrics.jsonl")
        self.evaluations = JsonLines(self.folder / "evaluations.jsonl")
        device = "CPU process" if plan.hw.is_cpu else "device"
        self.watchdog = Watchdog(self._stalled, backend.info.world, device, console.log)

    def _restore(self) -> None:
        """Put model, optimizer and records into the state of the step the run starts from."""
        plan, start = self.plan, self.start
        self.backend.build(plan.base.architecture)
        parameters = self.backend.load(plan.base.weights())
        check_parameters(parameters, plan)
        info = self.backend.info
        self.manifest.base_parameters = parameters
        self.console.say(
            f"{plan.base.name}: {parameters:,} parameters; {info.backend} on {info.device}, {info.threads} threads, "
            f"{info.precision} ({plan.reasons['precision']}); {info.reason}"
        )
        for note in (*start.notes, *other_versions(start, info)):
            self.console.say(note)
        self.notes_said = 0
        self.say_notes()
        self.trained_step = start.step  # the last one whose update is done
        self.records: list[dict[str, Any]] = []
        self.recent_losses: list[float] = []  # of the steps since the last evaluation
        self.trained_losses: list[tuple[float, int]] = []  # (held-out loss, step) of every evaluation but step 0's
        self.saved_step = 0
        self.owes_evaluation = False  # of the step it starts from: a rank's death cut it off, after the step was saved
        if start.checkpoint:
            self.backend.load_state(checkpoint.Tensors(start.checkpoint.folder))
            self.say_notes()
            self._restore_records(start.checkpoint)

    def say_notes(self) -> None:
        """Say what the engine has had to note since the last time, and put all of it into the manifest."""
        info = self.backend.info
        for note in info.notes[self.notes_said :]:
            self.console.say(note)
        self.notes_said = len(info.notes)
        self.manifest.backend = info
        self.manifest.save(self.folder)

    def _restore_records(self, found: Checkpoint) -> None:
        """Metrics and evaluations up to the checkpoint's step; a branch takes them over from its parent."""
        origin = found.folder.parent.parent
        kept = metrics.cut_back(origin / "metrics.jsonl", found.step, self.folder / "metrics.jsonl")
        if found.state["tokens_sha256"] == self.dataset.tokens_sha256:  # else they are of other rows
            rows = len(self.held_out)
            self.records = metrics.cut_back(
                origin / "evaluations.jsonl",
                found.step,
                self.folder / "evaluations.jsonl",
                keep=lambda record: len(record["nll"]) == rows,
            )
            if not self.records:
                self.console.say(f"earlier evaluations are of other rows than the {rows} of now: left out")
        self.trained_losses = [(from_rows(r["nll"], r["tokens"]).loss, r["step"]) for r in self.records if r["step"]]
        evaluated = max((record["step"] for record in self.records), default=0)
        self.recent_losses = [record["loss"] for record in kept if "loss" in record and record["step"] > evaluated]
        done = any("eval_loss" in record and record["step"] == found.step for record in kept)
        self.owes_evaluation = self.evaluation_due(found.step) and not done
        if found.folder.parent == self.checkpoints:
            self.saved_step = found.step

    @property
    def last_step(self) -> int:
        """The run's last step: max_steps, or the one it is ended at for want of progress."""
        return self.early_stop() or self.config.training.max_steps or 0

    # --- what the loop calls --------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 1; saves and raises Stopped at `--stop-at`, SIGTERM or SIGINT."""
        stop_at, start = self.plan.launch.stop_at, self.start.step
        if stop_at is not None and stop_at <= start:
            raise self._stopped(f"--stop-at {stop_at}: this run already stands after step {start}")
        if self.asked_to_stop and start == 0:
            raise KeyboardInterrupt  # nothing was trained, and nothing is there to go on from
        if self.asked_to_stop:
            raise self._stopped(f"stopped by {self.asked_to_stop[0]} before step {start + 1}")
        if self.owes_evaluation:
            self.evaluate(start)
        for step in range(start + 1, self.last_step + 1):
            self.watchdog.begin(step)
            yield step
            if self.asked_to_stop or step == stop_at:
                self.save(step)
                reason = self.asked_to_stop[0] if self.asked_to_stop else f"--stop-at {step}"
                raise self._stopped(f"stopped by {reason} after step {step}, which is saved")
            if step == self.last_step:
                return

    def _stalled(self, what: str) -> None:
        """On the watchdog's thread, just before it ends the process."""
        known = known_errors.match(what)
        error = TrainingError(f"{what}; {known.means}" if known else what, todo=known.answer if known else None)
        self.console.say(str(error))
        end_of_run(self.manifest, self.folder, self.console, f"failed: {error.what}", str(error))

    def _stopped(self, what: str) -> Stopped:
        launch = self.plan.launch
        how = "" if launch.resume == "auto" else ", with --resume auto in place of what was given,"
        how += "" if launch.stop_at is None else ", without --stop-at,"
        return Stopped(what, where=str(self.folder), todo=f"the same command{how} goes on from here")

    def _say_if_ended_early(self) -> None:
        step = self.last_step
        if step == self.config.training.max_steps:
            return
        self.manifest.ended_early = step
        self.manifest.save(self.folder)
        self.console.say(
            f"ended after step {step} of {self.config.training.max_steps}: the held-out loss did not fall in "
            f"{self.config.eval.patience} evaluations; it was lowest after step {self.best_step()}"
        )

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config.training)

    def record(self, step: int, stats: StepStats) -> None:
        """One line of metrics.jsonl, and the live line."""
        self.watchdog.end(stats.seconds)
        if step == 1 and self.plan.base.initial:
            gate = check_first_loss(stats.loss, self.plan.base, self.dataset.train.arrays.ids)
            self.console.say(gate)
            self.manifest.first_loss = gate
            self.manifest.save(self.folder)
        if step == self.start.step + 1:  # after its first step an engine may know more: that its devices agree
            self.say_notes()
        self.trained_step = step
        self.recent_losses.append(stats.loss)
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
        self.watchdog.end()
        self.console.status(f"evaluating after step {step} ...")
        started = time.perf_counter()
        rows = held_out(self.backend, self.held_out)
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
            **self._bits_per_byte(rows),
        }
        entry = {
            "step": step,
            "nll": rows.nll.tolist(),
            "tokens": rows.tokens.tolist(),
            "samples": self.samples(),
        }
        self.evaluations.write(entry)
        self.records.append(entry)
        self.trained_losses += [(rows.loss, step)] if step else []
        self.metrics.write(record)
        self.trackers.write(record)
        write_atomic(self.folder / "samples.md", samples_markdown(self.records))
        self.console.say(self._evaluation_line(step, rows, time.perf_counter() - started))
        self._say_if_memorising(step)

    def samples(self) -> list[dict[str, Any]]:
        """The model's answers to the evaluation prompts now, by the config's sampling."""
        tokenizer, system, prompts = self.plan.tokenizer, self.config.data.system_prompt, self.plan.prompts
        ids = generate(
            self.backend,
            [tokenizer.prompt_ids(prompt, system) for prompt in prompts],
            self.config.eval,
            eos_ids=tokenizer.eos_ids,
            vocab_size=tokenizer.vocab_size,
            never_ids=tokenizer.never_ids,
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
        if bits := self._bits_per_byte(rows):
            line += f"; {bits['bits_per_byte']:.4f} bits per byte (unigram {self._unigram_bits():.4f})"
        return f"{line} ({clock(seconds)})"

    def _bits_per_byte(self, rows: HeldOut) -> dict[str, float | None]:
        """For a corpus: what makes its loss comparable between tokenizers; not where much of its text is unknown."""
        info = self.dataset.info
        if "held_out_bytes" not in info or info["unknown"] > UNKNOWN_ALLOWED:
            return {}
        bits, error = rows.bits_per_byte(self._of_evaluated("held_out_bytes"))
        return {"bits_per_byte": bits, "bits_per_byte_se": error if len(rows.nll) > 1 else None}

    def _unigram_bits(self) -> float:
        """What the frequencies of the training tokens alone score on the same text."""
        return math.fsum(self._of_evaluated("unigram_nll")) / math.log(2) / sum(self._of_evaluated("held_out_bytes"))

    def _of_evaluated(self, name: str) -> list[float]:
        """A figure of every evaluated row, out of what is stored with the data set."""
        values = self.dataset.info[name]
        return [values[row] for row in spread(len(values), self.config.eval.max_rows)]

    def _say_if_memorising(self, step: int) -> None:
        """Of a corpus, whose held-out text is of one kind with the rest; rows held out by topic may be harder."""
        recent, self.recent_losses = self.recent_losses, []
        if not self.config.data.corpus:
            return
        floor = min((loss for loss, _ in self.trained_losses), default=math.inf)
        if recent and (mean := math.fsum(recent) / len(recent)) < floor - MEMORISING_MARGIN:
            self.console.say(
                f"memorising now: the mean training loss of the last {len(recent)} steps, {mean:.4f}, is more than "
                f"{MEMORISING_MARGIN} below the lowest held-out loss so far, {floor:.4f} (step {step})"
            )

    def base_evaluation(self) -> HeldOut | None:
        """The untrained model on the held-out rows, as evaluated at step 0."""
        first = next((r for r in self.records if r["step"] == 0), None)
        if first is None or len(first["nll"]) != len(self.held_out):  # a branch onto other data
            return None
        return from_rows(first["nll"], first["tokens"])

    def save(self, step: int) -> None:
        """The checkpoint of `step`, once."""
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
        best = [self.best_step()] if self.config.checkpoint.keep_best else []
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep_last, best, newest=step)
        self.console.say(f"saved step {step}", "DEBUG")

    def best_step(self) -> int:
        """The trained step with the lowest held-out loss so far; 0 before any was evaluated."""
        return min(self.trained_losses, default=(0.0, 0))[1]

    def early_stop(self) -> int | None:
        """The step that `eval_config.patience` ends the run at, by its evaluations; none before the step of the start.

        A resume may have set another patience; what was trained is not untrained.
        """
        patience, best, since = self.config.eval.patience, math.inf, 0
        for loss, step in self.trained_losses:
            best, since = (loss, 0) if loss < best else (best, since + 1)
            if patience is not None and since >= patience and step >= self.start.step:
                return step
        return None

    def evaluation_due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == self.last_step or (every > 0 and step % every == 0)

    def checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        best = self.config.checkpoint.keep_best and self.evaluation_due(step) and self.best_step() == step
        return step == self.last_step or (every > 0 and step % every == 0) or best

    def finish(self) -> None:
        """After the loop: what a run killed after its last step still lacks."""
        self._say_if_ended_early()
        self.evaluate(self.last_step)
        self.save(self.last_step)
        if self.asked_to_stop:
            raise self._stopped(f"stopped by {self.asked_to_stop[0]} after the last step, before the export")
        self.close()
        self.manifest.trained = utc_now()
        self.manifest.metrics_sha256 = sha256_file(self.folder / "metrics.jsonl")
        self.manifest.peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # it is in KiB
        self.manifest.replicas = self.backend.replicas() if self.backend.info.world > 1 else None
        self.manifest.save(self.folder)

    def close(self) -> None:
        self.watchdog.close()
        for file in (self.metrics, self.evaluations, self.trackers):
            file.close()


def keep_decisions(plan: Plan, start: Start) -> Plan:
    """On resume, decisions that fix the bits stay as they were taken: compile, and threads where not configured."""
    if start.checkpoint is None:
        return plan
    plan = with_launch(plan, **{"device.compile": "always" if start.checkpoint.state["compiled"] else "never"})
    same_world = start.checkpoint.state.get("world", 1) == plan.config.device.devices
    if plan.config.device.threads is None and same_world:
        plan = with_launch(plan, **{"device.threads": start.checkpoint.state["threads"]})
    return plan


def other_versions(start: Start, info: BackendInfo) -> list[str]:
    """What the checkpoint was made with that this process does not have: its bits then end there."""
    if start.checkpoint is None:
        return []
    state = start.checkpoint.state
    then_facts = {"backend": state.get("backend", info.backend), "device": state.get("device", info.device)}
    then = {**then_facts, "compiled": state["compiled"], **state["versions"]}
    now = {"backend": info.backend, "device": info.device, "compiled": info.compiled, **info.versions}
    both = [name for name in then if name in now]
    lines = [f"changed: {name}: {then[name]} -> {now[name]}" for name in both if then[name] != now[name]]
    return [*lines, "not bit-exact from here"] if lines else []


def check_parameters(found: int, plan: Plan) -> None:
    expected = plan.base.parameters
    if expected is not None and found != expected:
        raise AssertionError(f"the built model has {found:,} parameters, {plan.base.name} should have {expected:,}")


def check_first_loss(loss: float, base: Base, ids: Array) -> str:
    """The gate of a model that starts from random weights: before it learns, it knows nothing.

    Its first loss is that of guessing among all ids, ln(vocabulary), and half the variance of its logits more (the mean
    of ln(sum of exp) over normal logits). A text's frequent tokens, of `ids`, draw logits of their own: their mean
    strays by sqrt(variance x sum of p^2), of which three are allowed. Weights that are not the initial ones, a loss
    that is a sum, a mask of padding move it out of the band. Returns what was found; raises VerificationError.
    """
    assert base.initial is not None, "a pretrained model knows something"
    vocabulary, variance = base.architecture["vocab_size"], logit_variance(base.initial.initializer, base.architecture)
    shares = np.bincount(ids, minlength=vocabulary) / len(ids)
    expected = math.log(vocabulary) + variance / 2
    band = FIRST_LOSS_BAND + 3 * math.sqrt(variance * float((shares**2).sum()))
    found = f"the first loss is {loss:.4f}; untrained weights give {expected:.2f} ± {band:.2f}"
    if not abs(loss - expected) <= band:
        raise VerificationError(
            found,
            where="step 1",
            todo="do not trust this engine: report it with the manifest; recipe data show prints what it was given",
        )
    return found


def open_manifest(plan: Plan, start: Start) -> Manifest:
    """The manifest of a new run, or that of the run that goes on, with the resumption noted."""
    launch, config, environment = plan.launch, plan.config, code_facts(plan.nodes)
    event = Resumption(
        at=utc_now(),
        step=start.step,
        command=list(launch.command),
        overrides=list(launch.overrides),
        config_digest=config.config_digest(),
        notes=start.notes,
        **environment,
    )
    if start.manifest is not None:
        manifest = start.manifest
        keep_config(plan, start)
        manifest.exit_reason, manifest.end = "running", None
        manifest.resumed = [*manifest.resumed, event]
        manifest.save(start.folder)
        return manifest
    write_atomic(start.folder / "config.resolved.yaml", config.to_yaml())
    if plan.base.initial:  # a tokenizer of this corpus, and the run must outlive the cache
        shutil.copytree(plan.base.folder, start.folder / "tokenizer")
    base = plan.base
    manifest = Manifest(
        run=start.folder.name,
        recipe=config.recipe,
        recipe_dir=str(launch.recipe_dir),
        command=list(launch.command),
        overrides=list(launch.overrides),
        start=utc_now(),
        end=None,
        exit_reason="running",
        parent=start.parent,
        resumed=[event] if start.parent else [],
        hw=plan.hw.name,
        reasons=plan.reasons,
        seed=config.training.seed,
        steps=config.training.max_steps or 0,
        config_digest=config.config_digest(),
        training_digest=plan.training_digest,
        base=BaseFacts(name=base.name, identity=base.identity, origin=base.origin, licence=base.licence),
        data=data_facts(plan.dataset),
        tokenizer_sha256=plan.tokenizer.sha256,
        **environment,
    )
    manifest.save(start.folder)
    return manifest


def data_facts(data: TokenDataset) -> DataFacts:
    """Return what a run is trained on, as its manifest has it."""
    return DataFacts(
        source_key=data.source_key,
        tokens_sha256=data.tokens_sha256,
        length=data.length,
        rows={name: len(split) for name, split in data.splits.items()},
        tokens={name: split.tokens for name, split in data.splits.items()},
        supervised_share=data.info.get("supervised_share"),
        rows_cut=len(data.info.get("cut", [])),
        corpus=data.info.get("corpus"),
    )


def keep_config(plan: Plan, start: Start) -> None:
    """On resume, config.resolved.yaml says what runs from here; the one until now is kept beside it if it differs."""
    path, text = start.folder / "config.resolved.yaml", plan.config.to_yaml()
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        path.rename(path.with_name(f"config.until-step-{start.step}.{int(time.time())}.yaml"))
        write_atomic(path, text)


@contextlib.contextmanager
def recorded_end(manifest: Manifest, folder: Path, console: Console, at_end: AtEnd | None) -> Iterator[None]:
    """Write into the manifest, and the log, how the run ended; `at_end` then finds the manifest as it stays."""
    reason, text = "done", None
    console.say(f"{BEGINS} process {os.getpid()}", "DEBUG")
    try:
        yield
    except Stopped as stop:
        reason = f"stopped: {stop.what}"
        raise
    except RecipeError as error:
        reason, text = f"failed: {error.what}", str(error)
        console.say(text, "DEBUG")
        raise
    except BaseException as error:
        reason = f"failed: {type(error).__name__}: {error}"
        raise
    finally:
        end_of_run(manifest, folder, console, reason, text)
        if at_end:
            at_end(folder, console.say)


def end_of_run(manifest: Manifest, folder: Path, console: Console, reason: str, error: str | None) -> None:
    with contextlib.suppress(OSError):  # a full disk must not hide why the run ended
        console.say(f"{ENDS} {reason}", "DEBUG")
        manifest.exit_reason, manifest.error, manifest.end = reason, error, utc_now()
        manifest.save(folder)


@contextlib.contextmanager
def saved_if_a_rank_dies(run: Run) -> Iterator[None]:
    """Where another process of the run is lost, nothing of what was trained is: no update is done without all."""
    try:
        yield
    except RankLost as lost:
        step = run.trained_step
        if step:
            run.save(step)
        raise RankLost(
            lost.what,
            where=f"{run.folder}, after step {step}{', which is saved' if step else ': nothing to save yet'}",
            todo="the same command goes on from there",
        ) from lost


@contextlib.contextmanager
def catch_signals(console: Console) -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT, which end the run where nothing is lost; a second one ends the process at once."""
    asked: list[str] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        with contextlib.suppress(RuntimeError):  # the signal came while this very file was being written
            console.say(f"{asked[0]}: saving as soon as this step is over; once more to stop without saving")

    with handled((signal.SIGTERM, signal.SIGINT), handler):
        yield asked


def samples_markdown(records: list[dict[str, Any]]) -> str:
    """samples.md: under each prompt, what the model answered after each evaluated step."""
    lines = ["# Samples", ""]
    for prompt in [sample["prompt"] for sample in records[-1]["samples"]]:
        lines += [f"## {' '.join(prompt.split())}", ""]
        for record in records:
            name = "untrained" if record["step"] == 0 else f"step {record['step']}"
            answers = [sample["answer"] for sample in record["samples"] if sample["prompt"] == prompt]
            for answer in answers:
                lines += [f"**{name}**", "", "> " + (answer.replace("\n", "\n> ") or "(nothing)"), ""]
    return "\n".join(lines)
