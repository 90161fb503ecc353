"""Readers of an export: their environments, the process that is asked, how answers are judged. No run, no network."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ci.lock import LOCKS as ALL_LOCKS
from common.errors import MachineError, UsageError, VerificationError
from tools.export.readers import ask as asking
from tools.export.readers import environment
from tools.export.readers.ask import ask
from tools.export.readers.compare import COLUMNS, Row, compare
from tools.export.readers.questions import CHATS, TEXTS, Expected, code_of, log_probabilities
from tools.export.readers.table import READERS, chosen

VOCABULARY = 8
LOGITS = np.linspace(-3.0, 4.0, VOCABULARY)


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_reader_has_a_lock_that_make_lock_writes_and_a_probe():
    locks = {lock.path.name for lock in ALL_LOCKS if lock.folder.name == "readers"}
    probes = {path.stem for path in Path(asking.MAIN).parent.glob("[!_]*.py")}

    assert {f"{reader.lock}.txt" for reader in READERS} | {"uv.txt"} == locks
    assert {reader.probe for reader in READERS} | {"ask"} == probes
    assert len({reader.name for reader in READERS}) == len(READERS)


def test_a_row_names_the_versions_that_the_lock_pins():
    versions = {reader.name: reader.version for reader in READERS}

    assert versions["transformers-4.48"] == "transformers 4.48.3"
    assert versions["peft-0.12"] == "peft 0.12.0 (transformers 4.48.3)"


def test_an_unknown_reader_is_refused_with_those_there_are():
    assert chosen([]) == list(READERS)
    with pytest.raises(UsageError, match="'ollama'") as raised:
        chosen(["vllm", "ollama"])
    assert "mlx-lm" in str(raised.value)


def test_there_are_24_odd_texts_and_no_two_alike():
    assert len(set(TEXTS)) == len(TEXTS) == 24
    assert len(CHATS) == 6


# --- environments ---------------------------------------------------------------------------------------------------


def test_a_lost_network_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    """pip is asked for the locked uv where there is none: the one line says what it said."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MachineError, match="could not be set up: ERROR: No matching distribution"):
        environment.python_of("llama.cpp", print)
    assert list((tmp_path / "readers").iterdir()) == []


def test_torch_is_installed_alone_and_first_and_its_index_is_asked_for_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path))
    commands = []

    def run(command, env, folder):
        words = [str(word) for word in command]
        commands.append(words)
        if "venv" in words:
            made = Path(words[-1])
            (made / "bin").mkdir(parents=True)
            for name in ("python", "uv"):
                (made / "bin" / name).touch()
        named = words[-1]
        if named.endswith("torch.txt"):
            assert [line for line in Path(named).read_text().splitlines() if "==" in line] == ["torch==2.13.0+cpu \\"]
            if "--index" not in words:
                raise MachineError("no such wheel")

    monkeypatch.setattr(environment, "run", run)
    python = environment.python_of("transformers-5", lambda line: None)
    installs = [words for words in commands if "install" in words]

    assert python.is_file()
    assert ["--index" in words for words in installs] == [False, False, True, False]
    assert all({"--require-hashes", "--no-deps"} <= set(words) for words in installs)
    assert installs[-1][-1] == str(environment.LOCKS / "transformers-5.txt")
    assert environment.python_of("transformers-5", print) == python
    assert len(commands) == 2 + len(installs), "made once"


def test_uv_is_told_what_pip_is():
    told = environment.uv_settings({"PIP_FIND_LINKS": "/a /b", "PIP_INDEX_URL": "x", "UV_DEFAULT_INDEX": "own"})

    assert (told["UV_FIND_LINKS"], told["UV_DEFAULT_INDEX"]) == ("/a,/b", "own")


