"""report.html: what it shows of whole, broken and hostile runs, and that nothing in it is ever run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

pytest.importorskip("matplotlib", reason="the plots are matplotlib's")

from common.errors import UsageError
from common.train import metrics
from tests.support.run_folders import held, write_lines, write_run
from tools.report import facts, pages, plots
from tools.report.curves import Curve, curve, running_mean, thinned
from tools.runs.folder import read_run

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)

    def refuse_anything_active(self) -> None:
        """No script, no picture, no frame, no handler, no address outside of the page's own folder."""
        assert not {tag for tag, _ in self.elements} & {"script", "img", "iframe", "object", "embed", "form", "base"}
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            address = str(attributes.get("href") or attributes.get("src") or attributes.get("xlink:href") or "")
            assert address in ("", "data:,") or re.fullmatch(r"#\w[\w-]*|[\w./%-]+", address), (tag, address)


@pytest.fixture
def undrawn(monkeypatch):
    """Plots stay empty: for what is about words alone, in a tenth of the time."""
    monkeypatch.setattr(plots, "svg", lambda *_: Markup("<svg></svg>"))


def page_of(folder: Path) -> Page:
    page = Page(pages.write_run(folder).read_text(encoding="utf-8"))
    page.refuse_anything_active()
    return page


def change_metrics(folder: Path, change) -> None:
    """Rewrite metrics.jsonl with `change` applied to every record; None leaves one out."""
    records = [change(record) for record in metrics.read(folder / "metrics.jsonl")]
    write_lines(folder / "metrics.jsonl", [record for record in records if record is not None])


# --- one run ------------------------------------------------------------------------------------------------------


def test_a_run_s_page_holds_all_its_parts(tmp_path):
    folder = write_run(tmp_path, steps=200, every=50)
    (folder / "before_after.md").write_text("# Before and after\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    page = page_of(folder)
    for title in ("Figures", "Plots", "Before and after", "Samples over time", "Data", "What ran", "Files"):
        assert title in page.text
    assert "held-out loss 3.1" in page.text
    assert "better than untrained" in page.text
    assert "640 (82,560 tokens)" in page.text
    assert "128 tokens a row, 100% of it filled" in page.text
    assert page.count("svg") == 7  # the loss twice, wide and narrow
    assert (folder / "report.html").stat().st_size < 300_000


def test_every_color_that_a_page_uses_is_defined_in_it(tmp_path):
    text = pages.write_run(write_run(tmp_path)).read_text(encoding="utf-8")
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))


def test_it_says_what_differs_from_the_recipe(tmp_path, undrawn):
    page = page_of(write_run(tmp_path, overrides=("training_config.learning_rate=0.123",)))
    assert re.search(r"training_config.learning_rate: [\d.e-]+ -> 0.123", page.text)


def test_a_failed_run_s_cause_comes_first(tmp_path, undrawn):
    text = "the loss of step 41 is nan\n  to do: a lower learning rate"
    page = page_of(write_run(tmp_path, exit_reason="failed: the loss of step 41 is nan", error=text))
    head = page.text.partition("nats per token")[0]
    assert "It failed." in head
    assert "to do: a lower learning rate" in head
    assert "the last line" in page.text


@pytest.mark.parametrize(("locked", "state"), [(True, "running"), (False, "killed")])
def test_a_run_that_says_running_is_killed_where_nobody_holds_it(tmp_path, locked, state):
    folder = write_run(tmp_path, exit_reason="running")
    if not locked:
        assert read_run(folder).state == state
        return
    with held(folder):
        assert read_run(folder).state == state


# --- what is broken -----------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_marked_and_said(tmp_path):
    folder = write_run(tmp_path)

    def ruin(record):
        if record["step"] in (7, 19) and "grad_norm" in record:
            record["grad_norm"] = float("nan") if record["step"] == 7 else float("inf")
        return record

    change_metrics(folder, ruin)
    assert "grad_norm is not a finite number at 2 of 40 steps (crosses at the top): 7, 19" in page_of(folder).text
    (panel,) = (panel for panel in facts.panels(read_run(folder)) if panel.title == "Gradient norm")
    assert str(plots.svg(panel, 400, 240, "x")).count("var(--warning)") >= 2


