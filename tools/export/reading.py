"""`recipe export RUN --readers`: the export asked of other software, row by row, and the table in its model card."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import MachineError, UsageError, VerificationError
from common.files import sha256_file, write_atomic, write_json
from common.train.manifest import Manifest
from tools.export.export import alone_with, export
from tools.export.gguf.file import write_gguf
from tools.export.hf_folder import export_dtype, merged_shapes, merged_tensors
from tools.export.model_card import named_base
from tools.export.readers.ask import ask
from tools.export.readers.compare import COLUMNS, Row, compare
from tools.export.readers.environment import Say
from tools.export.readers.questions import Expected, code_of, expected_of
from tools.export.readers.table import Reader, chosen
from tools.export.record import read_record
from tools.git import head
from tools.runs import trained
from tools.runs.trained import TrainedRun

HEADING = "\n## Opened by other software\n"
CARDS = {"merged": "merged/README.md", "adapter": "adapter/README.md"}


def export_readers(run_folder: Path, names: Sequence[str], say: Say) -> None:
    """Export a run, unless that was done, and have it opened by the named readers, or all; print and keep the table.

    It goes into export.json and into the model cards. Raises VerificationError, after all were asked, where a reader
    opened it and computed something else.
    """
    readers = chosen(names)
    with alone_with(run_folder):
        run = trained.read(run_folder, say)
        folder = export(run, Manifest.load(run_folder), say)
        record = read_record(folder)
        assert record is not None, "it was exported, or raised"
        expected = {"merged": expected_of(run, folder / "merged")}
        if any(reader.opens == "adapter" for reader in readers) and (folder / "adapter").is_dir():
            expected["adapter"] = (
                expected_of(run, folder / "merged", added(run)) if rounded(run) else expected["merged"]
            )
        rows = record.setdefault("readers", {})
        when = {"date": datetime.date.today().isoformat(), "commit": commit_here()}
        for reader in readers:
            if reader.opens == "adapter" and not (folder / "adapter").is_dir():
                continue
            row = row_of(reader, run, folder, expected.get(reader.opens, expected["merged"]), say)
            say(row.line())
            rows[reader.name] = {**vars(row), **when}
            keep(folder, record)  # now: the next one may take half an hour
    say("")
    for line in table(rows.values()):
        say(line)
    asked = [reader.name for reader in readers if reader.name in rows]  # not those of an earlier time
    if wrong := [name for name in asked if rows[name]["verdict"] == "differs"]:
        what = f"read otherwise than here by {', '.join(wrong)}: {rows[wrong[0]]['reason']}"
        todo = "do not hand it to their users; report it with export.json"
        raise VerificationError(what, where=str(folder), todo=todo)


def commit_here() -> str | None:
    """Return the commit that asks, None where git cannot say or the tree has changes."""
    commit, dirty = head()
    return None if dirty else commit


def rounded(run: TrainedRun) -> bool:
    """Return whether the merged model was rounded to bf16, before the adapter was added or after."""
    return "bf16" in (export_dtype(run), run.config.training.precision)


def added(run: TrainedRun) -> dict[str, Any]:
    """Return the adapter added to its base in fp32 as it lies on the disk: what other software that loads both has."""
    return dict(merged_tensors(run, merged_shapes(run), held="fp32"))


def row_of(reader: Reader, run: TrainedRun, folder: Path, expected: Expected, say: Say) -> Row:
    """Return what one reader made of the export: a row, whatever went wrong."""
    row = Row(reader.name, reader.version, reader.opens)
    try:
        with tempfile.TemporaryDirectory(prefix="recipes-export-") as scratch:
            opened = opened_by(reader, run, folder, expected, Path(scratch))
            asked = {**expected.asked, "snippet": snippet_of(reader, run, folder, expected)}
            return compare(row, expected, ask(reader.lock, reader.probe, opened, asked, say))
    except MachineError as error:
        row.verdict, row.reason = "not tried", error.what
    except (VerificationError, UsageError) as error:
        row.verdict, row.reason = "refuses", error.what
    return row


def opened_by(reader: Reader, run: TrainedRun, folder: Path, expected: Expected, scratch: Path) -> dict[str, Any]:
    """Return what a reader is to open. Raises UsageError where our own converter refuses to write it."""
    if reader.opens == "gguf":
        path = scratch / "f32.gguf"
        write_gguf(path, folder / "merged", "f32", run.config.recipe)
        context = max(len(ids) + limit for ids, limit in [*expected.asked["greedy"], *expected.asked["ends"]]) + 1
        return {"file": str(path), "context": context, "never": expected.never_ids}
    if reader.opens == "adapter":
        return {"folder": str(folder / "adapter"), "base": str(run.base.folder)}
    return {"folder": str(folder / "merged")}


def snippet_of(reader: Reader, run: TrainedRun, folder: Path, expected: Expected) -> list[list[Any]]:
    """Return the code of the card of what the reader opens, as it stands there, but with the base that is here: it runs
    off the network.
    """
    if reader.opens not in CARDS:
        return []
    path = folder / CARDS[reader.opens]
    code = code_of(path.read_text(encoding="utf-8"))
    if code is None:
        return []
    code = code.replace(f'"{named_base(run)}"', repr(str(run.base.folder)))
    return [[code, str(path.parent), expected.asked["logits"][0][0]]]


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Write the table into the model cards, and the rows with the cards' new hashes into export.json."""
    for name in CARDS.values():
        path = folder / name
        if path.is_file():
            opens = path.parent.name
            rows = [row for row in record["readers"].values() if (row["opens"] == "adapter") == (opens == "adapter")]
            card = path.read_text(encoding="utf-8").split(HEADING)[0]
            write_atomic(path, card + section(rows) if rows else card)
            record["sha256"][name] = sha256_file(path)
    write_json(folder / "export.json", record)


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the part of a model card that has the table."""
    about = (
        "Each in an environment of its own, on a CPU in fp32, beside the recipe's own engine: the same 24 odd texts, "
        "conversations, prompt and greedy answer. `recipe export RUN --readers` makes this table."
    )
    return "\n".join([HEADING, about, "", *table(rows), ""])


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the table in Markdown; a dash where a reader was not asked, or cannot be."""
    lines = [f"| reader | {' | '.join(COLUMNS.values())} | all in all |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for row in rows:
        cells = [row["cells"].get(name, "–") for name in COLUMNS]
        verdict = row["verdict"] + (f": {row['reason']}" if row["reason"] else "")
        name = row["version"] + ("" if row["opens"] == "merged" else f", {row['opens']}")
        lines.append("| " + " | ".join(one.replace("|", "\\|") for one in [name, *cells, verdict]) + " |")
    return lines
