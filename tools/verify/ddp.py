"""`recipe verify ddp`: is data parallel the same training, and what does it gain?

One device and N train the same steps from the same weights on the same batches. Their losses must agree at every step,
all N must hold the same parameters after every step, and with the summing of gradients turned off both must be noticed:
a check that cannot fail would prove nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from common import config as configs
from common.config import Config
from common.data.tokens import TokenDataset
from common.engine import Backend
from common.errors import UsageError, VerificationError
from common.files import utc_now
from common.model.bases import Base
from common.train.evaluate import HeldOut, held_out
from common.train.launch import Launch
from common.train.plan import prepare
from common.train.schedule import learning_rate
from engines.registry import engine_for
from tools.checklist import CheckEnded, ChecklistLine, failed, go_through, hold, silent, to_json
from tools.containers import launcher
from tools.containers.spec import named_paths
from tools.data.fetch import fetch_pinned
from tools.launch.processes import in_processes
from tools.launch.resolve import mesh_override, resolve
from tools.machine import detect, lease
from tools.recipes import find_recipe, load_dataset
from tools.results.record import machine_of, refuse_changed_tree, write

ON_A_CPU = "cpu-x2"
CONTROL_STEPS = 2  # the loss of step 1 is computed before anything is summed: the second is the first that can differ
TIMED = 4  # steps of each kind, in turns; the first of a curve never counts, as it may compile
HELD_OUT_ROWS = 64  # as many as an export is checked on (tools/export/check.py)
# Nats between the losses of one device and N, at each of the first STEADY steps. fp32: sums in another order, through
# as many updates. bf16: each device rounds its part of a gradient to 2^-9 before the parts are summed, and a board
# rounds the loss as well.
BOUND = {"fp32": 1e-4, "bf16-mixed": 1e-3, "bf16": 3e-2}
NORM_BOUND = {"fp32": 1e-3, "bf16-mixed": 2e-2, "bf16": 0.1}  # relative; the same reasons
STEADY = 8


@dataclass
class Curve:
    """What some devices did in some steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Of the gradients: AdamW forgives any factor on them, so that the losses would not show one."""
    alike: list[bool] = field(default_factory=list)
    """After each step: do all devices hold the same parameters?"""
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    held_out: HeldOut | None = None
    machine: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Return the median over the steps but the first, which may compile."""
        return statistics.median(t / s for t, s in zip(self.tokens[1:], self.seconds[1:], strict=True))


