"""make docs: writes the tables of README.md, recipes/README.md and docs/board.md from every recipe's results.yaml and
configs, and that of docs/data.md from the dialects that tools/data knows.

Only what stands between a pair of markers is written. tests/ci/test_docs.py fails when one is stale. With RUN=runs/...
it first puts that run into the README (ci/shown.py), with EXPORTS="runs/..." what other software made of these runs'
exports into docs/exports.md (ci/opened.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ci import opened, shown
from ci.command import run
from common import config, hardware
from common.errors import UsageError
from common.model import bases, llama
from common.paths import ROOT
from tools.data.dialects import DIALECTS
from tools.results.schema import CLASSES, FOLDER, NEVER, HeldOut, Measured, Numbers, Results, load

BEGIN, END = "<!-- made by `make docs`: do not edit -->", "<!-- end of what `make docs` made -->"
Recipes = dict[Path, Results]
DESCRIBED = ("what it does", "on a CPU", "on a board")

MEANS = {
    "measured": "a run of this repository",
    "published": "figures of somebody else's program",
    "double only": "our tests, against stand-ins that say nothing about a card",
}
LEGEND = """\
*measured*: a run of this repository on that board. *published*: figures of somebody else's program on that board, for
the same kind of training; not a run of this repository. *double only*: the test suite runs the recipe's path for that
board against stand-ins for `ttml` and `ttnn` on a CPU, which says nothing about a card. *never run*: none of these."""


def recipes(root: Path) -> Recipes:
    """Every recipe folder with its results. Raises UsageError or VerificationError as `results.load` does."""
    return {path.parent: load(path.parent) for path in sorted((root / "recipes").glob("*/config.yaml"))}


def ran(found: Recipes) -> str:
    """Under each class of evidence the boards whose strongest it is, over all recipes; those never run are counted."""
    boards: dict[str, list[str]] = {kind: [] for kind in (*CLASSES, NEVER)}
    for board in hardware.table().values():
        kinds = {results.evidence(board.name) for results in found.values()}
        boards[next(kind for kind in boards if kind in kinds or kind == NEVER)].append(f"`{board.name}`")
    count = len(boards.pop(NEVER))
    lines = [f"*{kind}*, {MEANS[kind]}: {', '.join(names)}." for kind, names in boards.items() if names]
    return "\n".join(["**What ran where.**", *lines, f"*{NEVER}*: the other {count}."])


def overview(found: Recipes) -> str:
    """What each recipe does, and the model it trains on a CPU and on boards."""
    rows = [[f"[`{folder.name}`](recipes/{folder.name})", *_described(folder)] for folder in found]
    return _table([["recipe", *DESCRIBED], *rows])


def evidence(found: Recipes) -> str:
    """Board by recipe, the class of evidence in each cell."""
    header = ["board", *(f"[`{folder.name}`](../recipes/{folder.name})" for folder in found)]
    rows = [
        [f"`{board.name}`: {board.title}", *(results.evidence(board.name) for results in found.values())]
        for board in hardware.table().values()
    ]
    return f"{_table([header, *rows])}\n\n{LEGEND}"


def gallery(found: Recipes) -> str:
    """One row a recipe; below, what stands behind each of its figures."""
    rows, notes = [["recipe", *DESCRIBED, "figures"]], list[str]()
    for folder, results in found.items():
        figures = []
        for entry in results.numbers:
            notes.append(_behind(entry, folder.name))
            figures.append(f"{_shown(entry)} [{len(notes)}]")
        cell = "<br>".join(figures) or "none yet"
        rows.append([f"[`{folder.name}`]({folder.name})", *_described(folder), cell])
    return "\n\n".join([_table(rows), *(f"[{number}] {note}" for number, note in enumerate(notes, 1))])


def dialects(_found: Recipes) -> str:
    """Each dialect of rows in the order that they are tried: what it is told by, what is trained on and refused."""
    header = ["read as", "told by the columns", "trained on", "refused"]
    told = [
        ", ".join(f"`{column}`" for column in one.columns) + (f"; {one.told}" if one.told else "") for one in DIALECTS
    ]
    rows = [[one.name, by, one.trained, one.refused or "–"] for one, by in zip(DIALECTS, told, strict=True)]
    return _table([header, *rows])


# What each page's pairs of markers hold, in their order.
PAGES: dict[str, tuple[Callable[[Recipes], str], ...]] = {
    "README.md": (ran, overview),
    "recipes/README.md": (gallery,),
    "docs/board.md": (evidence,),
    "docs/data.md": (dialects,),
}


def pages(root: Path) -> dict[Path, str]:
    """Each page with its text as it should be. Raises UsageError where the markers are not there."""
    found = recipes(root)
    return {root / name: _between(root / name, [body(found) for body in bodies]) for name, bodies in PAGES.items()}


def _between(path: Path, bodies: list[str]) -> str:
    text = path.read_text(encoding="utf-8")
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", text)
    if parts[1::2] != [BEGIN, END] * len(bodies):
        what = f"the page needs both markers in turns, {len(bodies)} of each"
        raise UsageError(what, where=str(path), todo=f"{BEGIN} ... {END}")
    parts[2::4] = [f"\n\n{body}\n\n" for body in bodies]
    return "".join(parts)


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _described(folder: Path) -> list[str]:
    """What the recipe does, in the words that its config begins with, and the models it trains on CPUs and boards.

    A board that the recipe's batch or mesh does not fit is left out.
    """
    line = (folder / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    if not line.startswith("# "):
        what = "its first line should be a comment that says what the recipe does"
        raise UsageError(what, where=f"{folder / 'config.yaml'}:1")
    models: dict[bool, dict[str, str]] = {True: {}, False: {}}
    mistake: UsageError | None = None
    for board in hardware.table().values():
        try:
            model = config.load(folder, board).model
        except UsageError as error:
            mistake = error
            continue
        shape, base = model.architecture, bases.locked(folder).get(model.base or "")
        count = llama.parameters(shape.model_dump()) if shape else base["parameters"] if base else None
        size = f", {count / 1e6:,.{0 if count >= 1e8 else 1}f} M parameters" if count else ""
        name = model.base or model.preset or "a shape of its own"
        models[board.is_cpu][name] = f"`{name}`{size}"
    if mistake and not (models[True] or models[False]):
        raise mistake
    return [line.removeprefix("# "), *("; ".join(found.values()) or "not at all" for found in models.values())]


def _shown(entry: Numbers) -> str:
    figures = [_held_out(entry.held_out)] if entry.held_out else []
    if entry.loss_at:
        figures.append("loss " + ", ".join(f"{loss:.5g} at {step}" for step, loss in sorted(entry.loss_at.items())))
    if entry.tokens_per_second:
        figures.append(f"{entry.tokens_per_second:,.0f} tokens/s")
    if entry.peak_memory_mib:
        figures.append(f"{entry.peak_memory_mib:,.0f} MiB of the host")
    if entry.scaling:
        found = entry.scaling
        share = f"summing the gradients adds {found.all_reduce_share:.1%} of a step"
        gain = f"{found.ratio:.2f} times one device's tokens/s ({found.efficiency:.0%} of each of {found.devices})"
        figures.append(f"{gain}; {share}")
    kind = "on" if isinstance(entry, Measured) else "elsewhere, on"
    return f"**{entry.evidence}** {kind} `{entry.board}`: {'; '.join(figures)}"


def _behind(entry: Numbers, recipe: str) -> str:
    parts = [entry.what]
    if isinstance(entry, Measured):
        parts += [f"`--steps {entry.steps}`"] if entry.steps else []
        parts += [f"`--set {override}`" for override in entry.overrides]
        origin = f"measured {entry.date} at commit {entry.commit[:7]}"
        if entry.exact:
            origin += f"; the same bits again on {entry.exact.cpu_class}"
    else:
        origin = f"published, not a run of this repository: {entry.stack}, in {entry.source}"
    if entry.corpus:
        parts.append(f"{entry.corpus.characters:,} characters, sha256 {entry.corpus.sha256[:12]}...")
    parts += [f"[{file.path}]({recipe}/{FOLDER}/{file.path})" for file in entry.files]
    return f"{'; '.join([*parts, entry.machine, origin])}."


def _held_out(found: HeldOut) -> str:
    before = f"{found.untrained.loss:.5g} → " if found.untrained else ""
    text = f"held-out loss {before}{_with_error(found.loss, found.standard_error)} at {found.step}"
    if found.gain:
        text += f", gain {_with_error(found.gain.loss, found.gain.standard_error)}"
    return text + (f", {found.bits_per_byte:.5g} bits per byte" if found.bits_per_byte else "")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5g} ± {error:.3g}" if error else f"{value:.5g}"


def main() -> None:
    """Write every page, and say which has changed; RUN names the run that the README shows from now on, EXPORTS
    those whose exports docs/exports.md is about.
    """
    if run_folder := os.environ.get("RUN"):
        for path in shown.show(Path(run_folder), ROOT):
            print(f"{path.relative_to(ROOT)}: shows {run_folder}")
    if exports := os.environ.get("EXPORTS", "").split():
        page = opened.show([Path(folder) for folder in exports], ROOT)
        print(f"{page.relative_to(ROOT)}: shows {' '.join(exports)}")
    for path, text in pages(ROOT).items():
        stale = path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'written' if stale else 'unchanged'}")


if __name__ == "__main__":
    run(main)
