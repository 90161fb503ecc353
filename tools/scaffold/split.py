"""Who gets which of a fork's rows: trained on, held out, or asked at every evaluation. Equal prompts stay together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.data.rows import Row, group_hash, plain
from common.errors import DataError
from tools.data.near import canonical

HELD_OUT = (8, 500)  # rows: the standard error of a mean over 8 is 0.35 of the rows' spread, over 500 it is 0.04
ASKED = 4  # evaluation prompts: each is generated for at every evaluation, which takes seconds on a CPU
GROUP_COLUMNS = ("topic", "category", "subject", "theme", "product", "section", "chapter", "document")
GROUPS, LARGEST_GROUP = 10, 0.2  # a column splits rows if it has so many values, none with more than this share
LONG = 500  # characters of a prompt that is asked only where there is no shorter one: its answer needs room
SAME_PROMPT = "same_prompt"  # the column that is written where equal prompts are not spelt alike


@dataclass(frozen=True)
class Split:
    """`rows` are trained on, or held out where the hash of `column` (None: of the prompt) is below `share`.

    `asked` are set aside for the evaluations; `left_out` counts other rows with one of their prompts.
    """

    rows: Sequence[Row]
    asked: Sequence[Row]
    left_out: int
    column: str | None
    share: float
    held_out: int

    @property
    def train(self) -> int:
        """Return the number of rows to train on."""
        return len(self.rows) - self.held_out


def split(rows: Sequence[Row], batch: int, where: str) -> Split:
    """Split rows by whole groups. Raises DataError where less than a `batch`, or than half of the rows, is left."""
    prompts = [canonical(row.prompt) for row in rows]
    different, times = len(set(prompts)), Counter(prompts)
    wanted = min(max(HELD_OUT[0], round(different / 10)), HELD_OUT[1])
    if different < batch + wanted + ASKED:
        raise DataError(
            f"too few rows: {len(rows)} with {different} different prompts, {batch + wanted + ASKED} are needed",
            where=where,
            todo=f"write more: {batch} to train on, {wanted} to hold out and {ASKED} to ask at every evaluation",
        )
    column = next((name for name in GROUP_COLUMNS if holds_together(rows, prompts, name)), None)
    if column is None and len({plain(row.prompt) for row in rows}) > different:
        column = SAME_PROMPT
        rows = [row.but(extra={**row.extra, column: name}) for row, name in zip(rows, prompts, strict=True)]
    groups = [str(row.extra[column]) if column else plain(row.prompt) for row in rows]
    share = share_of(Counter(group for group, _ in set(zip(groups, prompts, strict=True))), wanted + ASKED)
    held = [at for at, group in enumerate(groups) if group_hash(group) < share]
    first: dict[str, int] = {}
    # First prompts that few rows have, as all rows of one that is asked leave the data; then short ones; then by hash.
    for at in sorted(held, key=lambda at: (times[prompts[at]], len(prompts[at]) > LONG, group_hash(prompts[at]))):
        first.setdefault(prompts[at], at)
    asked = dict(list(first.items())[:ASKED])
    kept = [at for at, prompt in enumerate(prompts) if prompt not in asked]
    held_out = sum(prompts[at] not in asked for at in held)
    if len(kept) - held_out < max(batch, len(rows) / 2):
        raise DataError(
            f"of {len(rows)} rows {len(kept) - held_out} would be left to train on",
            where=where,
            todo=f"all rows of a prompt are on one side, and one has {max(times.values())}: keep fewer of them",
        )
    return Split(
        rows=[rows[at] for at in kept],
        asked=[rows[at] for at in sorted(asked.values())],
        left_out=len(rows) - len(kept) - len(asked),
        column=column,
        share=share,
        held_out=held_out,
    )


def holds_together(rows: Sequence[Row], prompts: Sequence[str], column: str) -> bool:
    """Return whether a column of the data has groups to hold out whole, with every prompt in one of them."""
    sizes = Counter(str(row.extra.get(column) or "").strip() for row in rows)
    pairs = {(prompt, str(row.extra.get(column))) for row, prompt in zip(rows, prompts, strict=True)}
    even = max(sizes.values()) <= LARGEST_GROUP * len(rows) and GROUPS <= len(sizes) <= len(rows) / 2
    return "" not in sizes and even and len(pairs) == len(set(prompts))


def share_of(weights: Mapping[str, int], wanted: float) -> float:
    """Return the share, in four decimals, below which the hashes of names hold `wanted` of the weights; never all."""
    order, total = sorted(weights, key=group_hash), 0
    for at, name in enumerate(order):
        total += weights[name]
        if total >= wanted or at >= len(order) - 2:
            break
    # Rounded up, so that the last name stays below it; four decimals are read in config.yaml.
    return (math.floor(group_hash(name) * 10_000) + 1) / 10_000