class Comparison:
    """One device beside all of a launch's mesh; each curve is trained when it is first asked for."""

    def __init__(self, launch: Launch, steps: int, say: Callable[[str], None]) -> None:
        self.launch, self.hw, self.steps = launch, launch.hw, steps
        self.engine = engine_for(self.hw)
        self.config = self.config_for(None)
        self.devices = self.config.device.devices
        # The larger mesh first: a board's library looks at how its devices are wired only once, at the first touch.
        self.engine.refuse_launch(self.hw, self.config)
        fetch_pinned(launch.config, launch.recipe_dir, say)
        prepared = prepare(launch, load_dataset(launch.recipe_dir)[0])
        self.base: Base = prepared[0]
        self.dataset: TokenDataset = prepared[2]

    def config_for(self, devices: int | None, **values: Any) -> Config:
        """Return the recipe's config for some of the devices, or for all of them."""
        config, launch = self.launch.config, self.launch
        if devices:
            config = configs.load(launch.recipe_dir, self.hw, (*launch.overrides, *mesh_override(devices)), self.steps)
        if config.training.precision == "auto":
            values["training.precision"] = self.engine.precision_for(self.hw)[0]
        # One thread a process unless it is configured: N processes stand beside one of the same size, not N times it.
        threads = config.device.threads or 1 if self.hw.is_cpu else None
        return config.with_values(**{"device.threads": threads, "device.compile": "never", **values})

    @functools.cached_property
    def one(self) -> Curve:
        return self.train(self.config_for(1), self.steps, evaluated=True)

    @functools.cached_property
    def several(self) -> Curve:
        return self.train(self.config_for(None), self.steps, evaluated=True)

    @functools.cached_property
    def control(self) -> Curve:
        return self.train(self.config_for(None), CONTROL_STEPS, grad_sync=False)

    def train(self, config: Config, steps: int, *, grad_sync: bool = True, evaluated: bool = False) -> Curve:
        """Train from the start, and evaluate at the end where that is asked for."""
        curve = Curve()
        with self.opened(config) as backend:
            backend.set_grad_sync(grad_sync)
            curve.machine = machine_of(backend.info)
            for step in range(1, steps + 1):
                self.step(backend, config, step, curve)
                curve.alike.append(len(set(backend.replicas())) == 1)
            if evaluated:
                curve.held_out = held_out(backend, self.dataset.held_out.spread(HELD_OUT_ROWS))
        return curve

    @contextlib.contextmanager
    def opened(self, config: Config) -> Iterator[Backend]:
        """Open the engine of `config` with the base's weights."""
        with self.engine.open_backend(self.hw, config) as backend:
            backend.build(self.base.architecture)
            backend.load(self.base.weights())
            yield backend

    def step(self, backend: Backend, config: Config, step: int, curve: Curve, batches: int = 1) -> None:
        """Train one step on `batches` times the batch, in micro-batches of the same size; add it to the curve."""
        batch = self.dataset.train.batch(step, config.training.seed, config.training.batch_size * batches)
        micro_batches = batch.split(config.accumulation * batches)
        stats = backend.train_step(micro_batches, learning_rate(step, config.training), step)
        curve.losses.append(stats.loss)
        curve.norms.append(stats.grad_norm)
        curve.seconds.append(stats.seconds)
        curve.tokens.append(stats.tokens)

    def speed(self, weak: bool) -> dict[str, float]:
        """Measure throughput by number of devices, in tokens/s, and what a step of all of them is made of."""
        synced, alone = Curve(), Curve()
        config = self.config_for(None)
        with self.opened(config) as backend:
            for step in range(1, 2 * TIMED + 3, 2):  # in turns, so that the machine's moods fall on both
                for curve, on in ((synced, True), (alone, False)):
                    backend.set_grad_sync(on)
                    self.step(backend, config, step, curve, self.devices if weak else 1)
        single = self.one if not weak else self.train(self.config_for(1), TIMED)
        whole, local = (statistics.median(curve.seconds[1:]) for curve in (synced, alone))
        ratio = synced.tokens_per_second / single.tokens_per_second
        found = {
            "one": single.tokens_per_second,
            "all": synced.tokens_per_second,
            "ratio": ratio,
            "efficiency": ratio / self.devices,
            "step_seconds": whole,
            "compute_seconds": local,
            "all_reduce_share": max(0.0, 1 - local / whole),
        }
        if self.hw.is_cpu and not weak:
            threads = self.devices * (self.config.device.threads or 1)
            wide = self.train(self.config_for(1, **{"device.threads": threads}), TIMED)
            found["one_process_all_threads"] = wide.tokens_per_second
        return found

    def entry(self, speed: dict[str, float]) -> dict[str, Any]:
        """Return what results.yaml is to hold of this comparison; see tools/results/schema.py."""
        assert self.several.held_out is not None
        rows, last = self.several.held_out, len(self.several.losses)
        return {
            "board": self.hw.name,
            "evidence": "measured",
            "what": "recipe verify ddp: the first steps of the recipe, on all devices and on one",
            "overrides": list(self.launch.overrides),
            "steps": self.steps,
            "date": datetime.date.fromisoformat(utc_now()[:10]),
            "commit": self.launch.git_commit,
            "machine": self.several.machine,
            "loss_at": {1: self.several.losses[0], last: self.several.losses[-1]},
            "held_out": {"step": last, "loss": rows.loss, "standard_error": rows.standard_error},
            "tokens_per_second": round(speed["all"], 1),
            "scaling": {"devices": self.devices, **{k: float(f"{v:.4g}") for k, v in speed.items() if k != "all"}},
        }


