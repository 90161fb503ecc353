"""Writes the pages: one for a run, one over all runs of a folder, one that compares some.

A page is one file: no script, no picture, nothing fetched. Its Content-Security-Policy forbids all of that, so that
not even a mistake in a template could run what stands in somebody's data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UsageError
from common.files import disk_errors, write_atomic
from tools.runs.folder import RunFolder, read_run, runs_in
from tools.templates import render

if TYPE_CHECKING:
    from markupsafe import Markup

    from tools.report.plots import Panel

FILE = "report.html"
OURS = '<meta name="generator" content="recipe report">'  # in every page; a page without it is somebody else's
TEMPLATES = Path(__file__).with_name("templates")
WIDE, NARROW, SMALL = (1180, 340), (400, 300), (400, 240)  # CSS pixels: the main plot on a desk and a phone; the others
IN_PICTURE = (448, 140)  # picture.svg enlarges it to 608 x 190, so that its labels can be read on a phone
TILES_IN_PICTURE = ("held-out loss", "better than untrained", "training time")
NAMED = 8  # runs of a group that have a colour and a name; the older ones are faint
SKIP = 0.1  # share of the steps that sets no scale where runs are laid over each other
GROUPS = 12  # groups of runs that are drawn
FILES = ("metrics.jsonl", "evaluations.jsonl", "manifest.json", "config.resolved.yaml", "train.log", "samples.md")


def write_at_end(folder: Path, say: Callable[[str], None]) -> None:
    """Write a run's page when it has ended, said in one line. Whatever goes wrong is a line, too: it ends no run."""
    try:
        line = f"report: {write_run(folder)}"
    except (Exception, KeyboardInterrupt) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        line = f"no {FILE} ({why}); make it: recipe report {folder}"
    with contextlib.suppress(OSError):  # on a full disk train.log cannot take the line
        say(line)


def write_run(folder: Path) -> Path:
    """Write runs/<run>/report.html; return it. Raises UsageError where no run is there."""
    return write(folder / FILE, run_page(read_run(folder)))


def write_overview(out: Path) -> tuple[Path, int]:
    """Write the page over all runs of a folder; return it and their number. Raises UsageError where there is none."""
    runs = list(runs_in(out))
    if not runs:
        raise UsageError("no runs there", where=str(out), todo="train one: recipe run NAME, or give --out FOLDER")
    return write(out / FILE, overview_page(runs, out)), len(runs)


def write_comparison(runs: Sequence[RunFolder], path: Path) -> Path:
    """Write the page that compares these runs, the first one being what the others are measured by."""
    return write(path, comparison_page(runs, path.resolve().parent))


