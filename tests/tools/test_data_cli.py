from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common.errors import DataError, UsageError
from tests.support.data_recipe import make_recipe
from tools.cli import data


@pytest.fixture
def recipe(tmp_path, tiny_base, monkeypatch) -> Path:
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECIPES_SYSFS_ROOT", str(tmp_path / "no-devices"))
    monkeypatch.delenv("HW", raising=False)
    folder = make_recipe(tmp_path / "foxes")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("/nowhere", str(tiny_base)))
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(data.data, [str(word) for word in words])


def done(*words: object) -> str:
    result = run(*words)
    if result.exception:
        raise result.exception
    return result.stdout


def test_build_says_what_it_did_and_reuses(recipe):
    assert "data built" in done("build", recipe)
    assert "data reused" in done("build", recipe)
    report = json.loads(done("build", recipe, "--json"))
    assert report["action"] == "reused"
    assert sum(report["rows"].values()) == 24
    assert len(report["tokens_sha256"]) == 64


def test_overrides_and_hardware_reach_the_config(recipe):
    assert json.loads(done("build", recipe, "--json", "--set", "data_config.max_length=128"))["length"] == 128
    with pytest.raises(UsageError):
        done("build", recipe, "--set", "data_config.max_lengt=128")
    with pytest.raises(UsageError, match="n999"):
        done("build", recipe, "--hw", "n999")
    assert "data reused" in done("build", recipe, "--hw", "n150", "--set", "data_config.max_length=128")


def test_a_recipe_by_name_and_an_unknown_one(recipe, monkeypatch):
    monkeypatch.setattr("tools.recipes.RECIPES", recipe.parent)
    assert "data built" in done("build", "foxes")
    with pytest.raises(UsageError, match="no recipe") as error:
        done("build", "foxs")
    assert "did you mean foxes?" in str(error.value.todo)


def test_check_of_a_recipe_fails_on_errors_after_its_report(recipe):
    assert "errors: 0" in done("check", recipe)
    rows = recipe / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is number 3?", "What does <|user|> mean?"))
    result = run("check", recipe)
    assert "error D005" in result.stdout
    assert isinstance(result.exception, DataError)


def test_an_evaluation_prompt_that_is_trained_on_is_found(recipe):
    result = run("check", recipe, "--set", "eval_config.prompts=['what is number 1']", "--json")
    report = json.loads(result.stdout)
    assert {finding["id"] for finding in report["errors"]} <= {"D003"}
    found = [finding["id"] for finding in report["errors"] + report["warnings"]]
    assert {"D003", "D103"} & set(found)


def test_strict_turns_a_warning_into_failure_and_a_licence_line_ends_it(recipe):
    report = json.loads(done("check", recipe, "--json"))
    assert [finding["id"] for finding in report["warnings"]] == ["D119"]
    with pytest.raises(DataError, match="warnings: 1"):
        done("check", recipe, "--strict")
    (recipe / "README.md").write_text("# Foxes\n\n**Licence:** CC0\n")
    assert "warnings: 0" in done("check", recipe, "--strict")


def test_check_lists_every_bad_line_of_a_recipes_source(recipe):
    rows = recipe / "rows.jsonl"
    rows.write_text("no\n" * 15 + rows.read_text())
    result = run("check", recipe, "--json")
    report = json.loads(result.stdout)
    assert len(report["errors"][0]["where"]) == 15
    assert report["failed"]
    assert isinstance(result.exception, DataError)


def test_check_and_stats_take_a_file_of_rows(recipe, tiny_base, tmp_path):
    rows = recipe / "rows.jsonl"
    assert "D119" in done("check", rows)
    assert "tokens per row" not in done("stats", rows)
    assert "tokens per row" in done("stats", rows, "--base", tiny_base)
    other = tmp_path / "other.csv"
    other.write_text("ask,say\nWhy so?,Because it is.\n")
    assert "1 train" in done("stats", other, "--map", "prompt=ask", "--map", "response=say")
    with pytest.raises(DataError, match="1 row cannot be used"):
        done("stats", other)
    assert "error D001" in run("check", other).stdout