def losses(found: Comparison) -> str:
    apart = [abs(a - b) for a, b in zip(found.one.losses, found.several.losses, strict=True)]
    step, allowed = tightest(apart, BOUND[precision_of(found)])
    first, last = found.one.losses[0], found.one.losses[-1]
    evidence = f"{apart[step - 1]:.2e} nats apart at step {step} of {len(apart)} ({first:.4f} to {last:.4f})"
    return hold(apart[step - 1] <= allowed, f"{evidence}; allowed {allowed:.2g} there in {precision_of(found)}")


def gradients(found: Comparison) -> str:
    apart = [abs(b / a - 1) for a, b in zip(found.one.norms, found.several.norms, strict=True)]
    step, allowed = tightest(apart, NORM_BOUND[precision_of(found)])
    return hold(
        apart[step - 1] <= allowed, f"norms {apart[step - 1]:.2%} apart at step {step}; allowed {allowed:.1%} there"
    )


def tightest(apart: list[float], bound: float) -> tuple[int, float]:
    """Return the step, from 1, that comes nearest to what is allowed there or goes furthest beyond, and what that is.

    `bound` for the first STEADY steps, then as many times more as the root of the steps: roundings of their own at each
    step add up like that. So a long comparison fails no sound board, and its first steps are judged as a short one's.
    Published (tsingletaryTT/tt-tnt, CLAUDE.md, August 2026): one chip and four at most 0.048 nats apart over 300 steps,
    where 0.18 are allowed here. On the double of an n300, 100 steps: 0.005 nats, and norms of gradients 8.7 % apart.
    """
    allowed = [bound * max(1.0, step / STEADY) ** 0.5 for step in range(1, len(apart) + 1)]
    step = max(range(len(apart)), key=lambda at: apart[at] / allowed[at])
    return step + 1, allowed[step]


def precision_of(found: Comparison) -> str:
    return found.config.training.precision


def replicas(found: Comparison) -> str:
    """Check that all devices hold the same parameters after every step."""
    apart = [step for step, alike in enumerate(found.several.alike, 1) if not alike]
    if apart:
        raise CheckEnded("fail", f"the parameters of the {found.devices} devices differ after step {apart[0]}")
    return f"the same bits on {found.devices} devices after each of {len(found.several.alike)} steps"


def held_out_loss(found: Comparison) -> str:
    """Check that the held-out losses of one device and of all are closer than their standard error over rows."""
    one, several = found.one.held_out, found.several.held_out
    assert one is not None
    assert several is not None
    apart, floor = several.loss - one.loss, one.standard_error
    evidence = f"{several.loss:.4f} and {one.loss:.4f}, {apart:+.2e} apart"
    return hold(abs(apart) < floor, f"{evidence}; the standard error over {len(one.nll)} rows is {floor:.4f}")


def control(found: Comparison) -> str:
    """Check that devices which do not sum their gradients are seen to hold different parameters."""
    noticed = not found.control.alike[0]
    apart = abs(found.control.losses[-1] - found.one.losses[CONTROL_STEPS - 1])
    evidence = f"the devices' parameters {'differ' if noticed else 'are alike'} after step 1"
    return hold(noticed, f"{evidence}; the loss of step {CONTROL_STEPS} alone shows {apart:.2e}")


LINES = (
    ChecklistLine("losses", "all devices together give one device's losses", losses),
    ChecklistLine("gradients", "and one device's gradients", gradients),
    ChecklistLine("replicas", "and hold the same parameters after every step", replicas),
    ChecklistLine("held-out", "and the same held-out loss, within the noise", held_out_loss, ("losses",)),
    ChecklistLine("control", "without summing the gradients this would be noticed", control),
)


