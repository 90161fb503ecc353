"""The pages of runs in a real browser: desk and phone, light and dark, with a mouse and without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the plots are matplotlib's")
from common.train import metrics
from tests.support.browser import CONTRAST, READABLE, SCREENS, Visit, needs_browser
from tests.support.run_folders import write_lines, write_run
from tools.report import pages
from tools.runs.folder import read_run

pytestmark = needs_browser
HOSTILE = "</title><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """One of each kind of page, by name."""
    out = tmp_path_factory.mktemp("runs")
    whole = write_run(out, "20260101T000000Z-whole-cpu-0000", steps=200, every=20)
    (whole / "before_after.md").write_text(
        "# Card\n\n| prompt | longest run of training words |\n|---|---|\n| a | 3 |\n"
    )
    hostile = write_run(out, "20260102T000000Z-hostile-cpu-0001", recipe=HOSTILE, exit_reason=f"failed: {HOSTILE}")
    answers = [
        {**record, "samples": [{"prompt": HOSTILE, "answer": HOSTILE}]}
        for record in metrics.read(hostile / "evaluations.jsonl")
    ]
    write_lines(hostile / "evaluations.jsonl", answers)
    broken = write_run(out, "20260103T000000Z-broken-cpu-0002", exit_reason="running", tokenizer_sha256="d" * 64)
    records = [{**record, "grad_norm": float("nan")} for record in metrics.read(broken / "metrics.jsonl")]
    write_lines(broken / "metrics.jsonl", records)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    runs = [whole, hostile, broken]
    found = {folder.name.split("-")[1]: pages.write_run(folder) for folder in runs}
    found["overview"], _ = pages.write_overview(out)
    records_ = [read_run(folder) for folder in runs]
    return {**found, "comparison": pages.write_comparison(records_, out / "compare.html")}


def every_page(test: Any) -> Any:
    for name, values in {
        "name": ("whole", "hostile", "broken", "overview", "comparison"),
        "screen": tuple(SCREENS),
        "scheme": ("light", "dark"),
    }.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


OUTSIDE = """
() => [...document.querySelectorAll("main *")].filter(element => {
  const box = element.getBoundingClientRect();
  if (!box.width || element.closest(".scroll, .drawing svg")) return false;
  return box.right > innerWidth + 1 || element.matches(".tiles > div") && element.scrollWidth > element.clientWidth;
}).map(element => element.outerHTML.slice(0, 80))
"""


@every_page
def test_a_page_is_quiet_whole_and_readable(chromium, written, name, screen, scheme):
    with Visit(chromium, written[name].as_uri(), screen, scheme) as visit:
        page = visit.page
        assert visit.said == []
        assert page.title() != "run"
        assert page.evaluate("document.documentElement.scrollWidth") == SCREENS[screen][0]
        assert page.evaluate(OUTSIDE) == []
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        texts = page.evaluate(READABLE)
        assert len(texts) > 40
        assert [text for text in texts if text["contrast"] < CONTRAST] == []
        assert [text for text in texts if text["size"] < 9.5] == []


@pytest.mark.parametrize("screen", SCREENS)
def test_every_plot_is_drawn(chromium, written, screen):
    lengths = "[...document.querySelectorAll('figure')].map(figure => [...figure.querySelectorAll('path')]"
    lengths += (
        ".filter(path => path.getBoundingClientRect().width > 100 && path.style.stroke.includes('series')).length)"
    )
    with Visit(chromium, written["whole"].as_uri(), screen) as visit:
        drawn = visit.page.evaluate(lengths)
    assert len(drawn) == 6
    assert min(drawn) >= 1


def test_dark_is_dark(chromium, written):
    brightness = {}
    for scheme in ("light", "dark"):
        with Visit(chromium, written["whole"].as_uri(), scheme=scheme) as visit:
            brightness[scheme] = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert brightness == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}


def test_a_wide_table_scrolls_inside_itself(chromium, written):
    state = "(() => { const box = document.querySelector('#runs .scroll'); return [box.scrollLeft, scrollX] })()"
    with Visit(chromium, written["overview"].as_uri(), "phone") as visit:
        visit.page.focus("#runs .scroll")
        for _ in range(5):
            visit.page.keyboard.press("ArrowRight")
        visit.page.wait_for_function("document.querySelector('#runs .scroll').scrollLeft > 0")
        assert visit.page.evaluate(state)[1] == 0


def test_the_keyboard_reaches_everything(chromium, written):
    """Tab comes by every link, every fold and every table, each with a visible mark; Enter opens a fold."""
    at = "(() => { const e = document.activeElement; return [e.tagName, getComputedStyle(e).outlineStyle] })()"
    wanted = "document.querySelectorAll('a[href], summary, [tabindex=\"0\"]').length"
    with Visit(chromium, written["whole"].as_uri()) as visit:
        page = visit.page
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        count = page.evaluate(wanted)
        seen = []
        for _ in range(count):
            page.keyboard.press("Tab")
            seen.append(page.evaluate(at))
        assert {tag for tag, _ in seen} >= {"A", "SUMMARY", "DIV"}
        assert "BODY" not in {tag for tag, _ in seen}
        assert {outline for _, outline in seen} == {"solid"}
        page.focus("#plots summary")
        page.keyboard.press("Enter")
        assert page.evaluate("document.querySelector('#plots details').open") is False


def test_a_page_is_small(written, tmp_path):
    """A run of 200 steps, and all of 200 runs: what a browser opens at once."""
    assert written["whole"].stat().st_size < 1_000_000
    first = write_run(tmp_path, "run-000", steps=200, every=20)
    for number in range(1, 200):
        folder = tmp_path / f"run-{number:03}"
        folder.mkdir()
        for name in ("manifest.json", "metrics.jsonl"):
            shutil.copy(first / name, folder / name)
    overview, count = pages.write_overview(tmp_path)
    assert count == 200
    assert overview.stat().st_size < 1_500_000