@pytest.mark.parametrize("name", ["gone.jsonl", "data/gone.CSV", "gone.json.gz"])
def test_a_file_that_is_gone_is_no_unknown_recipe(name):
    for verb in ("check", "stats"):
        with pytest.raises(DataError) as error:
            done(verb, name)
        assert (error.value.what, error.value.where) == ("no such file", name)


def test_options_without_a_meaning_are_refused(recipe):
    with pytest.raises(UsageError, match="--set"):
        done("stats", recipe / "rows.jsonl", "--set", "data_config.max_length=32")
    with pytest.raises(UsageError, match="--map"):
        done("stats", recipe, "--map", "prompt=a")
    with pytest.raises(UsageError, match="NAME=COLUMN"):
        done("stats", recipe / "rows.jsonl", "--map", "prompt")


def test_stats_of_a_recipe(recipe):
    text = done("stats", recipe)
    assert "steps per epoch" in text
    assert "length   padding   rows cut" in text
    assert json.loads(done("stats", recipe, "--json"))["tokens"]["needed_length"] % 32 == 0


def test_show_marks_what_is_supervised(recipe):
    text = done("show", recipe, "--step", 2, "--rows", 2)
    assert text.startswith("step 2: 4 rows of")
    assert text.count(">>It is number") == 2
    assert text.count("a fox knows it.</s><<") == 2
    assert "<|user|>\nWhat is number" in text
    assert "and 2 more rows" in text
    assert "rows.jsonl:" in text


def test_show_colours_what_is_supervised_on_a_terminal(recipe, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = done("show", recipe, "--step", 2, "--rows", 2)
    assert text.count("\x1b[32mIt is number") == 2
    assert text.count("a fox knows it.</s>\x1b[0m") == 2
    assert "\x1b[2m<|user|>" in text
    assert ">>" not in text


def test_convert(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("ask,say\na,b\n")
    out = tmp_path / "out.jsonl"
    words = ["convert", source, out, "--map", "prompt=ask", "--map", "response=say"]
    assert "1 rows from" in done(*words)
    assert json.loads(out.read_text()) == {"prompt": "a", "response": "b"}
    with pytest.raises(UsageError, match="exists"):
        done(*words)


def test_help_lists_the_verbs():
    text = done("--help")
    assert all(f"  {verb} " in text for verb in ("build", "check", "stats", "show", "convert"))


MARKED = '{"prompt": "What is <|im_end|>?", "response": "The end of a turn."}\n'


def test_check_of_a_file_finds_markers_of_bases_here_before_one_is_chosen(tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text(MARKED + MARKED.replace("<|im_end|>", "[INST]").replace("turn", "word"))
    result = run("check", rows)
    assert "error D008: 1 rows hold a marker" in result.stdout
    assert f"{rows}:1: '<|im_end|>' (SmolLM2)" in result.stdout
    assert f"{rows}:2: '[INST]' (Llama 2)" in result.stdout
    assert "--escape-markers" in result.stdout
    assert isinstance(result.exception, DataError)
    done("convert", rows, tmp_path / "out.jsonl", "--escape-markers")
    assert "errors: 0, warnings: 1" in done("check", tmp_path / "out.jsonl")


def test_check_of_a_file_names_its_dialect_and_says_a_fault_once(tmp_path):
    rows = tmp_path / "a.jsonl"
    good = '{"instruction": "Say why, %d.", "output": "So it is, %d."}\n'
    rows.write_text("".join(good % (n, n) for n in range(3)) + '{"instruction": "a", "output": ""}\n' * 40)
    result = run("check", rows)
    assert "read as Alpaca (LLaMA-Factory) (3 rows)" in result.stdout
    assert f"{rows}:4: 'output' is empty (40 rows, then a.jsonl:5, a.jsonl:6, a.jsonl:7, ...)" in result.stdout
    assert result.stdout.count("is empty") == 1
    assert len(json.loads(run("check", rows, "--json").stdout)["errors"][0]["where"]) == 40


def test_preferences_are_converted_for_the_chosen_answer_when_that_is_said(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n')
    with pytest.raises(DataError, match="--chosen"):
        done("convert", source, out)
    done("convert", source, out, "--chosen")
    assert json.loads(out.read_text()) == {"prompt": "Why?", "response": "So."}
