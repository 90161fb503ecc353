"""`recipe grade`: the figures of a run beside those that results.yaml has for the same training.

Where lock, CPU class, threads and compilation are those of the entry, a CPU run must have the entry's bits. Elsewhere
the entry's band decides. Figures that somebody else published are shown, and can warn; they fail nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import config as configs
from common import hardware
from common.config import Config
from common.errors import UsageError, VerificationError
from engines.registry import engine_for
from tools.results.schema import FILE, Measured, Numbers, is_serving, load
from tools.runs.folder import RunFolder, at_step, read_run

FORMAT = 1  # of the JSON
UNGRADED = "ungraded"  # the verdict on a run of which nothing is recorded
Verdict = Literal["pass", "warn", "fail", "not compared"]
ORDER: tuple[Verdict, ...] = ("not compared", "pass", "warn", "fail")
# Shares of the recorded speed that may be missing, and of the recorded memory that may be added. A choice: repeated
# runs on a quiet machine differ by a few per cent in speed, and a step that is 20 % slower must fail; the peak of the
# same golden run was seen to differ by 12 %.
SLOWER = {"warn": 0.08, "fail": 0.15}
LARGER = {"warn": 0.15, "fail": 0.30}
SECTIONS = ("training_config.", "model_config.", "data_config.")
# What identifies a training's length, batch and split is compared on its own; paths differ from machine to machine.
NOT_LISTED = (
    "training_config.max_steps",
    "training_config.num_epochs",
    "training_config.batch_size",
    "training_config.micro_batch_size",
    "model_config.preset",
    "model_config.gradient_checkpointing",
    "data_config.source",
    "data_config.corpus",
    "data_config.num_proc",
)
# What a run decides by itself where the recipe leaves it open.
DECIDED = ('training_config.precision: "auto"', 'model_config.lora.tie_groups: "build"')


class Ungraded(UsageError):
    """Nothing is recorded of this training. `recorded` is what results.yaml has."""

    def __init__(self, run: RunFolder, recorded: Sequence[Numbers], path: Path) -> None:
        there = [f"{entry.board}: {entry.what}" for entry in recorded] or ["none"]
        super().__init__(
            f"nothing is recorded for this training on {run.manifest.hw} ({run.manifest.steps} steps); recorded: "
            + "; ".join(there),
            where=str(path),
            todo="grade a run of a recorded training, or record this one: recipe grade RUN --record",
        )
        self.recorded = recorded

    def as_json(self, run: str) -> str:
        known = [{"board": entry.board, "evidence": entry.evidence, "what": entry.what} for entry in self.recorded]
        return json.dumps({"format": FORMAT, "run": run, "verdict": UNGRADED, "recorded": known}, indent=1)


@dataclass(frozen=True)
class GradeLine:
    """The verdict on one figure, with the reason in words."""

    figure: str
    verdict: Verdict
    says: str


@dataclass(frozen=True)
class Grade:
    """What a run was held against, and each figure's verdict."""

    run: RunFolder
    entry: Numbers
    lines: tuple[GradeLine, ...]

    @property
    def verdict(self) -> Verdict:
        return max((line.verdict for line in self.lines), key=ORDER.index)


def print_grade(folder: Path, as_json: bool, say: Callable[[str], None]) -> None:
    """Print the grade of a run. Raises Ungraded where nothing is recorded for it, VerificationError for a fail."""
    try:
        found = grade(read_run(folder, strict=True))
    except Ungraded as error:
        if as_json:
            say(error.as_json(folder.resolve().name))
        raise
    if as_json:
        lines = [dataclasses.asdict(line) for line in found.lines]
        entry = found.entry.model_dump(mode="json", exclude_none=True)
        verdict = {"verdict": found.verdict, "lines": lines, "entry": entry}
        say(json.dumps({"format": FORMAT, "run": found.run.folder.name, **verdict}, indent=1))
    else:
        say(f"{found.run.folder.name} beside: {described(found.entry)}")
        if found.entry.band:
            say(f"bands: {found.entry.band.origin}")
        width = max(len(line.figure) for line in found.lines)
        for line in found.lines:
            say(f"{line.verdict.upper():12}  {line.figure:{width}}  {line.says}")
    if failed := [line.figure for line in found.lines if line.verdict == "fail"]:
        raise VerificationError(
            f"graded fail: {', '.join(failed)}",
            where=str(found.run.folder),
            todo="find what changed; if the change is wanted, record the new figures: recipe grade RUN --record",
        )


