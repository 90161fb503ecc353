"""`recipe export --readers` on tiny runs: with this environment's own transformers and PEFT in the readers' place, and
with the real ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.errors import MachineError, Stopped
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import newest_run, run_tiny
from tools.cli.main import recipe as recipe_command
from tools.export import model_card, reading
from tools.export.readers import ask, environment, questions
from tools.export.readers.compare import Row
from tools.export.readers.table import READERS
from tools.export.record import verified

OURS = ("transformers-5", "peft")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_base) -> Path:
    """A LoRA run that exported itself at its end; copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    return run_tiny(make_tiny_recipe(folder / "tiny", tiny_base), folder / "runs")


@pytest.fixture
def run(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / exported.name))


@pytest.fixture
def here(monkeypatch) -> None:
    """This Python, with its transformers and PEFT, in every reader's place."""
    monkeypatch.setattr(ask, "python_of", lambda lock, say: Path(sys.executable))


def recipe(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(recipe_command, [str(word) for word in words], standalone_mode=False)
    if result.exception is None:
        return 0, result.output
    return getattr(result.exception, "code", 1), result.output + str(result.exception)


def rows(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "export" / "export.json").read_text())["readers"]


def test_what_readers_found_is_printed_and_kept_with_the_export_that_stays_verified(run, here):
    code, said = recipe("export", run, "--readers", *OURS)

    assert code == 0, said
    assert {name: (row["verdict"], row["reason"]) for name, row in rows(run).items()} == dict.fromkeys(
        OURS, ("agrees", "")
    )
    cells = rows(run)["transformers-5"]["cells"]
    assert (cells["ids"], cells["chat"], cells["snippet"]) == ("24 of 24", "6 of 6", "as it says")
    assert float(cells["logits"]) < 1e-4
    assert verified(run)["verified"]
    merged, adapter = ((run / "export" / name / "README.md").read_text() for name in ("merged", "adapter"))
    assert "| transformers 5" in merged
    assert "| peft" in adapter
    assert "| peft" not in merged
    assert "| transformers 5" in said


def test_asked_again_the_card_has_one_table_and_the_rows_of_both_times(run, here):
    recipe("export", run, "--readers", "peft")
    recipe("export", run, "--readers", "transformers-5")
    recipe("export", run, "--readers", "transformers-5")

    assert set(rows(run)) == set(OURS)
    assert (run / "export/merged/README.md").read_text().count(reading.HEADING) == 1


def test_a_run_in_bf16_is_read_as_its_merged_model_is_and_its_adapter_over_a_base_that_nobody_rounded(
    tiny_base, here, tmp_path
):
    recipe_folder = make_tiny_recipe(tmp_path / "tiny", tiny_base)
    folder = run_tiny(recipe_folder, tmp_path / "runs", "training_config.precision=bf16")
    code, said = recipe("export", folder, "--readers", *OURS)

    assert code == 0, said
    assert {name: (row["verdict"], row["cells"]["snippet"]) for name, row in rows(folder).items()} == dict.fromkeys(
        OURS, ("agrees", "as it says")
    ), said
    assert max(float(row["cells"]["logits"]) for row in rows(folder).values()) < 1e-4


def test_a_run_that_was_stopped_before_an_evaluation_has_a_card_of_another_prompt(tiny_base, here, tmp_path):
    with pytest.raises(Stopped):
        run_tiny(make_tiny_recipe(tmp_path / "tiny", tiny_base), tmp_path / "runs", stop_at=2)
    folder = newest_run(tmp_path / "runs")
    code, said = recipe("export", folder, "--readers", "transformers-5")

    assert "Hello!" in (folder / "export/merged/README.md").read_text()
    assert (code, rows(folder)["transformers-5"]["cells"]["snippet"]) == (0, "as it says"), said


def test_a_model_that_a_reader_reads_otherwise_is_a_failure(run, here):
    """The rotary base where transformers before version 5 do not look, as seen by this one: another base."""
    path = run / "export" / "merged" / "config.json"
    expected = questions.expected_of

    def then_changed(*given):
        found = expected(*given)
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 3.0, "rope_parameters": None}))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "expected_of", then_changed)
        code, said = recipe("export", run, "--readers", "transformers-5")

    assert (code, rows(run)["transformers-5"]["verdict"]) == (6, "differs")
    assert "read otherwise than here by transformers-5" in said


def test_what_another_reader_found_at_an_earlier_time_is_no_failure_of_this_one(run, monkeypatch):
    verdicts = iter(["differs", "agrees"])
    monkeypatch.setattr(reading, "row_of", lambda reader, *_: Row(reader.name, "1", reader.opens, next(verdicts)))

    assert recipe("export", run, "--readers", "transformers-5")[0] == 6
    code, said = recipe("export", run, "--readers", "peft")
    assert code == 0, said
    assert "differs" in said, "the table has both"


def test_the_code_of_a_card_that_names_a_base_of_the_hub_runs_over_the_copy_that_is_here(run, here, monkeypatch):
    monkeypatch.setattr(model_card, "hub_id", lambda _run: "owner/name")
    shutil.rmtree(run / "export")
    code, said = recipe("export", run, "--readers", "peft")

    assert 'from_pretrained("owner/name")' in (run / "export/adapter/README.md").read_text()
    assert (code, rows(run)["peft"]["cells"]["snippet"]) == (0, "as it says"), said


def test_a_folder_that_a_reader_cannot_open_is_a_row(run, here, monkeypatch):
    monkeypatch.setattr(reading, "opened_by", lambda *given: {"folder": "/nowhere"})
    code, said = recipe("export", run, "--readers", "transformers-5")

    assert (code, rows(run)["transformers-5"]["verdict"]) == (0, "refuses")
    assert "cannot open it" in said


def test_a_reader_that_cannot_be_had_is_not_tried_and_never_good(run, monkeypatch):
    def nowhere(lock, say):
        raise MachineError("could not be set up: no network")

    monkeypatch.setattr(ask, "python_of", nowhere)
    code, said = recipe("export", run, "--readers")

    assert code == 0
    assert {row["verdict"] for row in rows(run).values()} == {"not tried"}
    assert set(rows(run)) == {reader.name for reader in READERS}
    assert "not tried: could not be set up: no network" in said


def test_the_words_of_the_command(run):
    assert "choose among" in recipe("export", run, "--readers", "ollama")[1]
    assert recipe("export", run, "vllm")[0] == 2
    assert recipe("export", run, "--readers", "--check")[0] == 2


# --- the real ones --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_every_reader_reads_a_tiny_run_as_we_do_and_each_card_s_code_runs(run, name):
    (reader,) = [one for one in READERS if one.name == name]
    try:
        environment.python_of(reader.lock, print)
    except MachineError as error:
        pytest.skip(f"{reader.version} cannot be had here: {error.what}")
    code, said = recipe("export", run, "--readers", name)
    row = rows(run)[name]

    assert (code, row["verdict"]) == (0, "agrees"), said
    assert row["cells"].get("ids", "24 of 24") == "24 of 24"
    if reader.probe in ("transformers", "peft"):
        assert row["cells"]["snippet"] == "as it says"
