"""Who gets which of a fork's rows: trained on, held out, or asked at every evaluation, without a leak between them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.data import checks, convert
from common.data.rows import Row, group_hash, plain, write_rows
from common.errors import DataError
from common.ops.scaffold_yaml import Setting

SOURCE, PROMPTS = "data/rows.jsonl", "data/prompts.jsonl"
HELD_OUT = (8, 500)  # rows: the standard error of a mean over 8 is 0.35 of the rows' spread, over 500 it is 0.04
ASKED = ((0, 4), (200, 8), (1_000, 12))  # evaluation prompts, from so many rows on
GROUP_COLUMNS = ("topic", "category", "subject", "theme", "product", "section", "chapter", "document")
GROUPS, LARGEST_GROUP = 10, 0.2  # a column splits rows if it has so many values, none with more than this share


@dataclass(frozen=True)
class Share:
    """Who gets which rows: `rows` is the file (trained on or held out, by `split_by` and `held_out_share`)."""

    rows: Sequence[Row]
    asked: Sequence[Row]
    held_out: int
    split_by: Setting
    held_out_share: Setting

    @property
    def train(self) -> int:
        return len(self.rows) - self.held_out


def share(rows: Sequence[Row], batch: int, fits: Sequence[bool], where: str) -> Share:
    """Split `rows` by whole groups; the prompts that are asked at every evaluation come from the held-out side.

    `batch` is the largest effective batch, which the training rows must fill; `fits` says which rows' prompts may be
    asked. Raises DataError where there are too few rows.
    """
    kin = checks.alike([row.prompt for row in rows])
    different = len(set(kin))
    wanted, asked = held_out_rows(different), asked_rows(different)
    if different < batch + wanted + asked:
        alike = " (those with four words in five in common count as one)" if different < len(rows) else ""
        raise DataError(
            f"too few rows: {len(rows)} with {different} different prompts{alike}, {batch + wanted + asked} are needed",
            where=where,
            todo=f"write more: {batch} to train on, one effective batch (which 1 to {batch} devices share), {wanted} "
            f"held out (fewer say nothing) and {asked} to be asked at every evaluation",
        )
    rows, key, why = grouped(rows, kin)
    names = [str(row.extra[key]) if key else plain(row.prompt) for row in rows]
    held, threshold = held_groups(names, wanted + asked)
    alone = Counter(kin)
    candidates = [at for at, name in enumerate(names) if name in held]
    candidates.sort(key=lambda at: (not fits[at], alone[kin[at]] > 1, group_hash(rows[at].prompt)))
    chosen = set(candidates[:asked])
    kept = [row for at, row in enumerate(rows) if at not in chosen]
    held_out = len(candidates) - len(chosen)
    if len(kept) - held_out < batch:
        raise DataError(
            f"too few rows: {len(kept) - held_out} are left to train on beside whole groups, {batch} are needed",
            where=where,
            todo="write more rows, of more kinds",
        )
    return Share(
        rows=kept,
        asked=[rows[at] for at in sorted(chosen)],
        held_out=held_out,
        split_by=Setting("data_config.split_by", key, why),
        held_out_share=Setting(
            "data_config.held_out_share",
            threshold,
            f"a hash of the {key or 'prompt'} puts {held_out} of the {len(kept)} rows below it",
        ),
    )


def held_out_rows(rows: int) -> int:
    """A tenth of the rows, within what is enough."""
    least, most = HELD_OUT
    return min(max(least, round(rows / 10)), most)


def asked_rows(rows: int) -> int:
    return next(count for least, count in reversed(ASKED) if rows >= least)


def grouped(rows: Sequence[Row], kin: Sequence[int]) -> tuple[Sequence[Row], str | None, str]:
    """The rows, the key whose values are held out whole (None: the prompt), and why. `kin` are near prompts' groups.

    Where near prompts are not told apart by a column that the rows bring, they get one that holds them together.
    """
    for column in GROUP_COLUMNS:
        values = [str(row.extra.get(column) or "").strip() for row in rows]
        sizes = Counter(values)
        if (
            all(values)
            and GROUPS <= len(sizes) <= len(rows) / 2
            and max(sizes.values()) <= LARGEST_GROUP * len(rows)
            and len(set(zip(kin, values, strict=True))) == len(set(kin))
        ):
            return rows, column, f"a column of the data: each of its {len(sizes)} values is on one side whole"
    if len({(group, plain(row.prompt)) for group, row in zip(kin, rows, strict=True)}) == len(set(kin)):
        return rows, None, "by the prompt itself: no two of them are nearly the same"
    column = next(name for name in ("group", "split_group", "fork_group") if not any(name in row.extra for row in rows))
    near = sum(1 for count in Counter(kin).values() if count > 1)
    marked = [
        replace(row, extra={**row.extra, column: checks.canonical(rows[group].prompt)})
        for row, group in zip(rows, kin, strict=True)
    ]
    return marked, column, f"written into the rows, so that nearly the same prompts ({near} times) stay on one side"


def held_groups(names: Sequence[str], wanted: int) -> tuple[set[str], float]:
    """The groups with the smallest hashes that hold `wanted` rows together, and a share that means just those."""
    sizes, held, count = Counter(names), set[str](), 0
    order = sorted(sizes, key=group_hash)
    for name in order:
        if count >= wanted:
            break
        held.add(name)
        count += sizes[name]
    last = group_hash(order[len(held) - 1])
    following = group_hash(order[len(held)]) if len(held) < len(order) else 1.0
    digits = next(n for n in range(3, 15) if last < math.ceil(last * 10**n) / 10**n <= following)
    return held, math.ceil(last * 10**digits) / 10**digits


def points(found: Share) -> list[str]:
    """The files, for the pages."""
    kept = f"{found.held_out} of them are held out, chosen by a hash, so that adding a row moves no other"
    asked = "asked before training, on the way and at the end; `response` is what was written for them"
    return [
        f"`{SOURCE}`: {len(found.rows)} rows; {kept}.",
        f"`{PROMPTS}`: {len(found.asked)} rows set aside, {asked}.",
    ]


def write(folder: Path, found: Share) -> None:
    """Write the rows and the prompts under `folder`, and read them back.

    Raises DataError where a column of the user's that is kept beside them makes a row read otherwise.
    """
    (folder / SOURCE).parent.mkdir()
    write_rows(folder / SOURCE, found.rows)
    with (folder / PROMPTS).open("x", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{json.dumps(asked_record(row), ensure_ascii=False, default=str)}\n" for row in found.asked)
    again = convert.load_rows(folder / SOURCE)
    changed = [row for row, other in zip(found.rows, again, strict=True) if row.messages != other.messages]
    if changed:
        raise DataError(
            "a column that is kept beside prompt and response would be read in their place",
            where=f"{changed[0].where}, kept columns: {', '.join(sorted(changed[0].extra))}",
            todo="rename or remove the column that is called prompt, response, messages or conversations",
        )


def asked_record(row: Row) -> dict[str, object]:
    """An evaluation prompt with the answer that was written for it, which nobody but a reader reads."""
    first = next(turn.content for turn in row.messages if turn.role == "assistant")
    return {**row.record(), "prompt": row.prompt, "response": first}