def described(entry: Numbers) -> str:
    origin = f"{entry.date}, commit {entry.commit[:7]}" if isinstance(entry, Measured) else entry.source
    return f"{entry.what} ({entry.evidence}: {origin})"


def grade(run: RunFolder) -> Grade:
    """Return a run's grade by the entry of its training. Raises Ungraded where results.yaml has none."""
    entry, config = choose(run)
    lines = (*settings(run, entry, config), *losses(run, entry), *held_out(run, entry), *costs(run, entry))
    return Grade(run, entry, lines)


def choose(run: RunFolder) -> tuple[Numbers, Config]:
    """Return the entry of the run's board, model, data, batch and length, and its config; ours before others'.

    Of several, the one whose other settings differ least. Whether those may differ, the figures say.
    """
    recipe = run.recipe_dir
    results = load(recipe)
    found = [
        (not isinstance(entry, Measured), len(differences(config, run.config)), place, entry, config)
        for place, entry in enumerate(results.numbers)
        if (config := config_of(entry, recipe)) is not None and is_of(entry, config, run)
    ]
    if not found:
        raise Ungraded(run, results.numbers, recipe / FILE)
    _, _, _, entry, config = min(found, key=lambda item: item[:3])
    return entry, config


def config_of(entry: Numbers, recipe: Path) -> Config | None:
    """Return what the entry's overrides mean in the recipe of now; None where they no longer resolve."""
    overrides, steps = (entry.overrides, entry.steps) if isinstance(entry, Measured) else ((), None)
    try:
        return ties_named(configs.load(recipe, hardware.get(entry.board), overrides, steps))
    except UsageError:
        return None


def ties_named(config: Config) -> Config:
    """Return `config` with the groups that `tie_groups: build` means on a CPU; a board has the ones of its build."""
    hw, lora = hardware.get(config.hw), config.model.lora
    if lora is None or lora.tie_groups != "build" or not hw.is_cpu:
        return config
    return config.with_values(**{"model.lora.tie_groups": engine_for(hw).tie_groups_for(hw)[0]})


def is_of(entry: Numbers, config: Config, run: RunFolder) -> bool:
    length = config.training.max_steps or (entry.held_out.step if entry.held_out else max(entry.loss_at, default=0))
    same_length = length in (run.manifest.steps, run.last_step)
    trained = entry.board == run.manifest.hw and not is_serving(entry)
    return trained and same_length and subject(config) == subject(run.config)


def subject(config: Config) -> tuple[Any, ...]:
    """Return what is trained on what: with another of these, figures say nothing about each other."""
    model, data = config.model, config.data
    source = Path(data.corpus or data.source or "").name
    unlike = None if hardware.get(config.hw).is_cpu else {"tie_groups"}  # a board has those of its build and no others
    lora = model.lora and model.lora.model_dump(exclude=unlike)
    return model.init, model.base, model.architecture, lora, source, data.tokenizer, config.training.batch_size


def differences(recorded: Config, run: Config) -> list[str]:
    """Return the settings in which a run's training differs from the recorded one."""
    return [
        line
        for line in recorded.changes(run)
        if line.startswith(SECTIONS) and not line.startswith((*NOT_LISTED, *DECIDED))
    ]


def settings(run: RunFolder, entry: Numbers, config: Config) -> Iterator[GradeLine]:
    """Yield the verdict on the settings: other ones, other tokens and images explain other figures."""
    lines = differences(config, run.config)
    exact = entry.exact if isinstance(entry, Measured) else None
    if exact and exact.tokens_sha256 != run.manifest.data.tokens_sha256:
        lines.append("the tokens of the data set")
    if isinstance(entry, Measured) and entry.image != run.image:
        lines.append(f"the image: {entry.image or 'none'} -> {run.image or 'none'}")
    yield GradeLine(
        "settings", "warn" if lines else "pass", f"differ: {'; '.join(lines)}" if lines else "the same training"
    )


