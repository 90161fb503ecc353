"""`recipe runs`: the list, the curve in the terminal, what may be compared, and what prune may delete."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from click.testing import CliRunner, Result

from common.errors import UsageError
from tests.support.run_folders import held, write_checkpoint, write_lines, write_run
from tools.cli.main import recipe
from tools.runs.compare import groups, verdict
from tools.runs.folder import read_run as read

OTHER_TOKENIZER: dict[str, Any] = {"tokenizer_sha256": "d" * 64}


def command(*words: object, typed: str | None = None) -> Result:
    result = CliRunner().invoke(recipe, [str(word) for word in words], input=typed)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- list and show ------------------------------------------------------------------------------------------------


def test_the_list_has_every_run_with_its_state_and_uncut_figures(tmp_path):
    name = "20260101T000000Z-" + "a-recipe-with-a-long-name-" * 3 + "cpu-0000"
    write_run(tmp_path, name)
    write_run(tmp_path, "b", exit_reason="stopped: by --stop-at 9")
    (tmp_path / "no-run").mkdir()
    lines = command("runs", "list", "--out", tmp_path).output.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:2] == ["b", "stopped"]
    assert lines[2].split()[:2] == [name, "done"]
    found = json.loads(command("runs", "list", "--out", tmp_path, "--json").output)
    assert [(entry["run"], entry["step"]) for entry in found] == [("b", 40), (name, 40)]


def test_json_has_no_nan(tmp_path):
    folder = write_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN}\n')
    (found,) = json.loads(command("runs", "list", "--out", tmp_path, "--json").output, parse_constant=pytest.fail)
    assert (found["step"], found["training_loss"]) == (41, None)


def test_show_draws_the_curve(tmp_path):
    output = command("runs", "show", write_run(tmp_path)).output
    assert "held-out loss          3.6" in output
    dots = [line for line in output.splitlines() if any("⠀" < sign <= "⣿" for sign in line)]
    assert len(dots) > 8
    assert max(line.count("o") for line in dots) >= 1
    assert "\x1b" not in output  # no colour where no terminal is


@pytest.mark.parametrize("lines", [0, 1])
def test_show_says_what_it_cannot_draw(tmp_path, lines):
    folder = write_run(tmp_path)
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:lines]) + '{"step": 4')
    output = command("runs", "show", folder).output
    assert "the last line is cut off" in output
    assert "no loss was recorded" in output


def test_a_first_loss_that_held_explains_nothing_and_one_that_did_not_does(tmp_path):
    folder = write_run(tmp_path)
    said = "2026-01-01T00:00:00Z the first loss is 6.9461; untrained weights give 6.97 ± 0.19\n"
    (folder / "train.log").write_text(said)
    assert "nothing that is known" in command("explain", folder).output
    (folder / "train.log").write_text(said.replace("Z the", "Z run ends: failed: the"))
    assert "first-loss (train.log:1" in command("explain", folder).output


# --- compare ------------------------------------------------------------------------------------------------------


def test_a_gap_is_paired_by_row_and_measured_against_noise(tmp_path):
    base, better = write_run(tmp_path, "base"), write_run(tmp_path, "better", better=0.02)
    found = verdict(read(base), read(better))
    assert found.measure == "held-out loss"
    assert found.gap == pytest.approx(0.02, rel=0.1)
    assert found.error < 0.01  # unpaired it would be 0.05
    assert found.exceeds_noise is True
    assert verdict(read(better), read(base)).gap == pytest.approx(-found.gap)
    assert verdict(read(base), read(write_run(tmp_path, "same"))).exceeds_noise is False


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (OTHER_TOKENIZER, "another tokenizer (bbbbbbbb, dddddddd)"),
        ({"data": {"tokens_sha256": "f" * 64, "length": 128}}, "other tokens (aaaaaaaa, ffffffff)"),
        ({"data": {"tokens_sha256": "a" * 64, "length": 256}}, "another length (128, 256)"),
        ({"data": None}, "data.tokens_sha256 is not recorded"),
    ],
)
def test_losses_of_unlike_runs_are_not_compared(tmp_path, manifest, reason):
    base, other = write_run(tmp_path, "base"), write_run(tmp_path, "other", better=1.0, **manifest)
    found = verdict(read(base), read(other))
    assert found.measure != "held-out loss"
    assert reason in found.sentence()
    assert len(groups([read(base), read(other)])) == 2


def test_bits_per_byte_compare_tokenizers_on_the_same_text_only(tmp_path):
    base = write_run(tmp_path, "base")
    found = verdict(read(base), read(write_run(tmp_path, "other", better=0.2, **OTHER_TOKENIZER)))
    assert found.measure == "bits per byte"
    assert found.gap == pytest.approx(0.2 / math.log(2) / 2, rel=0.05)
    assert found.error == pytest.approx(0.02 * math.sqrt(2))
    assert found.exceeds_noise is True
    text = {"tokens_sha256": "f" * 64, "length": 128, "corpus": {"held_out": {"sha256": "1" * 64}}}
    assert verdict(read(base), read(write_run(tmp_path, "elsewhere", data=text))).measure == ""


def test_other_rows_under_the_same_hashes_are_no_pairs(tmp_path):
    base, other = write_run(tmp_path, "base"), write_run(tmp_path, "other")
    entry = {"step": 40, "nll": [300.0] * 8, "tokens": [100.0] * 8, "samples": []}
    write_lines(other / "evaluations.jsonl", [entry])
    assert "other held-out rows (16 and 8)" in verdict(read(base), read(other)).sentence()


def test_another_seed_and_another_step_are_said(tmp_path):
    base = write_run(tmp_path, "base")
    other = write_run(tmp_path, "other", steps=30, better=0.1, overrides=("training_config.seed=7",))
    said = verdict(read(base), read(other)).sentence()
    assert "they differ in the seed alone" in said
    assert "evaluated after other steps (40, 30)" in said


def test_the_command_prints_figures_config_and_verdict_and_draws_a_page(tmp_path):
    base = write_run(tmp_path, "base")
    other = write_run(tmp_path, "other", better=0.02, overrides=("training_config.learning_rate=0.5",))
    output = command("runs", "compare", base, other, "--html", tmp_path / "page.html").output
    assert "training_config.learning_rate: " in output
    assert "| 0.5" in output
    assert "beyond the noise of the held-out rows" in output
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "training_config.learning_rate" in page
    found = json.loads(command("runs", "compare", base, other, "--json").output)
    assert found["verdicts"][0]["exceeds_noise"] is True


def test_one_run_is_no_comparison(tmp_path):
    with pytest.raises(UsageError, match="nothing to be compared with"):
        command("runs", "compare", write_run(tmp_path))


# --- prune --------------------------------------------------------------------------------------------------------


def kept(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def files(folder) -> dict[str, bytes]:
    """Everything in a run but its checkpoints, its export and the lock."""
    places = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in places}


def test_prune_deletes_old_checkpoints_and_nothing_else(tmp_path):
    folder = write_run(tmp_path, checkpoints=(10, 20, 30, 40))
    (folder / "report.html").write_text("a page")
    (folder / "export").mkdir()
    before = files(folder)
    assert "deleted: 0.0 MB" in command("runs", "prune", "--out", tmp_path, "--yes").output
    assert kept(folder) == [40]
    assert files(folder) == before
    assert (folder / "export").is_dir()
    command("runs", "prune", folder, "--exports", "--yes")
    assert not (folder / "export").exists()
    assert files(folder) == before


@pytest.mark.parametrize(("typed", "left"), [("n\n", [10, 40]), ("", [10, 40]), ("y\n", [40])])
def test_prune_asks(tmp_path, typed, left):
    folder = write_run(tmp_path, checkpoints=(10, 40))
    output = command("runs", "prune", "--out", tmp_path, typed=typed).output
    assert "step-00000010" in output
    assert kept(folder) == left


def test_prune_leaves_a_running_run_alone_even_by_name(tmp_path):
    folder = write_run(tmp_path, checkpoints=(10, 40), exit_reason="running")
    with held(folder):
        output = command("runs", "prune", folder, "--keep", "0", "--yes").output
    assert "is running: not touched" in output
    assert kept(folder) == [10, 40]


def test_what_an_unfinished_run_goes_on_from_stays_unless_it_is_named(tmp_path):
    done = write_run(tmp_path, "done", checkpoints=(40,))
    stopped = write_run(tmp_path, "stopped", checkpoints=(10, 20), exit_reason="stopped: by SIGTERM")
    output = command("runs", "prune", "--out", tmp_path, "--keep", "0", "--yes").output
    assert "stopped is not done: it keeps a checkpoint" in output
    assert (kept(done), kept(stopped)) == ([], [20])
    command("runs", "prune", stopped, "--keep", "0", "--yes")
    assert kept(stopped) == []


def test_a_damaged_newest_checkpoint_does_not_cost_the_one_that_verifies(tmp_path):
    folder = write_run(tmp_path, checkpoints=(10, 20), exit_reason="running")
    (write_checkpoint(folder, 30) / "state.json").write_text("{")
    command("runs", "prune", "--out", tmp_path, "--yes")
    assert kept(folder) == [20, 30]


def test_a_run_whose_config_cannot_be_read_is_not_touched(tmp_path):
    folder = write_run(tmp_path, checkpoints=(10, 20))
    (folder / "config.resolved.yaml").write_text("format: 9\n")
    assert "not touched" in command("runs", "prune", folder, "--keep", "0", "--yes").output
    assert kept(folder) == [10, 20]


def test_with_keep_best_the_best_one_stays(tmp_path):
    folder = write_run(tmp_path, checkpoints=(10, 20, 40), overrides=("checkpoint_config.keep_best=true",))
    entries = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    best = [{**entry, "nll": [1.0] * 16} if entry["step"] == 20 else entry for entry in entries]
    write_lines(folder / "evaluations.jsonl", best)
    command("runs", "prune", folder, "--yes")
    assert kept(folder) == [20, 40]


def test_what_a_prune_that_was_cut_off_left_goes_with_the_next(tmp_path):
    folder = write_run(tmp_path, checkpoints=(40,))
    (folder / "checkpoints" / ".pruned-step-00000010").mkdir()
    command("runs", "prune", folder, "--yes")
    assert not list((folder / "checkpoints").glob(".pruned*"))
    assert kept(folder) == [40]
