"""Who gets which of a fork's rows: trained on, held out, or asked at every evaluation, without a leak between them."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.data.rows import Row, group_hash, plain, write_rows
from common.errors import DataError
from tools.data import checks, convert
from tools.scaffold.yaml import Setting

SOURCE, PROMPTS, TWINS = "data/rows.jsonl", "data/prompts.jsonl", "data/twins.jsonl"
HELD_OUT = (8, 500)  # rows: the standard error of a mean over 8 is 0.35 of the rows' spread, over 500 it is 0.04
ASKED = ((0, 4), (200, 8), (1_000, 12))  # evaluation prompts, from so many rows on
GROUP_COLUMNS = ("topic", "category", "subject", "theme", "product", "section", "chapter", "document")
GROUPS, LARGEST_GROUP = 10, 0.2  # a column splits rows if it has so many values, none with more than this share


@dataclass(frozen=True)
class Share:
    """Who gets which rows: `rows` is the file (trained on or held out, by `split_by` and `held_out_share`).

    `twins` are the same as, or near to, a row that is asked: they are neither trained on nor scored.
    """

    rows: Sequence[Row]
    asked: Sequence[Row]
    twins: Sequence[Row]
    held_out: int
    split_by: Setting
    held_out_share: Setting

    @property
    def train(self) -> int:
        return len(self.rows) - self.held_out

    @property
    def set_aside(self) -> str:
        """How many rows are neither trained on nor scored."""
        twins = f", with {len(self.twins)} like them ({TWINS})" if self.twins else ""
        return f"{len(self.asked)} rows set aside{twins}"


@dataclass(frozen=True)
class Way:
    """A way to split: the key whose values are held out whole (None: the prompt), why it, or why not (`fault`).

    `names` are the rows' values. `units` are the rows that an evaluation prompt takes along: by index of their first.
    """

    rows: Sequence[Row]
    key: str | None
    why: str
    names: Sequence[str]
    units: Sequence[int]
    fault: str = ""


@dataclass(frozen=True)
class Draw:
    """What a way comes to: rows by index, and the share of the groups that means just these."""

    held_out: Sequence[int]
    asked: Sequence[int]
    twins: Sequence[int]
    share: float

    @property
    def taken(self) -> int:
        """Rows that are not trained on."""
        return len(self.held_out) + len(self.asked) + len(self.twins)


def share(rows: Sequence[Row], batch: int, fits: Sequence[bool], where: str) -> Share:
    """Split `rows` by whole groups; the prompts that are asked at every evaluation come from the held-out side.

    `batch` is the largest batch, which the training rows must fill; `fits` says which rows' prompts may be
    asked. Raises DataError where there are too few rows, or where one prompt has too many of them.
    """
    prompts = [row.prompt for row in rows]
    same, kin = checks.same(prompts), checks.alike(prompts)
    refuse_few(len(rows), len(set(same)), batch, where)
    wanted, asked = held_out_rows(len(rows)), asked_rows(len(set(same)))
    sizes = Counter(kin)
    preference = [(not fits[at], sizes[kin[at]], group_hash(prompt)) for at, prompt in enumerate(prompts)]
    not_taken: list[str] = []
    for way in ways(rows, same, kin):
        found = drawn(way, wanted, asked, preference)
        fault = way.fault or excess(found.taken, len(rows), wanted + asked, batch)
        if not fault:
            break
        not_taken.append(f"not by {way.key or 'the prompt'}: {fault}")
    else:
        raise DataError(
            f"these rows cannot be split by their prompts: {fault}",
            where=where,
            todo=f"one prompt comes {max(Counter(same).values())} times, and all its rows are on one side: keep fewer "
            "of them, or write more rows with other prompts",
        )
    aside = {*found.asked, *found.twins}
    kept = [row for at, row in enumerate(way.rows) if at not in aside]
    held_out = len(found.held_out)
    return Share(
        rows=kept,
        asked=[way.rows[at] for at in found.asked],
        twins=[way.rows[at] for at in found.twins],
        held_out=held_out,
        split_by=Setting("data_config.split_by", way.key, "; ".join([way.why, *not_taken])),
        held_out_share=Setting(
            "data_config.held_out_share",
            found.share,
            f"a hash of the {way.key or 'prompt'} puts {held_out} of the {len(kept)} rows below it",
        ),
    )


def refuse_few(rows: int, different: int, batch: int, where: str) -> None:
    """Raise DataError where so many different prompts are too few for every side."""
    held_out, asked = held_out_rows(different), asked_rows(different)
    if different < batch + held_out + asked:
        apart = " (case, white space and end punctuation do not count)" if different < rows else ""
        raise DataError(
            f"too few rows: {rows} with {different} different prompts{apart}, {batch + held_out + asked} are needed",
            where=where,
            todo=f"write more: {batch} to train on, one batch (which 1 to {batch} devices share), {held_out} "
            f"held out (fewer say nothing) and {asked} to be asked at every evaluation",
        )


def held_out_rows(rows: int) -> int:
    """A tenth of the rows, within what is enough."""
    least, most = HELD_OUT
    return min(max(least, round(rows / 10)), most)


def asked_rows(rows: int) -> int:
    return next(count for least, count in reversed(ASKED) if rows >= least)


def excess(taken: int, rows: int, wanted: int, batch: int) -> str:
    """Why a split takes too many rows from training, or nothing: twice what is wanted, or a fifth, is the most."""
    if taken > max(2 * wanted, LARGEST_GROUP * rows):
        return f"{taken} of {rows} rows would be held out or set aside, {wanted} are wanted"
    return f"{rows - taken} rows would be left to train on, {batch} are needed" if rows - taken < batch else ""


def ways(rows: Sequence[Row], same: Sequence[int], kin: Sequence[int]) -> Iterator[Way]:
    """Ways to split, the best first: a column of the data, nearly the same prompts together, the same ones together.

    Nearly the same prompts that are a large share of the rows are a template: they count as different from the start.
    """
    sizes = Counter(kin)
    near = [one if sizes[group] > LARGEST_GROUP * len(rows) else group for one, group in zip(same, kin, strict=True)]
    for column in GROUP_COLUMNS:
        if any(value(row, column) for row in rows):
            yield by_column(rows, column, near, templated(near, kin))
    yield by_prompt(rows, near, templated(near, kin))
    if near != same:
        yield by_prompt(rows, same, templated(same, kin))


def templated(units: Sequence[int], kin: Sequence[int]) -> str:
    """What is to be said where nearly the same prompts (`kin`) are in several units."""
    parts = Counter(group for group, _ in set(zip(kin, units, strict=True)))
    count = sum(1 for group in kin if parts[group] > 1)
    return f"; {count} rows in nearly the same words are too many to stay on one side" if count else ""


def value(row: Row, column: str) -> str:
    return str(row.extra.get(column) or "").strip()


def by_column(rows: Sequence[Row], column: str, units: Sequence[int], note: str) -> Way:
    """The values of a column of the data are held out whole."""
    values = [value(row, column) for row in rows]
    sizes = Counter(values)
    largest = max(sizes.values())
    fault = ""
    if not all(values):
        fault = f"{sizes['']} of {len(rows)} rows have none"
    elif len(sizes) < GROUPS:
        fault = f"it has {len(sizes)} values, {GROUPS} are needed"
    elif len(sizes) > len(rows) / 2:
        fault = f"it has {len(sizes)} values for {len(rows)} rows"
    elif largest > LARGEST_GROUP * len(rows):
        fault = f"one value has {largest} of {len(rows)} rows"
    elif len(set(zip(units, values, strict=True))) > len(set(units)):
        fault = "prompts that are nearly the same differ in it"
    why = f"a column of the data: each of its {len(sizes)} values is on one side whole"
    return Way(rows, column, why + note, [str(row.extra.get(column)) for row in rows], units, fault)


def by_prompt(rows: Sequence[Row], units: Sequence[int], note: str) -> Way:
    """`units` of prompts are held out whole: by the prompt where it tells them apart, else by a key that is written."""
    prompts = [plain(row.prompt) for row in rows]
    if len(set(zip(units, prompts, strict=True))) == len(set(units)):
        why = "by the prompt itself" + (note or ": no two of them are nearly the same")
        return Way(rows, None, why, prompts, units)
    column = next(name for name in ("group", "split_group", "fork_group") if not any(name in row.extra for row in rows))
    names = [checks.canonical(rows[unit].prompt) or prompts[unit] for unit in units]
    times = sum(1 for count in Counter(units).values() if count > 1)
    why = (
        f"written into the rows, so that nearly the same prompts ({times} times) stay on one side; a row that is added "
        f"needs a {column} too: any word of its own, or that of the rows it resembles"
    )
    marked = [replace(row, extra={**row.extra, column: name}) for row, name in zip(rows, names, strict=True)]
    return Way(marked, column, why + note, names, units)


def drawn(way: Way, wanted: int, asked: int, preference: Sequence[tuple[bool, int, float]]) -> Draw:
    """Hold out the groups with the smallest hashes, until `wanted` rows are left beside `asked` ones and their twins.

    Of the rows held out, those least in `preference` are asked, one of each unit.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for at, name in enumerate(way.names):
        members[name].append(at)
    order = sorted(members, key=group_hash)
    count, held, first, twins = 0, list[int](), dict[int, int](), list[int]()
    while count < len(order) and (len(first) < asked or len(held) - len(first) - len(twins) < wanted):
        held += members[order[count]]
        count += 1
        best: dict[int, int] = {}
        for at in sorted(held, key=lambda at: preference[at]):
            best.setdefault(way.units[at], at)
        first = dict(list(best.items())[:asked])
        twins = [at for at in held if way.units[at] in first and at not in first.values()]
    return Draw(
        held_out=[at for at in held if way.units[at] not in first],
        asked=sorted(first.values()),
        twins=sorted(twins),
        share=between(group_hash(order[count - 1]), group_hash(order[count]) if count < len(order) else 1.0),
    )


