"""The data doctor: what is wrong with rows before they are trained on, and what they cost.

Every finding has a stable id: D0.. are errors (training on it would mislead or fail), D1.. are warnings. The
same rows give the same findings in the same order.
"""

from __future__ import annotations

import gc
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.data.build import supervised_share
from common.data.chat import ChatTokenizer, given
from common.data.rows import Problem, Row
from common.data.rows import grouped as by_fault
from common.data.tokens import Arrays, Encoded, pack
from common.errors import DataError
from common.hardware import TILE, round_up
from tools.data import markers
from tools.data.near import canonical, near_pairs
from tools.data.turns import answer_of, words_of
from tools.data.workers import encode_rows
from tools.progress import Watch, unwatched

if TYPE_CHECKING:
    from common.config import Config

Rows = Mapping[str, Sequence[Row]]

SHOWN = 10  # places of a finding on the screen; --json has all

# A key's shape, and what of it stands in every text that has one: looked for first, as that takes a tenth of the time.
SECRETS = {
    "a private key": (r"-----BEGIN [A-Z ]*PRIVATE KEY-----", ["-----BEGIN "]),
    "an OpenAI-style key": (r"\bsk-[A-Za-z0-9_-]{20,}", ["sk-"]),
    "an AWS key id": (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", ["AKIA", "ASIA"]),
    "a GitHub token": (
        r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
        ["ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"],
    ),
    "a Hugging Face token": (r"\bhf_[A-Za-z0-9]{30,}", ["hf_"]),
    "a Google key": (r"\bAIza[\w-]{35}", ["AIza"]),
    "a Slack token": (r"\bxox[abprs]-[\w-]{10,}", ["xox"]),
    "a GitLab token": (r"\bglpat-[\w-]{20,}", ["glpat-"]),
    "a web token": (r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}", ["eyJ"]),
}
KEY = re.compile("|".join(re.escape(part) for _, parts in SECRETS.values() for part in parts))
FORGED = "it would forge a turn; recipe data convert --escape-markers writes it with a space inside"
EMAIL = re.compile(r"\b[\w.+-]+@(?!example\.)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
PHONE = re.compile(
    r"(?<![\w.+])(?<!\d[ ,])(?:"
    r"\+\d[\d ().-]{6,16}\d"  # with a country code
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}"  # North American
    r"|0[1-9]\d{0,3}[ /-]\d{3,}(?:[ -]?\d{2,})?"  # with a trunk zero
    r")(?![\w.]\d)"
)
DIGITS = re.compile(r"\d[ ./-]\d\d\d")  # in every number of PHONE that begins without a plus


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its id, what it is, how many rows, and where (all of them)."""

    id: str
    message: str
    where: Sequence[str]
    faults: Sequence[str] = ()  # the same places by what is wrong with them, a line a fault, where that differs

    @property
    def is_error(self) -> bool:
        """Return whether it fails a check without `--strict`."""
        return self.id.startswith("D0")

    def lines(self) -> list[str]:
        """Return the finding for a person: a line a fault, or its first ten places and how many more."""
        found = [f"{'error' if self.is_error else 'warning'} {self.id}: {self.message}"]
        if self.faults:
            return [*found, *(f"  {fault}" for fault in self.faults)]
        found += [f"  {place}" for place in self.where[:SHOWN]]
        return [*found, f"  and {len(self.where) - SHOWN} more"] if len(self.where) > SHOWN else found


@dataclass(frozen=True)
class CheckReport:
    """All findings over a number of rows."""

    rows: Mapping[str, int]
    findings: Sequence[Finding]
    read_as: Sequence[str] = ()  # the dialects of a file, each with its rows

    @property
    def errors(self) -> list[Finding]:
        """Return what must be corrected."""
        return [finding for finding in self.findings if finding.is_error]

    @property
    def warnings(self) -> list[Finding]:
        """Return what should be looked at."""
        return [finding for finding in self.findings if not finding.is_error]

    def failed(self, strict: bool = False) -> bool:
        """Return whether the check fails: on errors, and with `strict` on warnings too."""
        return bool(self.findings if strict else self.errors)

    def lines(self) -> list[str]:
        """Return the report for a person: what it was read as, then errors first."""
        found = [f"read as {', '.join(self.read_as)}"] if self.read_as else []
        found += [line for finding in [*self.errors, *self.warnings] for line in finding.lines()]
        return [*found, f"{counted(self.rows)} rows; errors: {len(self.errors)}, warnings: {len(self.warnings)}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        kinds = {"errors": self.errors, "warnings": self.warnings}
        told = {
            kind: [{"id": one.id, "message": one.message, "where": list(one.where)} for one in found]
            for kind, found in kinds.items()
        }
        return {"rows": dict(self.rows), "read_as": list(self.read_as), **told}


def check(
    rows: Rows,
    prompts: Sequence[str] = (),
    tokenizer: ChatTokenizer | None = None,
    config: Config | None = None,
    *,
    problems: Sequence[Problem] = (),
    notes: Sequence[Problem] = (),
    read_as: Sequence[str] = (),
    licence: str | None = "",
    watch: Watch = unwatched,
) -> CheckReport:
    """Return all findings about rows by split ("train", "held_out") and the evaluation prompts, ordered by their ids.

    Without a tokenizer the checks on tokens and template markers are left out; without a config, those on its
    options. `problems` are lines that were no rows, `notes` what was changed on reading the others, `read_as` the
    dialects that they are in. `licence` is what the data set's card says, None when nothing does, "" when nobody
    looked. `watch` shows how far it is.
    """
    everything = [row for part in rows.values() for row in part]
    train, held_out = list(rows.get("train", ())), list(rows.get("held_out", ()))
    found: list[Iterator[Finding]] = [
        faults("D001", "rows that cannot be used", problems),
        faults("D112", "changes to rows as they were read", notes),
        leaks(train, held_out, prompts, watch),
        duplicates(everything, watch),
        private_data(everything, watch),
        untidy_text(everything),
    ]
    if tokenizer is not None:
        found.append(template_findings(everything, tokenizer, config, watch))
    else:
        found += [known_markers(everything), tools_used(everything)]
    if config is not None and train:
        found.append(batch_findings(len(train), config))
    if licence is None:
        found.append(
            iter([Finding("D119", "no licence is named for this data (a line 'License: ...' in its README)", [])])
        )
    gc.disable()  # each collection would look at all rows and all words of theirs, to find nothing
    try:
        findings = sorted((one for part in found for one in part), key=lambda one: one.id)
    finally:
        gc.enable()
    return CheckReport({name: len(part) for name, part in rows.items()}, findings, read_as)


def counted(rows: Mapping[str, int]) -> str:
    """Return the numbers of rows by split in words: `60 train, 8 held out`."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in rows.items())


def listed(id: str, message: str, where: Iterable[str]) -> Iterator[Finding]:
    """Yield one finding with its count in front, if there is any place."""
    places = list(where)
    if places:
        yield Finding(id, f"{len(places)} {message}", places)


def faults(id: str, message: str, problems: Sequence[Problem]) -> Iterator[Finding]:
    """Yield one finding with its count in front, which says every fault once, if there is any."""
    for finding in listed(id, message, map(str, problems)):
        yield replace(finding, faults=by_fault(problems))


def leaks(
    train: Sequence[Row], held_out: Sequence[Row], prompts: Sequence[str], watch: Watch = unwatched
) -> Iterator[Finding]:
    """Yield prompts that stand on both sides of a measurement: the same ones are errors, near ones warnings."""
    trained = [(row.prompt, row.where) for row in train]
    held = [(row.prompt, row.where) for row in held_out]
    asked = [(prompt, f"evaluation prompt {number}") for number, prompt in enumerate(prompts, start=1)]
    pairs = (
        ("D002", "D101", "held-out prompts are trained on", held, trained),
        ("D003", "D102", "evaluation prompts are trained on", asked, trained),
        ("D103", "D104", "evaluation prompts are held-out prompts", asked, held),
    )
    for same_id, near_id, message, ours, theirs in pairs:
        if not ours:
            continue  # as in a file of rows: theirs may be many, and would be indexed for nothing
        known: dict[str, str] = {}
        for text, where in theirs:
            known.setdefault(canonical(text), where)
        same = [f"{where} = {known[canonical(text)]}" for text, where in ours if canonical(text) in known]
        yield from listed(same_id, message, same)
        rest = [(text, where) for text, where in ours if canonical(text) not in known]
        near = (f"{where} ~ {place}" for where, place in near_pairs(rest, theirs, watch))
        yield from listed(near_id, f"{message} in nearly the same words", near)


def duplicates(rows: Sequence[Row], watch: Watch) -> Iterator[Finding]:
    """Yield rows, prompts and answers that come more than once."""
    repeated: list[str] = []
    conflicts: list[str] = []
    for group in grouped(rows, conversation_key):
        answers = {canonical(answer_of(row)) for row in group}
        place = ", ".join(row.where for row in group)
        (conflicts if len(answers) > 1 else repeated).append(f"{place}: {shown(group[0].prompt)}")
    yield from listed("D105", "prompts come again with the same answer", repeated)
    yield from listed("D106", "prompts have different answers", conflicts)
    by_answer = grouped(rows, answer_of)
    same = [group for group in by_answer if len({conversation_key(row) for row in group}) > 1]
    places = [f"{', '.join(row.where for row in group)}: {shown(answer_of(group[0]))}" for group in same]
    yield from listed("D107", "answers are given to different prompts", places)
    yield from listed("D108", "prompts are nearly the same as an earlier one", near_earlier(rows, watch))


def conversation_key(row: Row) -> str:
    """Return what stands before the last answer, for comparison."""
    return "\n".join(f"{turn.role}: {canonical(words_of(turn))}" for turn in row.messages[:-1])


def grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    """Return groups of at least two rows that are alike."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[canonical(key(row))].append(row)
    return [group for group in found.values() if len(group) > 1]


def near_earlier(rows: Sequence[Row], watch: Watch) -> Iterator[str]:
    """Yield "b ~ a" for every row whose prompt is nearly that of an earlier row."""
    prompts = [(row.prompt, at) for at, row in enumerate(rows)]
    for later, earlier in near_pairs(prompts, prompts, watch):
        if earlier < later:
            yield f"{rows[later].where} ~ {rows[earlier].where}"


def private_data(rows: Sequence[Row], watch: Watch) -> Iterator[Finding]:
    """Yield keys (errors), e-mail addresses and phone numbers (warnings). What was found is not printed again."""
    secrets, addresses, numbers = [], [], []
    for row in watch(rows, "looking for private data", len(rows)):
        text = "\n".join(map(words_of, row.messages))
        secrets += [f"{row.where}: {name}" for name in secrets_in(text)]
        addresses += [row.where] if has_email(text) else []
        numbers += [row.where] if has_phone(text) else []
    yield from listed("D004", "rows hold a key or token", secrets)
    yield from listed("D109", "rows hold an e-mail address", addresses)
    yield from listed("D110", "rows hold a phone number", numbers)


def secrets_in(text: str) -> list[str]:
    """Return the kinds of SECRETS that a text holds."""
    return [name for name, (shape, _) in SECRETS.items() if re.search(shape, text)] if KEY.search(text) else []


def has_email(text: str) -> bool:
    """Return whether a text holds an e-mail address, but for those of example.com and its like."""
    return "@" in text and bool(EMAIL.search(text))


def has_phone(text: str) -> bool:
    """Return whether a text holds a phone number."""
    return ("+" in text or bool(DIGITS.search(text))) and bool(PHONE.search(text))


def untidy_text(rows: Sequence[Row]) -> Iterator[Finding]:
    """Yield answers that are all but empty, and texts with white space around them."""
    empty = (f"{row.where}: {shown(answer_of(row))}" for row in rows if len(answer_of(row).split()) < 2)
    yield from listed("D111", "answers are a single word", empty)
    edges = (row.where for row in rows if any(turn.content != turn.content.strip() for turn in row.messages))
    yield from listed("D114", "rows have white space around a text: the model learns to write it", edges)


def known_markers(rows: Sequence[Row]) -> Iterator[Finding]:
    """Yield rows with a marker of a chat template, where no base is named: an error for those that recipes here use."""
    found = [(row.where, *mark) for row in rows if (mark := markers.found_in(row))]
    here = [f"{where}: {mark!r} ({base})" for where, mark, base in found if mark in markers.HERE]
    yield from listed("D008", f"rows hold a marker of the templates of bases here: {FORGED}", here)
    elsewhere = [f"{where}: {mark!r} ({base})" for where, mark, base in found if mark not in markers.HERE]
    yield from listed("D113", f"rows hold a marker of another base's template: {FORGED}", elsewhere)


def tools_used(rows: Sequence[Row]) -> Iterator[Finding]:
    """Yield the rows with tools or calls to them, where no base is named whose template would be asked about them."""
    used = [row.where for row in rows if row.tools or row.fields]
    message = "rows have tools or calls to them, which not every template writes: --base NAME asks that of a base"
    yield from faults("D120", message, [Problem(where, "tools or calls to them") for where in used])


def template_findings(
    rows: Sequence[Row], tokenizer: ChatTokenizer, config: Config | None, watch: Watch
) -> Iterator[Finding]:
    """Yield markers of the chat template inside texts, rows that the template refuses, rows that would be cut."""
    marked = {
        id(row): f"{row.where}: {marker!r} in the {turn.role}'s text"
        for row in rows
        for turn in row.messages
        if (marker := tokenizer.marker_in(turn.content))
    }
    yield from listed("D005", f"rows hold a marker of the chat template: {FORGED}", marked.values())
    limit = config.data.max_length if config else None
    refused, cut = [], []
    clean = [row for row in rows if id(row) not in marked]
    for row, encoded in zip(clean, encode(clean, tokenizer, config, limit, watch), strict=True):
        if isinstance(encoded, DataError):
            refused.append(Problem(row.where, encoded.what))
        elif encoded.cut:
            cut.append(f"{row.where}: would lose {encoded.cut}")
    yield from faults("D006", "rows cannot be tokenized", refused)
    yield from listed("D117", f"rows do not fit max_length {limit}", cut)


def encode(
    rows: Sequence[Row], tokenizer: ChatTokenizer, config: Config | None, limit: int | None, watch: Watch
) -> Iterable[Encoded | DataError]:
    """Return the rows' tokens under the config's system prompt, cut to `limit` predictions, or why there are none."""
    system = config.data.system_prompt if config else None
    options = system, None if limit is None else limit + 1, bool(config and config.data.supervise_all)
    return watch(encode_rows(tokenizer, rows, options), "tokenizing", len(rows))


def batch_findings(rows: int, config: Config) -> Iterator[Finding]:
    """Yield a finding where there are fewer training rows than one optimizer step takes."""
    if rows < config.training.batch_size:
        yield Finding("D007", f"{rows} training rows do not fill one batch of {config.training.batch_size}", [])


def shown(text: str, width: int = 60) -> str:
    """Return the start of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


# --- statistics -----------------------------------------------------------------------------------------------------


def stats(
    rows: Rows, tokenizer: ChatTokenizer | None = None, config: Config | None = None, watch: Watch = unwatched
) -> dict[str, Any]:
    """Return what a data set is and costs, as JSON values: counts by split, characters, tokens and padding.

    Without a tokenizer `tokens` is None, without a config the steps are. Raises DataError when there is no row, or
    when a row cannot be tokenized.
    """
    everything = [row for part in rows.values() for row in part]
    if not everything:
        raise DataError("no row to count")
    batch = config.training.batch_size if config else None
    return {
        "rows": {name: len(part) for name, part in rows.items()},
        "prompt_characters": spread([len(row.prompt) for row in everything]),
        "response_characters": spread([len(answer_of(row)) for row in everything]),
        "extra_keys": sorted({key for row in everything for key in row.extra}),
        "tokens": token_stats(pack(map(given, encode(everything, tokenizer, config, None, watch))))
        if tokenizer
        else None,
        "batch_size": batch,
        "steps_per_epoch": len(rows.get("train", ())) / batch if batch else None,
    }


def stats_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the statistics for a person; at most sixteen lengths of a row, the needed one last."""
    lines = [f"rows: {counted(found['rows'])}"]
    for name in ("prompt", "response"):
        lines.append(
            "{0} characters: min {min}, mean {mean:.0f}, max {max}".format(name, **found[f"{name}_characters"])
        )
    if found["extra_keys"]:
        lines.append(f"kept beside prompt and response: {', '.join(found['extra_keys'])}")
    if tokens := found["tokens"]:
        lines.append("tokens per row: p50 {p50}, p95 {p95}, max {max}; {total} in all".format(**tokens))
        lines += [f"supervised tokens: {tokens['supervised_share']:.1%}", "length   padding   rows cut"]
        # From the end, so that the needed length is among them.
        every = max(1, len(tokens["padding"]) // 16)
        chosen = tokens["padding"][::-1][::every][::-1]
        lines += ["{length:6d}   {share:7.1%}   {rows_cut:8d}".format(**cost) for cost in chosen]
    if found["batch_size"]:
        lines.append(f"steps per epoch: {found['steps_per_epoch']:.2f} of batch {found['batch_size']}")
    return lines


def spread(sizes: Sequence[int]) -> dict[str, float]:
    """Return the least, mean and largest."""
    return {"min": min(sizes), "mean": sum(sizes) / len(sizes), "max": max(sizes)}


def token_stats(encoded: Arrays) -> dict[str, Any]:
    """Return the token counts and the padding at each multiple of 32 up to the one that holds every row."""
    sizes = sorted((encoded.ends - encoded.starts).tolist())
    needed = round_up(max(sizes[-1] - 1, 1))
    return {
        # Nearest rank: a length that a row has, not one between two.
        "p50": sizes[math.ceil(0.50 * len(sizes)) - 1],
        "p95": sizes[math.ceil(0.95 * len(sizes)) - 1],
        "max": sizes[-1],
        "total": sum(sizes),
        "supervised_share": supervised_share(encoded),
        "needed_length": needed,
        "padding": [padding_at(length, sizes) for length in range(TILE, needed + 1, TILE)],
    }


def padding_at(length: int, sizes: Sequence[int]) -> dict[str, float]:
    """Return the share of a [rows, length] batch that is padding; a row of n tokens fills n-1 places."""
    used = sum(min(size - 1, length) for size in sizes)
    cut = sum(size - 1 > length for size in sizes)
    return {"length": length, "share": 1 - used / (length * len(sizes)), "rows_cut": cut}
