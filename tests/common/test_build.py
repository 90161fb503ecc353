from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from common import config, hardware
from common.data import build
from common.data.chat import ChatTokenizer
from common.data.rows import Message, Row
from common.errors import DataError, UsageError
from tests.support.data_recipe import DATASET, make_recipe
from tools.recipes import load_dataset


@pytest.fixture
def recipe(tmp_path) -> Path:
    return make_recipe(tmp_path / "recipe")


@pytest.fixture
def tokenizer(tiny_base) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_base)


def built(recipe: Path, tokenizer: ChatTokenizer, *overrides: str, home: Path | None = None):
    loaded = config.load(recipe, hardware.get("cpu"), overrides)
    parts = build.read_splits(load_dataset(recipe)[0], loaded, recipe)
    return build.build(loaded, parts, tokenizer, recipe, home or recipe.parent / "home")


def test_a_recipe_becomes_tokens_and_is_reused(recipe, tokenizer):
    first = built(recipe, tokenizer)
    assert first.report.action == "built"
    assert len(first.train) + len(first.held_out) == 24
    assert len(first.held_out) % 2 == 0
    row = first.train.row(0)
    assert tokenizer.decode(row.ids[row.mask == 1]).startswith("It is number")
    second = built(recipe, tokenizer)
    assert second.report.action == "reused"
    assert second.report.lines()[1:] == first.report.lines()[1:]
    assert second.tokens_sha256 == first.tokens_sha256
    assert first.folder == recipe.parent / "home/tokens" / first.source_key[:16]


def test_where_each_row_stands_is_kept_beside_the_tokens(recipe, tokenizer):
    made = built(recipe, tokenizer)
    texts = (recipe / "rows.jsonl").read_text().splitlines()
    found = [place for name in ("train", "held_out") for place in made.places(name)]
    assert sorted(found) == sorted(f"{recipe / 'rows.jsonl'}:{number}" for number in range(1, 25))
    for at, place in enumerate(made.places("train")):
        row = made.train.row(at)
        answer = tokenizer.decode(row.ids[row.mask == 1], skip_special=True).strip()
        assert answer in texts[int(place.rpartition(":")[2]) - 1]


def touch_rows(recipe: Path) -> None:
    path = recipe / "rows.jsonl"
    path.write_text(path.read_text().replace("a fox knows", "any fox knows"))


def touch_builder(recipe: Path) -> None:
    (recipe / "dataset.py").write_text(DATASET.replace("list(zip(rows, groups))", "list(zip(rows, groups))[1:]"))


@pytest.mark.parametrize("change", [touch_rows, touch_builder])
def test_other_rows_are_built_again_whoever_changed_them(recipe, tokenizer, change):
    first = built(recipe, tokenizer)
    change(recipe)
    second = built(recipe, tokenizer)
    assert second.report.action == "built"
    assert second.source_key != first.source_key


@pytest.mark.parametrize(
    "override",
    [
        "data_config.max_length=64",
        "data_config.system_prompt=Be brief.",
        "data_config.control=shuffled_words",
        "data_config.held_out_share=0.5",
        "data_config.supervise_all=true",
    ],
)
def test_every_option_that_shapes_tokens_is_in_the_key(recipe, tokenizer, override):
    assert built(recipe, tokenizer).source_key != built(recipe, tokenizer, override).source_key


def test_another_template_is_another_key(recipe, tokenizer, tiny_base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "chat_template.jinja").write_text(tokenizer.template + "{# changed #}")
    assert built(recipe, tokenizer).source_key != built(recipe, ChatTokenizer.load(other)).source_key


def test_training_options_and_the_place_of_the_recipe_are_not_in_the_key(recipe, tokenizer, tmp_path):
    first = built(recipe, tokenizer)
    moved = make_recipe(tmp_path / "elsewhere" / "copy")
    second = built(
        moved, tokenizer, "training_config.seed=3", "training_config.learning_rate=1", home=tmp_path / "home"
    )
    assert (second.report.action, second.source_key) == ("reused", first.source_key)


def test_damaged_tokens_are_built_again_and_it_is_said(recipe, tokenizer):
    first = built(recipe, tokenizer)
    path = first.folder / "train.ids.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = built(recipe, tokenizer)
    assert second.report.action == "rebuilt"
    assert "did not verify" in second.report.reason
    assert second.tokens_sha256 == first.tokens_sha256
    assert built(recipe, tokenizer).report.action == "reused"


def test_too_few_rows_for_a_batch_names_both_numbers(recipe, tokenizer):
    for _ in range(2):  # the second time from the stored tokens
        with pytest.raises(DataError, match=r"\d+ training rows do not fill one batch of 64") as error:
            built(recipe, tokenizer, "training_config.batch_size=64")
    assert "training_config.batch_size" in str(error.value.todo)


def test_the_system_prompt_reaches_every_row(recipe, tokenizer):
    dataset = built(recipe, tokenizer, "data_config.system_prompt=Be brief.")
    assert all("Be brief." in tokenizer.decode(dataset.train.row(at).ids) for at in range(len(dataset.train)))


def test_prompts_are_trained_on_only_with_supervise_all(recipe, tokenizer):
    everything = built(recipe, tokenizer, "data_config.supervise_all=true")
    assert everything.report.supervised_share == 1.0
    assert 0 < built(recipe, tokenizer).report.supervised_share < 1


