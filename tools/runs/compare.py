"""Which runs can be compared, by what measure, and whether their gap is more than noise.

Losses are nats per token: they mean the same only for the same tokens. Bits per byte mean the same for the same
held-out text, whatever the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.layers import dotted, flatten
from tools.runs.folder import RunFolder

NOISE = 2.0  # standard errors: 19 gaps of 20 that chance alone makes are smaller
SEED_NOTE = (
    "The standard error is over held-out rows. It does not hold what another seed would change: for that, train both "
    "again with other seeds."
)


@dataclass(frozen=True)
class Verdict:
    """What can be said of `other` beside `base`. `unlike` are the reasons why their losses cannot be compared."""

    base: RunFolder
    other: RunFolder
    unlike: Sequence[str]
    measure: str = ""
    how: str = ""
    gap: float = 0.0  # positive: `other` is better, that is lower
    error: float = float("nan")
    notes: Sequence[str] = ()

    @property
    def exceeds_noise(self) -> bool | None:
        """Return whether the gap is more than noise; None where nothing could be measured."""
        if not self.measure or not self.error >= 0:
            return None
        return abs(self.gap) > NOISE * self.error

    def sentence(self) -> str:
        """Return the verdict in words."""
        parts = [f"losses are not compared: {', '.join(self.unlike)}"] if self.unlike else []
        if self.measure:
            words = "lower" if self.gap >= 0 else "higher"
            parts.append(f"{self.measure} {abs(self.gap):.4f} ± {self.error:.4f} {words}, {self.how}: {self._noise()}")
        return "; ".join([*parts, *self.notes])

    def _noise(self) -> str:
        if self.exceeds_noise is None:
            return "one row has no standard error, so nothing can be said of noise"
        if self.exceeds_noise:
            return f"beyond the noise of the held-out rows (over {NOISE:.0f} standard errors)"
        return f"within the noise of the held-out rows (under {NOISE:.0f} standard errors)"


def verdict(base: RunFolder, other: RunFolder) -> Verdict:
    """Compare the last evaluations of two runs, by the strongest measure that both allow."""
    unlike, notes = reasons_against(base, other), remarks(base, other)
    if not unlike and (before := base.held_out()) and (after := other.held_out()):
        try:
            gap, error = after.improvement_over(before)
        except ValueError:
            unlike = [f"other held-out rows ({len(before.nll)} and {len(after.nll)})"]
        else:
            how = f"paired by row over the same {len(after.nll)} rows"
            return Verdict(base, other, (), "held-out loss", how, gap, error, notes)
    if same_text(base, other) and (bits := bits_per_byte(base, other)):
        how = "not paired, on windows of the same held-out text"
        return Verdict(base, other, unlike, "bits per byte", how, *bits, notes)
    lacking = [run.name for run in (base, other) if not run.last_score]
    notes = [*(f"{name} has no evaluation" for name in lacking), *notes]
    if not unlike and not lacking:
        notes = ["evaluations.jsonl is not there: no comparison by row", *notes]
    return Verdict(base, other, unlike, notes=notes)


def reasons_against(base: RunFolder, other: RunFolder) -> list[str]:
    """Return why a token's loss of one run is not that of the other; empty where it is."""
    keys = {
        "other tokens": ("data", "tokens_sha256"),
        "another tokenizer": ("tokenizer_sha256",),
        "another length": ("data", "length"),
    }
    found = []
    for name, path in keys.items():
        first, second = base.fact(*path), other.fact(*path)
        if first is None or second is None:
            found.append(f"{'.'.join(path)} is not recorded")
        elif first != second:
            found.append(f"{name} ({short(first)}, {short(second)})")
    return found


def short(value: Any) -> str:
    return str(value)[:8]


def remarks(base: RunFolder, other: RunFolder) -> list[str]:
    """Return what a reader of the gap should know."""
    found = []
    steps = [run.last_score.get("step") for run in (base, other)]
    if None not in steps and steps[0] != steps[1]:
        found.append(f"evaluated after other steps ({steps[0]}, {steps[1]})")
    boards = [run.evaluated_in == "bf16" for run in (base, other)]
    if boards[0] != boards[1]:
        # 0.02 nats: what an export may differ by where one side is bf16 (tools/export/check.py, ALLOWED).
        found.append("one was evaluated in bf16 on a board: gaps below 0.02 say nothing")
    if [line.partition(":")[0] for line in changes(base, other)] == ["training_config.seed"]:
        found.append("they differ in the seed alone: a gap like this is what another seed makes")
    return found


def changes(base: RunFolder, other: RunFolder) -> list[str]:
    first, second = base.known_config, other.known_config
    return first.changes(second) if first and second else []


def same_text(base: RunFolder, other: RunFolder) -> bool:
    texts = [run.fact("data", "corpus", "held_out", "sha256") for run in (base, other)]
    return texts[0] is not None and texts[0] == texts[1]


def bits_per_byte(base: RunFolder, other: RunFolder) -> tuple[float, float] | None:
    """Return the difference and its standard error, of two independent samples; None where a run has none."""
    figures = [(r.last_score.get("bits_per_byte"), r.last_score.get("bits_per_byte_se")) for r in (base, other)]
    (first, first_error), (second, second_error) = figures
    if first is None or second is None:
        return None
    if first_error is None or second_error is None:
        return first - second, float("nan")
    return first - second, float((first_error**2 + second_error**2) ** 0.5)


def groups(runs: Iterable[RunFolder]) -> list[list[RunFolder]]:
    """Return runs whose losses mean the same, together; in the order of their first ones."""
    found: list[list[RunFolder]] = []
    for run in runs:
        like = next((group for group in found if not reasons_against(group[0], run)), None)
        if like is None:
            found.append([run])
        else:
            like.append(run)
    return found


def config_table(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return every key that is not the same in all runs, with each run's value as text."""
    known = [dict(flatten(run.known_config.dump())) if run.known_config else {} for run in runs]
    rows = []
    for key in dict.fromkeys(key for values in known for key in values):
        texts = [json.dumps(values[key], ensure_ascii=False) if key in values else "(absent)" for values in known]
        if len(set(texts)) > 1:
            rows.append((dotted(key), texts))
    return rows
