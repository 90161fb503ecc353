"""GGUF files, read by llama.cpp itself: every kind of tokenizer, defects that only a real reader sees, and the verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.data.chat import ChatTokenizer
from common.errors import MachineError, VerificationError
from common.paths import home as recipes_home
from tests.doubles.tiny_recipe import make_tiny_recipe
from tests.support.llamas import KINDS, TEXTS, bpe, chat, smollm, with_bytes
from tests.support.runs import run_tiny
from tools.cli.main import recipe as recipe_command
from tools.export.gguf import file, make, proof, vocabulary
from tools.export.gguf.file import write_gguf
from tools.export.gguf.proof import Questions, parts_of, prove
from tools.export.readers import environment
from tools.export.record import damaged
from tools.generate.chat import folder_speaker

QUESTIONS = Questions(list(dict.fromkeys(parts_of(TEXTS)))[:200], ["What is a fox?", "x  12  y"])


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """RECIPES_HOME of the module, but for the reader, which is made once for all there may be."""
    readers = recipes_home() / "readers"
    readers.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("home")
    (folder / "readers").symlink_to(readers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def llama_cpp(home) -> None:
    try:
        environment.python_of("llama.cpp", print)
    except MachineError as error:
        pytest.skip(f"llama.cpp cannot be had here: {error.what}")


def proven(base: Path, folder: Path, kind: str = "f32") -> proof.Proof:
    path = folder / f"{kind}.gguf"
    write_gguf(path, base, kind, "tiny")
    return prove(path, base, kind, QUESTIONS, print)


# --- what llama.cpp makes of the files ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_tokens_and_answers_of_every_kind(llama_cpp, tmp_path, kind, tied):
    found = proven(KINDS[kind](tmp_path / "base", tied), tmp_path)

    assert (found.verdict, found.reason) == ("equal", "")
    assert (found.texts, found.prompts) == (200, 8)
    assert found.tokens > 160  # half of what 8 answers may have: few of them end early


def without_permutation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file, "arranged", lambda array, *_: array)


def without_a_head_of_its_own(patch: pytest.MonkeyPatch) -> None:
    real = file.names_of

    def tied(*given):
        return {theirs: ours for theirs, ours in real(*given).items() if theirs != "output.weight"}

    patch.setattr(file, "names_of", tied)


def with_another_pattern_of_words(patch: pytest.MonkeyPatch) -> None:
    (gpt_2, _), (name, pattern) = vocabulary.WORDS
    patch.setattr(vocabulary, "WORDS", ((gpt_2, pattern), (name, None)))


@pytest.mark.parametrize(
    ("defect", "base", "says"),
    [
        (without_permutation, chat, "answers part"),
        (without_a_head_of_its_own, chat, "answers part"),
        (with_another_pattern_of_words, smollm, "other tokens of a text"),
    ],
)
def test_what_is_wrong_in_a_file_is_caught(llama_cpp, tmp_path, monkeypatch, defect, base, says):
    defect(monkeypatch)
    found = proven(base(tmp_path / "base", False), tmp_path)

    assert found.verdict == "failed"
    assert says in found.reason


def test_scores_that_say_nothing_of_the_merges_are_caught(llama_cpp, tmp_path, monkeypatch):
    """What llama.cpp's converter writes of TinyLlama's tokenizer: one score for all."""
    base = with_bytes(tmp_path / "base", False)
    real = vocabulary.with_bytes

    def flat(*given):
        found = real(*given)
        return vocabulary.Vocabulary(**{**vars(found), "scores": [-1000.0] * len(found.tokens)})

    monkeypatch.setattr(vocabulary, "with_bytes", flat)
    found = proven(base, tmp_path)

    assert found.verdict == "failed"
    assert "other tokens of a text" in found.reason


def test_a_file_that_is_no_gguf_fails(llama_cpp, tmp_path):
    base = bpe(tmp_path / "base", True)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    found = prove(tmp_path / "x.gguf", base, "f32", QUESTIONS, print)

    assert found.verdict == "failed"
    assert "cannot open it" in found.reason


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(home, tmp_path_factory, tiny_base) -> Path:
    """A LoRA run that exported itself at its end; copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    return run_tiny(make_tiny_recipe(folder / "tiny", tiny_base), folder / "runs")


@pytest.fixture
def run(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / exported.name))


def record(folder: Path) -> dict:
    return json.loads((folder / "export" / "export.json").read_text())["gguf"]