def test_numbers_that_axes_cannot_hold_do_not_end_it(tmp_path):
    folder = write_run(tmp_path)
    change_metrics(folder, lambda record: {**record, "loss": 1.7e308} if record["step"] == 9 else record)
    assert "loss is not a finite number at 1 of 40 steps" in page_of(folder).text


def test_a_run_cut_off_in_mid_write_is_shown_and_said(tmp_path, undrawn):
    folder = write_run(tmp_path, exit_reason="running")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 41, "loss": "é'.encode()[:-1])
    page = page_of(folder)
    assert "killed" in page.text
    assert "metrics.jsonl: the last line is cut off" in page.text
    assert page.count("svg") == 7


def test_a_damaged_line_in_the_middle_is_left_out_and_said(tmp_path, undrawn):
    folder = write_run(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3], lines[5] = "not json", '"no record"'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(folder)
    assert "metrics.jsonl: left out, no JSON: lines 4" in page.text
    assert "not of the known form: 1 records" in page.text


def test_one_point_no_evaluation_and_nothing_at_all_are_drawn_or_said(tmp_path):
    one = write_run(tmp_path, "one", steps=1, every=100)
    change_metrics(one, lambda record: record if "loss" in record else None)
    (one / "evaluations.jsonl").unlink()
    page = page_of(one)
    assert "no eval_loss was recorded" in page.text
    assert page.count("svg") == 6

    empty = write_run(tmp_path, "empty")
    for name in ("metrics.jsonl", "evaluations.jsonl", "config.resolved.yaml", "train.log"):
        (empty / name).write_text("")
    (empty / "manifest.json").write_text("{")
    page = page_of(empty)
    assert page.text.count("Nothing to draw.") == 5
    assert "manifest.json cannot be read" in page.text
    assert "config.resolved.yaml: " in page.text


def test_what_stands_in_data_and_config_is_shown_and_never_run(tmp_path, undrawn):
    folder = write_run(
        tmp_path,
        recipe=HOSTILE,
        hw=HOSTILE,
        command=[HOSTILE],
        exit_reason=f"failed: {HOSTILE}",
        base={"name": HOSTILE},
        backend={"notes": [HOSTILE]},
        overrides=(f"eval_config.prompts=[{json.dumps(HOSTILE)}]",),
    )
    answers = [
        {**record, "samples": [{"prompt": HOSTILE, "answer": f"</blockquote>{HOSTILE}"}]}
        for record in metrics.read(folder / "evaluations.jsonl")
    ]
    write_lines(folder / "evaluations.jsonl", answers)
    links = "[a](javascript:alert(1)) [b](https://example.org) ![c](https://example.org/d.png) <https://example.org>"
    (folder / "before_after.md").write_text(f"# {HOSTILE}\n\n| a |\n|---|\n| {links} |\n\n> {HOSTILE}\n")
    (folder / "train.log").write_text(HOSTILE)
    page = page_of(folder)
    assert page.text.count("<script>alert(1)</script>") > 8
    pages.write_overview(tmp_path)
    Page((tmp_path / "report.html").read_text()).refuse_anything_active()
    record = read_run(folder)
    Page(pages.comparison_page([record, record], tmp_path)).refuse_anything_active()


def test_the_policy_of_a_page_forbids_what_escaping_should_have_kept_out(tmp_path, undrawn):
    pages.write_run(folder := write_run(tmp_path))
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in (folder / "report.html").read_text()


def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path, undrawn):
    folder = write_run(tmp_path)
    (folder / "report.html").write_text("my notes")
    with pytest.raises(UsageError, match="not overwritten"):
        pages.write_run(folder)
    assert (folder / "report.html").read_text() == "my notes"


