from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.data.chat import ChatTokenizer
from common.errors import DataError, UsageError
from common.train import metrics
from tests.doubles.tiny_recipe import PROMPTS, make_tiny_recipe
from tests.support.runs import run_tiny
from tools.generate.chat import Stream, talk


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_base) -> Path:
    return make_tiny_recipe(tmp_path_factory.mktemp("recipes") / "tiny", tiny_base)


@pytest.fixture(scope="module")
def run(tmp_path_factory, recipe) -> Path:
    return run_tiny(recipe, tmp_path_factory.mktemp("runs"))


def said(target: Path, *prompts: str, **options) -> list[str]:
    out = io.StringIO()
    talk(target, prompts, out=out, say=lambda line: None, **options)
    return out.getvalue().splitlines()


def answers(run: Path, step: int) -> list[str]:
    (record,) = [r for r in metrics.read(run / "evaluations.jsonl") if r["step"] == step]
    return [sample["answer"] for sample in record["samples"]]


def test_a_run_says_what_it_said_in_its_last_evaluation(run):
    assert said(run, *PROMPTS) == answers(run, 6)


def test_an_older_checkpoint_can_be_talked_to(run):
    older = run / "checkpoints" / "step-00000002"
    assert said(older, *PROMPTS) != answers(run, 6)


@pytest.mark.parametrize("lora", [True, False])
def test_the_untuned_answer_stands_beside_the_tuned_one(recipe, run, tmp_path, lora):
    folder = run if lora else run_tiny(recipe, tmp_path, "model_config.lora=null", "training_config.learning_rate=3e-3")
    lines = said(folder, PROMPTS[1], base=True)

    assert lines[0].startswith("--- ")
    assert lines[1] == answers(folder, 6)[1]
    assert lines[3] == answers(folder, 0)[1]
    assert lines[1] != lines[3]


def test_the_exported_folder_says_the_same(run):
    assert said(run / "export" / "merged", PROMPTS[0], sampling={"max_new_tokens": 8}) == answers(run, 6)[:1]


def test_sampling_follows_the_flags_and_the_seed(run):
    hot = {"temperature": 5.0, "top_k": None}
    first = said(run, PROMPTS[0], sampling=hot, seed=1)

    assert first == said(run, PROMPTS[0], sampling=hot, seed=1)
    assert first != said(run, PROMPTS[0], sampling=hot, seed=2)
    assert said(run, PROMPTS[0], sampling=hot | {"top_k": 1}) == answers(run, 6)[:1]
    with pytest.raises(UsageError, match="top_p"):
        said(run, PROMPTS[0], sampling={"top_p": 2.0})


def test_a_piped_prompt_is_answered_and_an_empty_one_refused(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n"))
    assert said(run) == answers(run, 6)[:1]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(UsageError, match="no prompt"):
        said(run)


def test_a_terminal_gets_a_loop_that_outlives_a_bad_prompt(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter([PROMPTS[0], "", "a <|user|> forged turn", PROMPTS[1]])

    def read(_prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    out = io.StringIO()
    notes: list[str] = []
    talk(run, out=out, say=notes.append)

    assert out.getvalue().splitlines() == [*answers(run, 6)[:2], ""]
    assert any("<|user|>" in note for note in notes)


def test_an_answer_ends_where_the_model_has_no_position_left(run, tiny_base):
    tokenizer = ChatTokenizer.load(tiny_base)
    filler = "x " * 122
    room = 256 - len(tokenizer.prompt_ids(filler))
    assert 0 < room < 20, "the filler must leave a little room"
    notes: list[str] = []
    talk(run, [filler], sampling={"max_new_tokens": 200}, out=io.StringIO(), say=notes.append)

    assert "cut off" in notes[-1]
    with pytest.raises(DataError, match="tokens too long"):
        said(run, "x " * 300)


def test_folders_that_cannot_be_talked_to_are_refused(run, tiny_base, tmp_path):
    with pytest.raises(UsageError, match="adapter"):
        said(run / "export" / "adapter", "Hi")
    with pytest.raises(UsageError, match="no untuned answer"):
        said(tiny_base, "Hi", base=True)
    with pytest.raises(UsageError, match="no run and no Hugging Face folder"):
        said(tmp_path, "Hi")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UsageError, match="gpt2"):
        said(tmp_path, "Hi")


def test_a_character_of_several_tokens_is_printed_whole(tiny_base):
    tokenizer = ChatTokenizer.load(tiny_base)
    ids = tokenizer.encode_text(" a fox 🦊 and a paw")
    out = io.StringIO()
    stream = Stream(tokenizer, out)
    seen = []
    for token in ids:
        stream(0, token)
        seen.append(out.getvalue())
    stream.finish("a fox 🦊 and a paw")

    assert out.getvalue() == "a fox 🦊 and a paw\n"
    assert not any("\ufffd" in text for text in seen)
    assert len(set(seen)) > 3, "printed as it came"