def recipe(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(recipe_command, words, standalone_mode=False)
    if result.exception is None:
        return 0, result.output
    return getattr(result.exception, "code", 1), result.output + str(result.exception)


def echo(folder: Path, change=lambda theirs: theirs):
    """A reader that says what ours says, changed."""

    def ask(_lock: str, _probe: str, _opened: dict, asked: dict, _say) -> dict:
        merged = folder / "export" / "merged"
        tokenizer = ChatTokenizer.load(merged)
        with folder_speaker(merged, {"eval.max_new_tokens": asked["greedy"][0][1]}) as speaker:
            answers = [proof.greedy(speaker, prompt, {*tokenizer.eos_ids}) for prompt, _ in asked["greedy"]]
        return change({"ids": [tokenizer.encode_text(text) for (text,) in asked["ids"]], "greedy": answers})

    return ask


@pytest.fixture
def echoing(run, monkeypatch):
    """Put a reader in llama.cpp's place; return how to change what it says."""

    def put(change=lambda theirs: theirs) -> None:
        monkeypatch.setattr(proof, "ask", echo(run, change))

    put()
    return put


def test_the_verb_writes_a_proven_file_and_its_modelfile_and_check_reads_them_again(llama_cpp, run):
    code, said = recipe("export", str(run), "--gguf", "--type", "f32")
    assert (code, record(run)["tiny-step-6-f32.gguf"]["verdict"]) == (0, "equal"), said
    assert "200 texts" in said
    entry = record(run)["tiny-step-6-f32.gguf"]
    assert set(entry["sha256"]) == {"tiny-step-6-f32.gguf", "tiny-step-6-f32.Modelfile"}
    assert not damaged(run / "export" / "gguf", entry)
    assert "FROM ./tiny-step-6-f32.gguf" in (run / "export/gguf/tiny-step-6-f32.Modelfile").read_text()

    assert "kept" in recipe("export", str(run), "--gguf", "--type", "f32")[1]
    code, said = recipe("export", str(run), "--check")
    assert code == 0
    assert "tiny-step-6-f32.gguf equal" in said


def test_a_damaged_file_is_found_set_aside_and_made_anew(run, echoing):
    recipe("export", str(run), "--gguf")
    path = run / "export/gguf/tiny-step-6-f16.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    code, said = recipe("export", str(run), "--check")
    assert (code, path.exists()) == (6, False)
    assert "tiny-step-6-f16.gguf is damaged" in said
    assert recipe("export", str(run), "--gguf")[0] == 0
    assert path.read_bytes() == whole


def test_a_file_that_fails_is_not_kept_under_its_name(run, echoing):
    echoing(lambda theirs: {**theirs, "ids": [[*theirs["ids"][0], 5], *theirs["ids"][1:]]})
    code, said = recipe("export", str(run), "--gguf")

    assert code == 6
    assert "other tokens of a text" in said
    assert [path.name for path in (run / "export/gguf").iterdir()] == ["tiny-step-6-f16.gguf.failed"]
    assert record(run)["tiny-step-6-f16.gguf"]["verdict"] == "failed"


@pytest.mark.parametrize(("allowed", "verdict"), [(100.0, "parted"), (0.0, "failed")])
def test_where_answers_part_it_says_at_which_token_and_by_how_much(run, echoing, monkeypatch, allowed, verdict):
    def other_third_token(theirs: dict) -> dict:
        first, *rest = theirs["greedy"]
        return {**theirs, "greedy": [[*first[:2], (first[2] + 1) % 512, *first[3:]], *rest]}

    monkeypatch.setitem(proof.ALLOWED, "f16", allowed)
    echoing(other_third_token)
    code, said = recipe("export", str(run), "--gguf")
    (parted,) = record(run)["tiny-step-6-f16.gguf"]["parted"]

    assert (code, record(run)["tiny-step-6-f16.gguf"]["verdict"]) == (0 if verdict == "parted" else 6, verdict)
    assert (parted["prompt"], parted["token"]) == (0, 3)
    assert parted["margin"] > 0
    assert "answer 1 at its token 3" in said


def test_without_a_reader_nothing_is_called_good(run, monkeypatch):
    def nowhere(*asked):
        raise MachineError("could not be set up: no network")

    monkeypatch.setattr(proof, "ask", nowhere)
    code, said = recipe("export", str(run), "--gguf")
    assert (code, record(run)["tiny-step-6-f16.gguf"]["verdict"]) == (0, "not tried")
    assert f"recipe export {run} --check" in said
    assert recipe("export", str(run), "--check")[0] == 6


def test_a_full_disk_costs_no_file_that_was_there(run, echoing, monkeypatch):
    recipe("export", str(run), "--gguf")
    before = record(run)

    def full(*given):
        given[0].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make, "write_gguf", full)
    code, _ = recipe("export", str(run), "--gguf", "--type", "f32")
    assert (code, record(run)) == (4, before)
    assert {path.suffix for path in (run / "export/gguf").iterdir()} == {".gguf", ".Modelfile"}
    assert not list((run / "export/gguf").glob(".tmp*"))


def test_an_export_that_is_not_verified_gets_no_file(run, monkeypatch):
    monkeypatch.setattr("tools.export.check.missing_packages", lambda: "torch")
    shutil.rmtree(run / "export")
    with pytest.raises(VerificationError, match="unverified"):
        make.export_gguf(run, "f32", print)


def test_a_margin_counts_from_the_more_likely_token_of_ours(run):
    with folder_speaker(run / "export" / "merged", {"eval.max_new_tokens": 4}) as speaker:
        own = proof.greedy(speaker, [5, 6, 7], set())
        logits, _ = speaker.backend.next_token_logits(np.array([[5, 6, 7]]), np.array([3]))
        other = [int(np.argsort(-logits[0][:512])[1])]
        margin = proof.lead(speaker, [5, 6, 7], own, other, set())
    assert margin == pytest.approx(float(logits[0][own[0]]) - float(logits[0][other[0]]), abs=1e-4)