# --- at the end of a run ------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_made_is_one_line_and_no_error(tmp_path, undrawn):
    said: list[str] = []
    pages.write_at_end(tmp_path / "nowhere", said.append)
    pages.write_at_end(folder := write_run(tmp_path), said.append)
    assert len(said) == 2
    assert "no report.html (UsageError: no run there" in said[0]
    assert said[1] == f"report: {folder / 'report.html'}"


def test_a_log_that_takes_no_more_lines_does_not_end_a_run(tmp_path, undrawn):
    def full(_line: str) -> None:
        raise OSError(28, "No space left on device")

    pages.write_at_end(write_run(tmp_path), full)


# --- all runs -----------------------------------------------------------------------------------------------------


def test_the_page_over_all_runs_puts_only_like_with_like(tmp_path, undrawn):
    for number in range(3):
        write_run(tmp_path, f"run-{number}", tokenizer_sha256="ad"[number // 2] * 64)
    pages.write_run(tmp_path / "run-1")
    path, count = pages.write_overview(tmp_path)
    page = Page(path.read_text())
    page.refuse_anything_active()
    assert count == 3
    assert page.count("svg") == 4  # two groups, two plots each
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert [link for link in links if link and link.endswith(".html")] == ["run-1/report.html"]


def test_an_empty_folder_of_runs_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no runs there"):
        pages.write_overview(tmp_path)


# --- curves -------------------------------------------------------------------------------------------------------


def test_thinning_keeps_every_spike_and_hole():
    values = np.sin(np.arange(10_000) / 500)
    values[4321], values[8765], values[5000] = 50, -50, np.nan
    thin = thinned(Curve(np.arange(10_000.0), values), 100)
    assert len(thin) <= 303
    assert {4321, 5000, 8765} <= set(thin.steps)
    assert np.nanmax(thin.values) == 50
    assert np.nanmin(thin.values) == -50
    assert (np.diff(thin.steps) > 0).all()


def test_a_running_mean_leaves_out_what_is_unknown():
    points = Curve(np.arange(5.0), np.array([1, 3, np.nan, 5, 7]))
    assert running_mean(points, 2).values.tolist() == [1, 2, 4, 6]
    assert running_mean(points, 2).steps.tolist() == [0, 1, 3, 4]


def test_only_numbers_are_points():
    records = [{"step": step, "loss": value} for step, value in enumerate([1, 2.5, None, "3", True, float("inf")], 1)]
    assert curve(records, "loss").unknown == [3, 4, 5, 6]


def test_the_first_steps_set_no_scale_where_runs_lie_over_each_other():
    """Without it the axis would end at 100; a spike later on does set it."""

    def highest(skip: float, spike: float) -> float:
        values = np.array([100.0, 3.0, 2.5, 2.4, spike, 2.2, 2.1, 2.05, 2.02, 2.01, 2.0])
        panel = plots.Panel("Loss", [plots.PlotLine(Curve(np.arange(11.0), values), 0)], skip=skip)
        text = str(plots.svg(panel, 400, 240, "x"))
        return max(float(tick) for tick in re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", text))

    assert highest(0, 2.3) >= 80
    assert highest(0.1, 2.3) <= 3.1
    assert highest(0.1, 50.0) >= 40


def test_a_plot_has_the_page_s_colours_and_whole_tick_labels():
    """Small numbers on the axis keep their digits, and no colour of matplotlib's own is left."""
    panel = plots.Panel("Learning rate", [plots.PlotLine(Curve(np.arange(1.0, 9), np.linspace(1e-3, 2e-3, 8)), 0)])
    text = str(plots.svg(panel, 400, 240, "x"))
    assert "#0c0" not in text
    assert "var(--series-0)" in text
    labels = re.findall(r"<text[^>]*>(0\.\d+)</text>", text)
    assert len(set(labels)) == len(labels) > 3
    assert "http" not in text.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