def test_rows_cut_are_listed_and_counted(tokenizer, tmp_path):
    recipe = make_recipe(tmp_path / "recipe", answer="It is {n}. " + "And so on. " * 20)
    for _ in range(2):  # the second time from the stored tokens
        report = built(recipe, tokenizer, "data_config.max_length=64").report
        assert len(report.cut) == 24
        assert report.length == 64
        assert "rows.jsonl:" in report.cut[0]["where"]
        assert "and 14 more" in report.lines()[-1]


def test_rows_that_the_tokenizing_loses_are_an_error(recipe, tokenizer):
    def but_the_last(asked, rows, options, _split):
        return list(asked.encode_rows(rows, *options))[:-1]

    loaded = config.load(recipe, hardware.get("cpu"))
    parts = build.read_splits(load_dataset(recipe)[0], loaded, recipe)
    with pytest.raises(ValueError, match="shorter"):
        build.build(loaded, parts, tokenizer, recipe, recipe.parent / "home", but_the_last)


def test_a_control_changes_the_training_rows_only(recipe, tokenizer):
    plain, control = (
        built(recipe, tokenizer),
        built(recipe, tokenizer, "data_config.control=permuted_responses"),
    )
    same = [np.array_equal(plain.train.row(at).ids, control.train.row(at).ids) for at in range(len(plain.train))]
    assert not any(same)
    assert np.array_equal(plain.held_out.arrays.ids, control.held_out.arrays.ids)


@pytest.mark.parametrize(
    ("code", "message", "place"),
    [
        (DATASET.replace("rows = ", "rows = json."), "name 'json' is not defined", ":5"),
        ("def splits(:", "SyntaxError", ":1"),
        ("x = 1\nimport nothing_of_the_kind", "nothing_of_the_kind", ":2"),
        ("", "no function splits", "dataset.py"),
        ("def splits(config, recipe_dir):\n    return config.data.nothing", "AttributeError", ":2"),
        ("def splits(config, recipe_dir):\n    return []", "must return a dict", "dataset.py"),
        ("def splits(config, recipe_dir):\n    return {'train': [{}]}", "a dict, not a Row", "dataset.py"),
        ("def splits(config, recipe_dir):\n    return {'train': []}", "no training row", "rows.jsonl"),
        (
            "def splits(config, recipe_dir):\n    return {'train': [], 'test': []}",
            "must return",
            "dataset.py",
        ),
    ],
)
def test_a_fault_in_the_builder_is_named_with_its_line(recipe, tokenizer, code, message, place):
    (recipe / "dataset.py").write_text(code if "def prompts" in code else f"{code}\nprompts = None")
    with pytest.raises(DataError, match=message) as error:
        built(recipe, tokenizer)
    assert place in str(error.value.where)


def test_missing_builder_and_missing_source_are_errors_of_the_data(recipe, tokenizer):
    (recipe / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="cannot read the file") as error:
        built(recipe, tokenizer)
    assert "rows.jsonl" in str(error.value.where)
    (recipe / "dataset.py").unlink()
    with pytest.raises(DataError, match=r"no dataset\.py"):
        built(recipe, tokenizer)


def test_errors_of_the_builder_keep_their_kind(recipe, tokenizer):
    code = "from common.errors import UsageError\n\ndef splits(*_):\n    raise UsageError('not like this')\n"
    (recipe / "dataset.py").write_text(f"{code}\nprompts = None\n")
    with pytest.raises(UsageError, match="not like this"):
        built(recipe, tokenizer)


def build_in_process(recipe: str, base: str, results: multiprocessing.Queue) -> None:
    dataset = built(Path(recipe), ChatTokenizer.load(Path(base)))
    results.put((dataset.tokens_sha256, len(dataset.train)))


def test_processes_that_build_at_once_get_the_same_whole_data_set(recipe, tiny_base):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=build_in_process, args=(str(recipe), str(tiny_base), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert len({results.get(timeout=60) for _ in workers}) == 1
    for worker in workers:
        worker.join()
    assert len(list((recipe.parent / "home/tokens").glob("[!.]*"))) == 1


def test_what_is_not_trained_on_is_in_the_key_and_without_it_the_key_is_as_it_was():
    turns = (Message("user", "a"), Message("assistant", "b"))
    plain = [Row((*turns, *turns), {}, "f:1")]
    masked = [Row((turns[0], Message("assistant", "b", trained=False), *turns), {}, "f:1")]
    assert build.rows_sha256(plain) != build.rows_sha256(masked)
    expected = "f:1\nuser assistant user assistant\n7\n\na\xffb\xffa\xffb"
    assert build.rows_sha256(plain) == hashlib.sha256(expected.encode("latin-1")).hexdigest()


def test_tools_and_calls_are_in_the_key_of_the_tokens():
    call = {"type": "function", "function": {"name": "sky", "arguments": {"at": "a"}}}

    def key(arguments: dict[str, str] | None, tools: list[dict[str, object]]) -> str:
        called = {**call, "function": {"name": "sky", "arguments": arguments}}
        said = Message("assistant", "So.", fields={"tool_calls": [called]} if arguments else None)
        return build.rows_sha256([Row((Message("user", "Why?"), said), {}, "f:1", tools)])

    tool: dict[str, object] = {"type": "function", "function": {"name": "sky"}}
    keys = [key(None, []), key({"at": "a"}, []), key({"at": "b"}, []), key(None, [tool])]
    assert len(set(keys)) == 4
    assert key({"at": "a"}, []) == keys[1]
