"""The tables of the READMEs, and the results.yaml files that they are made from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci import docs
from common import hardware
from common.errors import RecipeError, UsageError, VerificationError
from tests.doubles.tiny_recipe import FROM_SCRATCH
from tools.results.schema import DoubleOnly, load

ROOT = Path(__file__).resolve().parents[2]

MEASURED: dict[str, Any] = {
    "board": "cpu",
    "evidence": "measured",
    "what": "a test",
    "overrides": ["training_config.seed=1"],
    "date": "2026-11-22",
    "commit": "4e118d7",
    "machine": "a toaster",
    "loss_at": {1: 4.5, 20: 3.25},
}
PUBLISHED: dict[str, Any] = {
    "board": "p300c",
    "evidence": "published",
    "what": "a test",
    "stack": "tt-train v0.73",
    "source": "a page",
    "machine": "one chip",
    "loss_at": {1: 4.75},
}
DOUBLE = {"board": "n150", "evidence": "double only", "test": "tests/ci/test_docs.py"}


def write_results(folder: Path, *entries: dict[str, Any], **values: Any) -> None:
    tree = {"format": 1, "recipe": folder.name, "entries": list(entries)} | values
    # The dates as a person writes them: without quotes.
    folder.joinpath("results.yaml").write_text(yaml.safe_dump(tree).replace("'2026-11-22'", "2026-11-22"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The pages with tables and the recipe folders of this repository."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


@pytest.fixture
def folder(root: Path) -> Path:
    """One recipe of it, whose results a test writes."""
    return next(path.parent for path in sorted((root / "recipes").glob("*/config.yaml")))


def stale(root: Path) -> list[str]:
    return [path.name for path, text in docs.pages(root).items() if path.read_text(encoding="utf-8") != text]


def refresh(root: Path) -> None:
    for path, text in docs.pages(root).items():
        path.write_text(text, encoding="utf-8")


# --- this repository --------------------------------------------------------------------------------------------------


def test_the_tables_are_what_the_results_say() -> None:
    assert not stale(ROOT), "run `make docs`"


def test_a_test_that_stands_for_a_board_is_there() -> None:
    entries = [entry for found in docs.recipes(ROOT).values() for entry in found.entries]
    assert not [entry.test for entry in entries if isinstance(entry, DoubleOnly) and not (ROOT / entry.test).is_file()]


# --- what is caught ---------------------------------------------------------------------------------------------------


def test_a_changed_result_and_an_edited_table_are_stale(root: Path, folder: Path) -> None:
    page = root / "README.md"
    page.write_text(page.read_text().replace("double only", "measured", 1))
    assert stale(root) == ["README.md"]
    refresh(root)
    write_results(folder, MEASURED | {"loss_at": {7: 0.5}})
    assert stale(root) == ["README.md", "README.md", "board.md"], "the README, the gallery and the boards"
    refresh(root)
    assert not stale(root)


def test_a_recipe_that_is_deleted_leaves_the_tables_at_the_next_make_docs(root: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    assert len(stale(root)) == 3
    refresh(root)
    assert not stale(root)
    assert folder.name not in (root / "recipes/README.md").read_text() + (root / "docs/board.md").read_text()
    assert f"(recipes/{folder.name}" not in (root / "README.md").read_text(), "no link to what is gone"


def test_a_page_without_its_markers_is_refused(root: Path) -> None:
    page = root / "recipes/README.md"
    page.write_text(page.read_text().replace(docs.END, ""))
    with pytest.raises(UsageError, match="both markers"):
        docs.pages(root)


def test_a_recipe_without_results_is_told_what_to_write(root: Path, folder: Path) -> None:
    (folder / "results.yaml").unlink()
    with pytest.raises(UsageError, match=f"format: 1, recipe: {folder.name}, entries: "):
        docs.pages(root)
    (folder / "results.yaml").write_text("entries: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        docs.pages(root)


def without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        *((without(MEASURED, key), f"{key}: is required") for key in ("date", "commit", "machine", "overrides")),
        *((without(PUBLISHED, key), f"{key}: is required") for key in ("source", "stack", "machine")),
        (without(DOUBLE, "test"), "test: is required"),
        (without(MEASURED, "loss_at"), "no figure"),
        (MEASURED | {"source": "a page"}, "measured.source: unknown key"),
        (PUBLISHED | {"commit": "4e118d7"}, "published.commit: unknown key"),
        (DOUBLE | {"loss_at": {1: 4.5}}, "double only.loss_at: unknown key"),
        (MEASURED | {"evidence": "seen"}, "does not match any of the expected tags"),
        (MEASURED | {"board": "n151"}, "no board of hardware.yaml"),
        (MEASURED | {"commit": "main"}, "commit: String should match"),
        (MEASURED | {"loss_at": {0: 4.5}}, "greater than 0"),
        (MEASURED | {"files": [{"path": "../config.yaml", "sha256": "0" * 64}]}, "not a path below"),
    ],
)
def test_an_entry_names_what_its_class_needs_and_nothing_else(folder: Path, entry: dict[str, Any], words: str) -> None:
    write_results(folder, entry)
    with pytest.raises(UsageError) as error:
        load(folder)
    assert words in str(error.value)


def test_another_recipe_s_results_are_not_taken_over(folder: Path) -> None:
    copied = folder.rename(folder.with_name("my-domain"))
    with pytest.raises(UsageError, match="recipe: my-domain, entries:"):
        load(copied)


def test_a_later_format_is_refused_by_its_number(folder: Path) -> None:
    write_results(folder, format=2)
    with pytest.raises(UsageError, match="format"):
        load(folder)


def test_a_listed_file_is_there_and_has_its_hash(folder: Path) -> None:
    (folder / "results").mkdir(exist_ok=True)
    curve = folder / "results/a-curve.csv"
    listed = {"path": curve.name, "sha256": hashlib.sha256(b"1,4.5\n").hexdigest()}
    write_results(folder, MEASURED | {"files": [listed]})
    for content, words in ((None, "not there"), (b"1,4.6\n", "not the file")):
        if content:
            curve.write_bytes(content)
        with pytest.raises(VerificationError, match=words) as error:
            load(folder)
        assert isinstance(error.value, RecipeError)
    curve.write_bytes(b"1,4.5\n")
    load(folder)


# --- the tables -------------------------------------------------------------------------------------------------------


def test_each_cell_has_the_strongest_class_of_its_board(folder: Path) -> None:
    write_results(folder, DOUBLE, PUBLISHED, MEASURED, PUBLISHED | {"board": "cpu"}, DOUBLE | {"board": "cpu"})
    results = load(folder)
    cells = {board: results.evidence(board) for board in hardware.table()}
    expected = dict.fromkeys(cells, "never run")
    assert cells == expected | {"cpu": "measured", "n150": "double only", "p300c": "published"}
    table = docs.evidence({folder: results})
    assert f"| `p300c`: {hardware.get('p300c').title} | published |" in table
    assert f"| `t3k`: {hardware.get('t3k').title} | never run |" in table


def test_the_gallery_says_of_each_figure_whose_it_is(folder: Path) -> None:
    held_out = {
        "step": 20,
        "loss": 2.5,
        "standard_error": 0.25,
        "bits_per_byte": 3.5,
        "untrained": {"loss": 4.5},
        "gain": {"loss": 2.0, "standard_error": 0.125},
    }
    write_results(folder, MEASURED | {"held_out": held_out, "tokens_per_second": 12345.6, "steps": 20}, PUBLISHED)
    table = docs.gallery({folder: load(folder)})
    assert "**measured** on `cpu`: held-out loss 4.5 → 2.5 ± 0.25 at 20, gain 2 ± 0.125, 3.5 bits per byte" in table
    assert (
        "loss 4.5 at 1, 3.25 at 20; 12,346 tokens/s [1]<br>**published** elsewhere, on `p300c`: loss 4.75 at 1" in table
    )
    measured, published = table.splitlines()[-3::2]
    assert "`--steps 20`; `--set training_config.seed=1`; a toaster; measured 2026-11-22 at commit 4e118d7" in measured
    assert "not a run of this repository: tt-train v0.73, in a page" in published


def test_a_recipe_on_whose_boards_models_differ_names_them(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(FROM_SCRATCH, folder)  # which has a preset, as not every recipe does
    write_results(folder)
    (folder / "hw").mkdir()
    found = {folder: load(folder)}
    shutil.copy(next(folder.glob("presets/*.yaml")), folder / "presets/other.yaml")
    (folder / "hw/n300.yaml").write_text("device_config: {mesh_shape: [1, 4]}\n")  # more devices than it has
    assert "`other`" not in docs.overview(found)
    (folder / "hw/p150.yaml").write_text("model_config: {preset: other}\n")
    assert "parameters; `other`, " in docs.overview(found)
    (folder / "config.yaml").write_text("# nothing\n")
    with pytest.raises(UsageError, match="is required"):
        docs.overview(found)
