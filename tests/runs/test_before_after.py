from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.train import metrics
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.runs import run_tiny
from tools.export.before_after import TrainingText, repeated_share, responses, write_card
from tools.runs import trained

TEXT = TrainingText(
    [
        ("rows.jsonl:1", "The fox walks downhill, feeling for the slope with one careful paw at a time."),
        ("rows.jsonl:2", "A student learns the answers by heart and then fails the real exam."),
    ]
)


def test_the_longest_copy_is_found_whatever_its_case_and_punctuation():
    found = TEXT.longest_copy("So: a STUDENT learns the answers, by heart! And then?")
    assert (found.words, found.where) == (9, "rows.jsonl:2")
    assert found.text == "a student learns the answers by heart and then"


def test_a_copy_is_of_one_response_and_in_one_piece():
    found = TEXT.longest_copy("Fails the real exam. The fox walks downhill, then fails the real student.")
    assert (found.words, found.where) == (4, "rows.jsonl:2")  # "exam the fox walks" stands in no single response
    assert TEXT.longest_copy("Nothing of this.").words == 0


def test_known_and_repeated_phrases_are_shares_of_the_answer():
    assert TEXT.known_share("The fox walks downhill feeling nothing at all") == pytest.approx(1 / 4)
    assert TEXT.known_share("Too short") == 0
    assert repeated_share("one two three four") == 0
    assert repeated_share("again and again and again and again and again") == pytest.approx(4 / 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        recipe = make_tiny_recipe(tmp_path_factory.mktemp("recipes") / "tiny", tiny_base)
        yield run_tiny(recipe, tmp_path_factory.mktemp("runs"))


def trained_rows(run: Path) -> list[tuple[str, str]]:
    return list(responses(trained.read(run, print)))


def rewrite_answers(run: Path, *answers: str) -> None:
    path = run / "evaluations.jsonl"
    records = metrics.read(path)
    for sample, answer in zip(records[-1]["samples"], answers, strict=True):
        sample["answer"] = answer
        del sample["tokens"]  # that of the answer it was
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_run_s_own_card_has_its_losses_and_every_prompt(run):
    text = (run / "before_after.md").read_text()
    losses = [record["eval_loss"] for record in metrics.read(run / "metrics.jsonl") if "eval_loss" in record]

    assert f"Held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}" in text
    assert text.count("**trained**") == 4
    assert "not checked" not in text


def test_the_responses_are_read_as_they_were_trained_on(run):
    rows = trained_rows(run)
    assert len(rows) == 14
    assert all(text.startswith("The ") and text.endswith("then rests.") for _, text in rows)


def test_copies_markers_and_cut_answers_are_named(run):
    where, response = trained_rows(run)[3]
    rewrite_answers(run, f"Well. {response}", "Steps <|user|> downhill", "New.", "word " * 40)
    lines: list[str] = []
    path = write_card(trained.read(run, lines.append), lines.append)
    assert path is not None
    rows = [line for line in path.read_text().splitlines() if line.startswith(("| 1", "| 2", "| 3", "| 4"))]

    assert "1 verbatim, 1 with template markers, 2 cut off" in lines[-1]
    assert "verbatim**" in rows[0]
    assert f"out of {where}" in path.read_text()
    assert where.rpartition(":")[2].isdigit()
    assert "`<|user|>`" in rows[1]
    assert rows[2].endswith("| none | no |")
    assert "| 97 % | none | yes |" in rows[3]


def test_without_the_training_rows_the_card_says_that_nothing_was_checked(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))  # no stored tokens, and no recipe to make them again from
    other = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "recipe_dir": str(tmp_path / "gone")}))
    lines: list[str] = []
    path = write_card(trained.read(other, lines.append), lines.append)

    assert "no check for memorized answers" in lines[0]
    assert path is not None
    assert "nothing below was checked" in path.read_text()


def test_a_run_that_was_never_evaluated_has_no_card(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    (other / "evaluations.jsonl").write_text("")
    lines: list[str] = []
    assert write_card(trained.read(other, lines.append), lines.append) is None
    assert "no evaluation of the untrained model" in lines[0]
    assert (other / "before_after.md").read_text() == (run / "before_after.md").read_text(), "nothing is overwritten"


def test_answers_are_paired_by_their_prompt(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    path = other / "evaluations.jsonl"
    records = metrics.read(path)
    dropped, *kept = records[0]["samples"]
    records[0]["samples"] = [{**sample, "answer": f"old: {sample['prompt']}"} for sample in reversed(kept)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_card(trained.read(other, print), print)
    text = (other / "before_after.md").read_text()
    assert dropped["prompt"] not in text, "it was not asked before"
    for sample in kept:
        assert f". {sample['prompt']}\n\n**base**\n\n> old: {sample['prompt']}" in text