def write(path: Path, text: str) -> Path:
    """Put a page in place. Raises UsageError where something stands that is no page of ours."""
    if path.is_file() and OURS not in path.read_text(encoding="utf-8", errors="replace")[:1000]:  # its head
        raise UsageError("that file is no page of ours: not overwritten", where=str(path), todo="choose another name")
    with disk_errors("write the report", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    return path


# --- the pages ------------------------------------------------------------------------------------------------------


def run_page(run: RunFolder) -> str:
    """Return the page of one run."""
    from tools.report import facts

    main, *others = facts.panels(run)
    shown, left_out = facts.samples(run)
    changes, no_changes = facts.config_changes(run)
    return filled(
        "run.html",
        run=run,
        title=run.name,
        outcome=facts.OUTCOMES.get(run.state, "How it ended is not recorded."),
        cause=facts.cause(run) if run.state in ("failed", "stopped") else "",
        log=facts.last_lines(run) if run.state in ("failed", "killed") else [],
        tiles=facts.tiles(run),
        main=figure(main, "main", wide=True),
        others=[figure(panel, f"plot-{number}") for number, panel in enumerate(others)],
        tables=[
            ("Training", *facts.numbers(run.steps, facts.OF_STEPS)),
            ("Evaluations", *facts.numbers(run.scores, facts.OF_SCORES)),
        ],
        card=card(run.folder / "before_after.md"),
        samples=shown,
        samples_left_out=left_out,
        data=facts.data_rows(run),
        ran=facts.ran(run),
        changes=changes,
        no_changes=no_changes,
        files=[name for name in FILES if (run.folder / name).is_file()],
        faults=run.faults,  # last: reading what is above may have found more
    )


def picture(run: RunFolder) -> str:
    """Return the head of a run's page and its loss as an SVG file of 640 x 350, light or dark as the screen is.

    For a README, which shows pictures and no pages. Raises UsageError where no loss was recorded.
    """
    from tools.report import facts, plots

    loss, *_ = facts.panels(run)
    if not loss.drawn:
        raise UsageError("the run has no loss to draw", where=str(run.folder), todo="give a run that has taken steps")
    return render(
        TEMPLATES / "picture.svg",
        html=True,
        label=f"The run {run.name}. {loss.summary()}",
        title=run.name,
        tiles=[(name, value) for name, value, _ in facts.tiles(run) if name in TILES_IN_PICTURE],
        panel=loss,
        drawing=plots.svg(loss, *IN_PICTURE, "picture"),
    )


def overview_page(runs: Sequence[RunFolder], out: Path) -> str:
    """Return the page over all runs: a table, and the curves of those whose losses mean the same in one plot."""
    from tools.runs.compare import groups

    alike = groups(runs)
    return filled(
        "overview.html",
        title=f"{len(runs)} runs",
        out=out,
        rows=[row(run, out.resolve()) for run in runs],
        groups=[overlay(group, f"group-{number}") for number, group in enumerate(alike[:GROUPS])],
        not_drawn=sum(len(group) for group in alike[GROUPS:]),
        faults=[f"{run.name}: {fault}" for run in runs for fault in run.faults],
    )


def comparison_page(runs: Sequence[RunFolder], folder: Path) -> str:
    """Return the page that compares runs with the first of them."""
    from tools.runs import compare

    base, *others = runs
    return filled(
        "comparison.html",
        title=f"{len(runs)} runs compared",
        rows=[row(run, folder) for run in runs],
        base=base,
        verdicts=[compare.verdict(base, other) for other in others],
        seed_note=compare.SEED_NOTE,
        groups=[overlay(group, f"group-{number}") for number, group in enumerate(compare.groups(runs))],
        config=compare.config_table(runs),
        names=[run.name for run in runs],
        faults=[f"{run.name}: {fault}" for run in runs for fault in run.faults],
    )


def row(run: RunFolder, folder: Path) -> dict[str, Any]:
    """Return a run as the row of a table: its figures, and where its page is from `folder`, if it lies below."""
    from tools.report import facts
    from tools.report.curves import rate

    page = run.folder / FILE
    evaluation, speed = run.last_score, facts.median(rate(run.steps))
    return {
        "run": run,
        "page": page.relative_to(folder).as_posix() if page.is_file() and page.is_relative_to(folder) else "",
        "loss": facts.text_of(run.steps[-1]["loss"]) if run.steps else "–",
        "held_out": facts.with_error(evaluation.get("eval_loss", "–"), evaluation.get("eval_loss_se")),
        "bits": facts.with_error(evaluation.get("bits_per_byte", "–"), evaluation.get("bits_per_byte_se")),
        "speed": "–" if speed is None else f"{speed:,.0f}",
    }


def overlay(group: Sequence[RunFolder], name: str) -> dict[str, Any]:
    """Return the curves of runs that can be compared: the newest in color, the others faint behind them."""
    from tools.report import facts
    from tools.report.curves import curve, running_mean
    from tools.report.plots import Panel, PlotLine
    from tools.runs.compare import short

    # About so many points in a plot, however many runs it holds: each is text in the page.
    columns = max(50, 3000 // len(group))
    training, held_out = [], []
    for number, run in reversed(list(enumerate(group))):
        colour, label = (number, run.name) if number < NAMED else (None, "")
        loss = curve(run.steps, "loss")
        training.append(PlotLine(running_mean(loss, max(1, len(loss) // 20)), colour, label))  # as facts.panels
        evaluations = facts.with_band(run.scores, "eval_loss")
        band = evaluations.band if len(group) <= 3 else None  # more bands hide each other
        held_out.append(PlotLine(evaluations.curve, colour, label, band, dots=colour is not None))
    banded = f", with ± {facts.BAND} standard errors" if len(group) <= 3 else ""
    panels = [
        Panel("Training loss", training, "nats per token, running mean", columns=columns, skip=SKIP),
        Panel("Held-out loss", held_out, f"nats per token{banded}", columns=columns, skip=SKIP),
    ]
    first = group[0]
    return {
        "recipes": sorted({str(run.facts.get("recipe", "unknown")) for run in group}),
        "tokens": short(first.fact("data", "tokens_sha256")),
        "tokenizer": short(first.fact("tokenizer_sha256")),
        "length": first.fact("data", "length"),
        "faint": max(0, len(group) - NAMED),
        "names": [(number, run.name) for number, run in enumerate(group[:NAMED])],
        "plots": [figure(panel, f"{name}-{number}") for number, panel in enumerate(panels)],
    }


# --- parts ----------------------------------------------------------------------------------------------------------


def figure(panel: Panel, name: str, wide: bool = False) -> dict[str, Any]:
    """Return a panel with its drawings: one, or one for desks and one for phones."""
    from tools.report import plots

    sizes = {"wide": WIDE, "narrow": NARROW} if wide else {"": SMALL}
    drawings = {kind: plots.svg(panel, *size, f"{name}{kind}") for kind, size in sizes.items() if panel.drawn}
    return {"panel": panel, "drawings": drawings}


def card(path: Path) -> Markup | None:
    """Return before_after.md as HTML, headings below the page's. No HTML, picture or link of its text becomes one."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink"])
    tokens = markdown.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"  # the page has h1 and h2 of its own; HTML ends at h6
    html = markdown.renderer.render(tokens, markdown.options, {})
    box = '<div class="scroll" tabindex="0" role="region" aria-label="Answers before and after"><table>'
    return Markup(html.replace("<table>", box).replace("</table>", "</table></div>"))


def filled(template: str, **values: Any) -> str:
    return render(TEMPLATES / template, html=True, generator=OURS, **values)
