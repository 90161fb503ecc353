"""`python -m tests.writes`: every write of every piece fails in every way; the outcome is docs/durability.md's table.

With `--whole` the whole runs, too, of which every third operation that is unlike the others (some minutes).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.paths import ROOT
from tests.writes.faults import FULL, SHORT
from tests.writes.pieces import LARGE, PIECES
from tests.writes.trials import Piece, Result, Trials

PAGE = ROOT / "docs" / "durability.md"
BEGIN, END = "<!-- python -m tests.writes -->\n", "<!-- end -->\n"
WORDS = {"old": "as before", "new": "done", "part": "files old and new"}
ERRORS = {FULL: "half, then ENOSPC", SHORT: "half a write"}


def given(results: Iterable[Result]) -> str:
    """What the errors of one operation gave, those alike together."""
    found: dict[str, dict[str, None]] = {}
    for one in results:
        what = "nothing fails" if one.code == 0 and one.left == "new" else f"code {one.code}, {WORDS[one.left]}"
        found.setdefault(what, {})[ERRORS.get(one.error, one.error)] = None
    return "; ".join(f"{what} ({', '.join(errors)})" for what, errors in found.items())


def rows(piece: Piece, results: Sequence[Result]) -> list[str]:
    """A line for each operation of a piece; those that are alike share one."""
    alike: dict[str, list[Result]] = {}
    for one in results:
        alike.setdefault(f"{one.operation.kind} | {one.operation.path}", []).append(one)
    lines = []
    for operation, those in alike.items():
        kind, _, path = operation.partition(" | ")
        lines.append(f"| {piece.name} | {kind} | `{path}` | {given(those)} |")
    return lines


def main(words: Sequence[str]) -> None:
    """Try all pieces, write the page, and end with 1 where something is not as it must be."""
    pieces = [*((piece, 1) for piece in PIECES), *((piece, 3) for piece in LARGE)]
    if "--whole" in words:
        from tests.writes.whole import RUNS

        pieces += [(piece, 3) for piece in RUNS]
    lines, wrong, count = ["| what writes | operation | on | what its failures gave |", "|---|---|---|---|"], 0, 0
    for piece, every in pieces:
        with tempfile.TemporaryDirectory() as place:
            results = list(Trials(piece, Path(place) / "piece").results(every_error=every == 1, every=every))
        lines += rows(piece, results)
        bad = [one for one in results if one.problems]
        wrong, count = wrong + len(bad), count + len(results)
        print(f"{piece.name}: {len(results)} faults, {len(bad)} not as they must be", flush=True)
        for one in bad:
            print(f"  {one.operation}, {one.error}: {'; '.join(one.problems)}")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table = "\n".join([f"{count} faults, {wrong} of them not as they must be.\n", *lines, ""])
    PAGE.write_text(f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}", encoding="utf-8")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