# --- the process that is asked --------------------------------------------------------------------------------------


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Return how to put a probe in place, which this Python runs."""
    (tmp_path / "ask.py").write_text(asking.MAIN.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(asking, "MAIN", tmp_path / "ask.py")
    monkeypatch.setattr(asking, "python_of", lambda lock, say: Path(sys.executable))

    def put(body: str) -> None:
        text = f"import os, signal, time\ndef open_model(folder):\n    return Model()\nclass Model:\n{body}\n"
        (tmp_path / "planted.py").write_text(text, encoding="utf-8")

    return put


def asked(**questions):
    return ask("lock", "planted", {"folder": "x"}, questions, print)


def test_each_question_is_answered_or_its_error_is_and_one_that_is_unknown_is_left_out(probe):
    probe("    def ids(self, text):\n        return [1 // len(text)]")

    assert asked(ids=[["a"], [""]], chat=[["x"]]) == {
        "ids": [[1], {"error": "ZeroDivisionError: integer division or modulo by zero"}]
    }


def test_what_cannot_be_opened_says_its_last_line(probe):
    probe("    raise ValueError('no such architecture')")
    with pytest.raises(VerificationError, match="cannot open it: ValueError: no such architecture"):
        asked(ids=[])


def test_a_processor_that_it_does_not_run_on_is_no_fault_of_the_export(probe):
    probe("    os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(MachineError, match="processor"):
        asked(ids=[])


def test_a_reader_sees_no_secret_and_no_home_of_ours(probe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    probe("    def ids(self):\n        return [os.environ.get('HF_TOKEN'), os.environ['HOME']]")
    ((token, home),) = asked(ids=[[]])["ids"]

    assert token is None
    assert home != os.environ.get("HOME")
    assert not Path(home).exists(), "what it kept is gone with it"


def test_one_that_hangs_is_ended_with_all_that_it_started(probe, monkeypatch, tmp_path):
    monkeypatch.setattr(asking, "SECONDS", 2)
    note = tmp_path / "child"
    probe(
        f"    if (child := os.fork()) == 0:\n        time.sleep(600)\n"
        f"    open({str(note)!r}, 'w').write(str(child))\n    time.sleep(600)"
    )
    with pytest.raises(VerificationError, match="did not answer within"):
        asked(ids=[])
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"
    assert signal.SIGKILL


# --- the judgment ---------------------------------------------------------------------------------------------------

EXPECTED = Expected(
    asked={},
    ids=[[1, 2], [3]],
    chat=["<u>a"],
    log_probabilities=log_probabilities(LOGITS, never=[0]),
    greedy=[4, 5, 6],
    ends=[5, 6],
    end_ids=(7,),
    never_ids=(0,),
    printed="A fox is",
    whole=False,
)
SAME: dict[str, Any] = {
    "ids": [[1, 2], [3]],
    "chat": ["<u>a"],
    "logits": [[*LOGITS, 99.0]],  # a row of the embedding that is no token counts for nothing
    "greedy": [[4, 5, 6]],
    "ends": [[5, 6, 7]],
    "snippet": [{"printed": "A fox is red.\n", "silent": False, "logits": list(LOGITS + 5)}],
}


def judged(**changed) -> Row:
    return compare(Row("x", "x 1", "merged"), EXPECTED, {**SAME, **changed})


def test_the_same_answers_agree_in_every_cell():
    row = judged()

    assert (row.verdict, row.reason) == ("agrees", "")
    assert row.cells == {
        "ids": "2 of 2",
        "chat": "1 of 1",
        "logits": row.cells["logits"],
        "greedy": "3 of 3",
        "ends": "yes",
        "snippet": "as it says",
    }
    assert float(row.cells["logits"]) < 1e-6


SLANTED = LOGITS + np.linspace(0, 2.8, VOCABULARY)


@pytest.mark.parametrize(
    ("name", "answer", "cell"),
    [
        ("ids", [[1, 2], [4]], "1 of 2"),
        ("chat", ["<u> a"], "0 of 1"),
        ("greedy", [[4, 5, 1]], "2 of 3"),
        ("greedy", [[4, 5]], "2 of 3"),
        ("ends", [[5, 6, 1, 1]], "no"),
        ("snippet", [{"printed": "A wolf", "silent": False, "logits": list(LOGITS)}], "something else"),
        ("snippet", [{"printed": "", "silent": False, "logits": list(LOGITS)}], "something else"),
        ("snippet", [{"printed": "A fox is red", "silent": False, "logits": list(SLANTED)}], "something else"),
        ("snippet", [{"printed": "", "silent": True, "logits": list(SLANTED)}], "something else"),
    ],
)
def test_each_question_can_part_them(name, answer, cell):
    row = judged(**{name: answer})

    assert row.cells[name] == cell
    assert (row.verdict, row.reason) == ("differs", COLUMNS[name])


def test_logits_of_another_model_differ_and_a_rounding_does_not():
    assert judged(logits=[list(SLANTED)]).verdict == "differs"
    assert judged(logits=[list(LOGITS + 1e-4 * np.sin(np.arange(VOCABULARY)))]).verdict == "agrees"
    assert judged(logits=[[None, *LOGITS[1:]]]).verdict == "agrees", "an id that no answer may hold is not listed"
    assert judged(logits=[[float("nan")] * VOCABULARY]).verdict == "differs"


def test_an_error_is_a_refusal_in_its_cell_and_no_difference():
    row = judged(greedy=[{"error": "ValueError: token_type_ids"}], ids=[[1, 2], {"error": "x"}])

    assert (row.verdict, row.cells["greedy"], row.cells["ids"]) == ("refuses", "refused", "1 of 2")
    assert "x" in row.reason
    assert judged(greedy=[{"error": "x"}], chat=["other"]).verdict == "differs"


def test_who_answers_nothing_does_not_agree():
    row = compare(Row("x", "x", "merged"), EXPECTED, {})
    assert (row.verdict, row.reason, row.cells) == ("refuses", "answered none of the questions", {})


def test_an_answer_that_is_whole_must_be_printed_whole():
    longer = [{"printed": "A fox is red.\n", "silent": False, "logits": list(LOGITS)}]

    assert compare(Row("x", "x", "merged"), replace(EXPECTED, whole=True), {"snippet": longer}).verdict == "differs"


def test_the_code_of_a_card_is_its_first_block_of_python():
    assert (
        code_of("# x\n\n```sh\nls\n```\n\n```python\na = 1\nprint(a)\n```\n\n```python\nb\n```\n")
        == "a = 1\nprint(a)\n"
    )
    assert code_of("nothing") is None