def other_environment(run: RunFolder, entry: Numbers) -> list[str]:
    """Return why the entry's bits are not to be expected of this run; empty where they are."""
    if not isinstance(entry, Measured) or entry.exact is None:
        return ["the entry has no bits"]
    wanted = entry.exact.model_dump()
    return [f"{key}: {wanted[key]} -> {value}" for key, value in run.environment.items() if wanted[key] != value]


def losses(run: RunFolder, entry: Numbers) -> Iterator[GradeLine]:
    """Yield the verdict on the loss at each recorded step, and on the bits of all steps where the entry has them."""
    exact, found = not other_environment(run, entry), run.losses
    for step, expected in sorted(entry.loss_at.items()):
        if step > run.last_step:
            yield GradeLine(f"loss at {step}", "not compared", f"the run ended after step {run.last_step}")
        else:
            allowed = entry.band.loss.get(step) if entry.band else None
            yield within(f"loss at {step}", found[step], expected, allowed, entry, exact)
    if isinstance(entry, Measured) and entry.exact:
        yield bits(run, entry)


def bits(run: RunFolder, entry: Measured) -> GradeLine:
    """Return the verdict on every step's loss and gradient norm, every evaluation and the last weights, bit for bit."""
    assert entry.exact is not None
    if other := other_environment(run, entry):
        return GradeLine("bits", "not compared", f"not expected here: {'; '.join(other)}")
    wrong = [] if run.history_sha256 == entry.exact.history_sha256 else ["the history of losses"]
    wrong += [] if run.weights_sha256 == entry.exact.weights_sha256 else ["the last weights"]
    if wrong:
        return GradeLine("bits", "fail", f"{' and '.join(wrong)} differ from the recorded run's")
    return GradeLine("bits", "pass", f"all {run.last_step} steps, all evaluations and the last weights are the same")


def within(figure: str, found: float, expected: float, allowed: float | None, entry: Numbers, exact: bool) -> GradeLine:
    """Return the verdict on a loss: equal to the recorded one, or within its band; published ones can only warn."""
    far = abs(found - expected)
    says = f"{found:.6g}, recorded {expected:.6g}: {far:.2g} apart"
    if exact:
        return GradeLine(figure, "pass" if found == expected else "fail", f"{says}, the same bits are expected")
    if allowed is None:
        ours = isinstance(entry, Measured)
        return GradeLine(figure, "warn" if ours else "not compared", f"{says}; no band is recorded")
    outside: Verdict = "fail" if isinstance(entry, Measured) else "warn"
    return GradeLine(figure, "pass" if far <= allowed else outside, f"{says}, {allowed:g} allowed")


def held_out(run: RunFolder, entry: Numbers) -> Iterator[GradeLine]:
    """Yield the verdict on the held-out loss of the recorded step."""
    if entry.held_out is None:
        return
    figure, score = f"held-out at {entry.held_out.step}", at_step(run.scores, entry.held_out.step)
    if score is None:
        yield GradeLine(figure, "not compared", "the run did not evaluate that step")
        return
    allowed = entry.band.held_out if entry.band else None
    yield within(figure, score["eval_loss"], entry.held_out.loss, allowed, entry, not other_environment(run, entry))


def costs(run: RunFolder, entry: Numbers) -> Iterator[GradeLine]:
    """Yield the verdicts on speed and memory, which only a machine of the same kind must repeat."""
    # Other libraries may be slower, which is to be seen; another CPU, or number of threads, is another measurement.
    other = [line for line in other_environment(run, entry) if not line.startswith("lock_sha256")]
    for figure, found, recorded, limits, sign in (
        ("tokens/s", run.tokens_per_second, entry.tokens_per_second, SLOWER, -1),
        ("peak MiB", run.manifest.peak_memory_mib, entry.peak_memory_mib, LARGER, 1),
    ):
        if recorded is None or found is None:
            continue
        worse = sign * (found / recorded - 1)
        says = f"{found:,.0f}, recorded {recorded:,.0f}: {found / recorded:.2f} of it"
        if other:
            yield GradeLine(figure, "not compared", f"{says}; another kind of machine: {'; '.join(other)}")
        else:
            yield GradeLine(figure, verdict_of(worse, limits), f"{says}; {limits['fail']:.0%} worse fails")


def verdict_of(worse: float, limits: Mapping[str, float]) -> Verdict:
    if worse >= limits["fail"]:
        return "fail"
    return "warn" if worse >= limits["warn"] else "pass"