def between(last: float, following: float) -> float:
    """The shortest decimal above the one and not above the other."""
    digits = next(n for n in range(3, 15) if last < math.ceil(last * 10.0**n) / 10.0**n <= following)
    return math.ceil(last * 10.0**digits) / 10.0**digits


def points(found: Share) -> list[str]:
    """The files, for the pages."""
    kept = f"{found.held_out} of them are held out, chosen by a hash, so that adding a row moves no other"
    asked = "asked before training, on the way and at the end; `response` is what was written for them"
    lines = [
        f"`{SOURCE}`: {len(found.rows)} rows; {kept}.",
        f"`{PROMPTS}`: {len(found.asked)} rows set aside, {asked}.",
    ]
    twins = f"`{TWINS}`: {len(found.twins)} rows with the same or nearly the same prompts: not trained on, not scored."
    return [*lines, twins] if found.twins else lines


def write(folder: Path, found: Share) -> None:
    """Write the rows and the prompts under `folder`, and read them back.

    Raises DataError where a column of the user's that is kept beside them makes a row read otherwise.
    """
    (folder / SOURCE).parent.mkdir()
    write_rows(folder / SOURCE, found.rows)
    with (folder / PROMPTS).open("x", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{json.dumps(asked_record(row), ensure_ascii=False, default=str)}\n" for row in found.asked)
    if found.twins:
        write_rows(folder / TWINS, found.twins)
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