def run(
    *,
    hw: str | None,
    name: str,
    world: int | None,
    steps: int,
    weak: bool,
    record: bool,
    overrides: tuple[str, ...],
    container: bool | None,
    as_json: bool,
) -> int:
    """Verify the recipe `name` on a board, in its image or here, or on processes of this CPU; return the exit code."""
    recipe_dir = find_recipe(name)
    if record and weak:
        raise UsageError("only strong scaling is recorded", where="--record", todo="leave --weak out")
    if record:
        refuse_changed_tree()
    board = ON_A_CPU if detect.choose(hw).hardware.is_cpu else hw
    launch = resolve(recipe_dir, hw=board, overrides=overrides, steps=steps, world=world)
    if launch.config.device.devices == 1:
        raise UsageError(f"{launch.hw.name} has one device", where="--hw", todo="choose a board of several, or cpu-x2")
    say = silent if as_json else click.echo
    if launcher.wanted(container, launch.hw):
        if record:
            raise UsageError("a container cannot write the checkout", where="--record", todo="add --no-container")
        fetch_pinned(launch.config, launch.recipe_dir, say)
        words = ["verify", "ddp", "--recipe", str(recipe_dir), "--hw", launch.hw.name, "--steps", str(steps)]
        words += [word for change in launch.overrides for word in ("--set", change)]
        words += ["--weak"] * weak + ["--json"] * as_json
        readable = (recipe_dir, *named_paths(launch))
        return launcher.run_words(words, launch.hw, launch.nodes, functools.partial(click.echo, err=True), readable)
    with lease.of_board(launch.hw, launch.nodes, "verify ddp"):
        return in_processes(launch, lead, say, steps=steps, weak=weak, record=record, as_json=as_json)


def lead(launch: Launch, *, steps: int, weak: bool, record: bool, as_json: bool) -> None:
    """Run the checklist, then measure where no line failed; in the one process of a board, or in rank 0 of several.

    Raises VerificationError if a line fails.
    """
    say = silent if as_json else click.echo
    found = Comparison(launch, steps, say)
    name, devices = found.config.recipe, found.devices
    say(f"data parallel on {found.hw.title}: {name}, batch {found.config.training.batch_size}")
    results = go_through(LINES, found, say)
    bad, speed = failed(results), dict[str, float]()
    if not bad:
        speed = found.speed(weak)
        say(shown(speed, found, weak))
        if record:
            write(launch.recipe_dir, found.entry(speed), say)
    if as_json:
        scaling = "weak" if weak else "strong"
        click.echo(to_json(results, hw=found.hw.name, devices=devices, recipe=name, scaling=scaling, speed=speed))
    if bad:
        raise VerificationError(
            f"data parallel on {found.hw.name} is not the training of one device: {', '.join(bad)}",
            where=f"{name}, mesh [1, {devices}]",
            todo="do not train on several devices here; train with --world 1",
        )


def shown(speed: dict[str, float], found: Comparison, weak: bool) -> str:
    """Return the figures as lines."""
    kind = "weak scaling, a batch for each device" if weak else "strong scaling, one batch for all"
    rate = f"{speed['all']:,.0f} tokens/s on {found.devices} devices, {speed['one']:,.0f} on one"
    gain = f"{speed['ratio']:.2f} times as fast, {speed['efficiency']:.0%} of each device"
    step = f"a step of {speed['step_seconds']:.2f} s: {speed['compute_seconds']:.2f} s without the summing"
    exposed = f"which adds {speed['all_reduce_share']:.1%} where it does not hide behind the computing"
    lines = [f"{kind}: {rate}: {gain}", f"{step}, {exposed}"]
    if "one_process_all_threads" in speed:
        lines.append(f"one process with the threads of all: {speed['one_process_all_threads']:,.0f} tokens/s")
    return "\n".join(lines)
