"""`recipe new`: what a fork is made of, what it refuses, and that it is there whole or not at all."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from common import config as configs
from common import hardware
from common.data.build import read_splits
from common.data.rows import group_hash, plain, read_prompts, read_rows
from common.errors import DataError, RecipeError, UsageError
from common.model import llama
from tools.cli import main
from tools.data import checks
from tools.data.licence import licence_of
from tools.recipes import load_dataset
from tools.results.schema import load as load_results
from tools.scaffold import new
from tools.scaffold.rows import schedule

ROWS_BUILDER = '''"""The rows of recipes/parent."""
from common.data.rows import groups_of, hold_out, read_prompts, read_rows

def splits(config, recipe_dir):
    rows = read_rows(recipe_dir / config.data.source)
    groups = groups_of(rows, config.data.split_by)
    held_out = hold_out(groups, config.data.held_out_share)
    pairs = list(zip(rows, groups))
    return {
        "train": [row for row, group in pairs if group not in held_out],
        "held_out": [row for row, group in pairs if group in held_out],
    }

def prompts(config, recipe_dir):
    return read_prompts(config.eval.prompts, recipe_dir)
'''
TEXT_BUILDER = """
from common.data.rows import hold_out, read_prompts
from common.data.texts import cut_in_two, read_texts

def splits(config, recipe_dir):
    texts = read_texts(config.data.corpus, recipe_dir)
    if len(texts) == 1:
        return cut_in_two(texts[0], config.data.held_out_share)
    held_out = hold_out([text.where for text in texts], config.data.held_out_share)
    return {
        "train": [text for text in texts if text.where not in held_out],
        "held_out": [text for text in texts if text.where in held_out],
    }

def prompts(config, recipe_dir):
    return read_prompts(config.eval.prompts, recipe_dir)
"""
ROWS_CONFIG = """\
# Teach a fox to talk.
#
#   make recipe-fox HW=n150

training_config:
  batch_size: 32                  # kept
  learning_rate: 1e-3
  max_steps: 77
model_config: {base: BASE}
data_config:
  source: data/foxes.jsonl
  held_out_share: 0.3
eval_config:
  every: 5
  prompts: [Why]
checkpoint_config:
  every: 5
"""
SHAPE = """\
# 1 parameters: a model of its own.
model_config:
  architecture: {vocab_size: VOCABULARY, hidden_size: 32, intermediate_size: 32, num_hidden_layers: LAYERS,
                 num_attention_heads: 1, num_key_value_heads: 1, max_position_embeddings: 64}
"""
TEXT_CONFIG = """\
# Train on a tale.
training_config: {batch_size: 4, learning_rate: 1e-3, max_steps: 1000, scheduler: {warmup_steps: 100}}
model_config: {init: random, preset: small}
data_config: {corpus: data/tale.txt, max_length: 32}
eval_config: {every: 100, prompts: [Once]}
checkpoint_config: {every: 200}
"""
SUBJECTS = "amber birch cedar delta ember flint grove heron inlet jasper kelp lotus maple north otter plume".split()
QUESTIONS = [f"{ask} the {subject}?" for ask in ("What is", "Who knew", "Why not", "Where lay") for subject in SUBJECTS]
PAIRS = [
    (question, f"{question.split()[-1][:-1].title()} number {at} is long told.")
    for at, question in enumerate(QUESTIONS)
]


@pytest.fixture
def root(tmp_path, tiny_base, monkeypatch) -> Path:
    """A repository with two recipes: `parent` trains on rows, `tale` on a text."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tools.recipes.RECIPES", tmp_path / "root/recipes")
    files = {
        "parent/config.yaml": ROWS_CONFIG.replace("BASE", str(tiny_base)),
        "parent/hw/cpu.yaml": "training_config:\n  batch_size: 8\n",
        "parent/hw/n150.yaml": "data_config:\n  max_length: 64\n\nlogging_config:\n  log_every: 3\n",
        "parent/dataset.py": ROWS_BUILDER,
        "parent/train.py": '"""make recipe-fox, or recipe run parent"""\n',
        "parent/data/foxes.jsonl": "".join(
            f'{{"prompt": "What is {n}?", "response": "A number: {n}."}}\n' for n in range(40)
        ),
        "parent/README.md": "# parent\n\nLicense: CC0\n\nIt scored 3.1.\n",
        "parent/results.yaml": "format: 1\nrecipe: parent\nentries: []\n",
        "parent/results/curve.csv": "1,2\n",
        "tale/config.yaml": TEXT_CONFIG,
        "tale/presets/small.yaml": SHAPE.replace("VOCABULARY", "64").replace("LAYERS", "2"),
        "tale/presets/larger.yaml": SHAPE.replace("VOCABULARY", "320").replace("LAYERS", "3"),
        "tale/dataset.py": TEXT_BUILDER,
        "tale/train.py": "",
        "tale/data/tale.txt": "Once there was a fox.\n" * 99,
        "tale/README.md": "# tale\n",
        "tale/results.yaml": "format: 1\nrecipe: tale\nentries: []\n",
    }
    for name, text in files.items():
        path = tmp_path / "root/recipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "root"


def table(path: Path, rows=PAIRS, columns=("question", "answer")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def fork(
    root: Path, data: Path | None, parent: str = "parent", format: str = "auto", name: str = "young", **mapping: str
) -> tuple[Path, str]:
    """The fork, and what was said."""
    lines: list[str] = []
    own = None if data is None else new.Own(data, mapping, format)
    return new.new(name, parent, own, lines.append), "\n".join(lines)


def leaks_of(recipe: Path) -> set[str]:
    """Errors and warnings of the data check that say that a prompt is on two sides."""
    prompts = read_prompts("data/prompts.jsonl", recipe)
    report = checks.check(splits_of(recipe), prompts)
    return {finding.id for finding in report.findings} & {"D002", "D003", "D101", "D102", "D103", "D104"}


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def config_of(recipe: Path, board: str = "n150") -> configs.Config:
    return configs.load(recipe, hardware.get(board))


def splits_of(recipe: Path) -> dict[str, list[Any]]:
    return read_splits(load_dataset(recipe)[0], config_of(recipe), recipe)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_user_s_is_in_the_fork_once_and_on_one_side(root, tmp_path):
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    splits = splits_of(recipe)
    asked = [json.loads(line) for line in (recipe / "data/prompts.jsonl").read_text().splitlines()]
    found = [(row.prompt, row.messages[-1].content) for part in splits.values() for row in part]
    assert sorted(found + [(row["prompt"], row["response"]) for row in asked]) == sorted(PAIRS)
    assert {name: len(part) for name, part in splits.items()} == {"train": 52, "held_out": 8}
    assert len(asked) == 4
    assert "64 rows of" in said
    assert "52 to train on, 8 held out, 4 asked" in said
    assert not leaks_of(recipe)


def test_nothing_of_the_parent_s_data_results_or_name_stays(root, tmp_path):
    before = everything(root / "recipes/parent")
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    names = {str(path.relative_to(recipe)) for path in recipe.rglob("*") if path.is_file()}
    assert names == {
        *("config.yaml", "dataset.py", "train.py", "README.md", "results.yaml", "hw/cpu.yaml", "hw/n150.yaml"),
        *("data/README.md", "data/rows.jsonl", "data/prompts.jsonl"),
    }
    assert (recipe / "train.py").read_text() == '"""make recipe NAME=young, or recipe run young"""\n'
    assert "The rows of recipes/young" in (recipe / "dataset.py").read_text()
    readme = (recipe / "README.md").read_text()
    assert readme.startswith("# young\n")
    assert "3.1" not in readme
    assert "make recipe NAME=young STEPS=5" in readme
    assert "| status | never run | never run |" in readme
    config = (recipe / "config.yaml").read_text()
    assert config.startswith("# Fine-tune an instruction model on my.csv: 64 rows.\n")
    assert "batch_size: 32                  # kept" in config
    assert "fox" not in config
    assert load_results(recipe).entries == ()
    assert everything(root / "recipes/parent") == before


def test_what_is_set_follows_from_the_rows_and_stands_with_its_reason(root, tmp_path):
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    board, cpu = config_of(recipe), config_of(recipe, "cpu")
    assert (board.training.batch_size, board.training.num_epochs, board.training.max_steps) == (32, 5, None)
    assert (board.training.scheduler.warmup_steps, board.eval.every, board.checkpoint.every) == (1, 3, 3)  # of 9
    assert (cpu.training.batch_size, cpu.training.num_epochs, cpu.eval.every, cpu.checkpoint.every) == (8, 5, 11, 9)
    assert "num_epochs: 5                   # 9 steps of 32 rows" in (recipe / "config.yaml").read_text()
    assert "training_config.num_epochs: 5  (9 steps of 32 rows)" in said
    assert "num_epochs" not in (recipe / "hw/cpu.yaml").read_text(), "an overlay holds what differs"
    assert (recipe / "hw/n150.yaml").read_text() == "logging_config:\n  log_every: 3\n", "the parent's max_length went"


def test_an_overlay_in_which_nothing_differs_any_more_goes(root, tmp_path):
    (root / "recipes/parent/hw/cpu.yaml").write_text("training_config:\n  num_epochs: 9\n")
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    assert not (recipe / "hw/cpu.yaml").exists()
    assert config_of(recipe, "cpu").training.num_epochs == 5


@pytest.mark.parametrize("format", ["jsonl", "messages", "alpaca", "sharegpt", "text", "semicolon"])
def test_every_format_that_data_convert_takes(root, tmp_path, format):
    values = {
        "jsonl": "\n".join(json.dumps({"prompt": q, "response": a}) for q, a in PAIRS),
        "messages": "\n".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in PAIRS
        ),
        "alpaca": json.dumps([{"instruction": q, "input": "", "output": a} for q, a in PAIRS]),
        "sharegpt": json.dumps(
            [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS]
        ),
        "text": "\n".join(f"Q: {q}\nA: {a}" for q, a in PAIRS),
        "semicolon": "question;answer\n" + "\n".join(f"{q};{a}" for q, a in PAIRS),
    }
    data = tmp_path / ("my.txt" if format == "text" else "my.csv" if format == "semicolon" else "my.json")
    data.write_text(values[format])
    recipe, said = fork(root, data)
    splits = splits_of(recipe)
    asked = [json.loads(line) for line in (recipe / "data/prompts.jsonl").read_text().splitlines()]
    found = [(row.prompt, row.messages[-1].content) for part in splits.values() for row in part]
    assert sorted(found + [(row["prompt"], row["response"]) for row in asked]) == sorted(PAIRS)
    kind = {"text": "text", "semicolon": "csv"}.get(format, "jsonl")
    assert f"({kind})" in said
    assert "read as " in said


def test_a_conversation_of_several_turns_is_kept_whole_and_asked_by_its_first(root, tmp_path):
    turns = ("user", "assistant", "user", "assistant")
    data = tmp_path / "talks.jsonl"
    data.write_text(
        "\n".join(
            json.dumps(
                {"messages": [{"role": r, "content": c} for r, c in zip(turns, (q, a, "And?", "No."), strict=True)]}
            )
            for q, a in PAIRS
        )
    )
    recipe, _ = fork(root, data)
    assert all(len(row.messages) == 4 for row in read_rows(recipe / "data/rows.jsonl"))
    assert set(read_prompts("data/prompts.jsonl", recipe)) < set(QUESTIONS)


def test_prompts_that_are_spelt_differently_and_are_the_same_stay_on_one_side(root, tmp_path):
    rows = [(question + end, answer) for question, answer in PAIRS for end in ("", "  ", "?!")]
    recipe, said = fork(root, table(tmp_path / "my.csv", rows))
    assert config_of(recipe).data.split_by == "same_prompt"
    assert not leaks_of(recipe)
    assert "192 rows of" in said
    assert "8 left out, which have the prompt of one that is asked" in said
    asked = {plain(prompt).rstrip("?!") for prompt in read_prompts("data/prompts.jsonl", recipe)}
    assert len(asked) == 4
    assert len(read_rows(recipe / "data/rows.jsonl")) == 192 - 12
    assert not asked & {plain(row.prompt).rstrip("?!") for row in read_rows(recipe / "data/rows.jsonl")}


def test_prompts_with_one_row_are_asked_first_so_that_nothing_is_left_out(root, tmp_path):
    rows = [*PAIRS, *((question, "Another answer.") for question in QUESTIONS[:8])]
    _, said = fork(root, table(tmp_path / "my.csv", rows))
    assert "left out" not in said


def test_what_is_nearly_the_same_is_said_by_the_data_check(root, tmp_path):
    text = "What is the boiling point of {} in degrees Celsius at sea level?"
    rows = [(text.format(f"{SUBJECTS[at % 16]}{at}"), f"Element {at} boils at {at * 7} degrees.") for at in range(60)]
    recipe, said = fork(root, table(tmp_path / "my.csv", rows))
    assert "warning D101: 8 held-out prompts are trained on in nearly the same words" in said
    assert f"{tmp_path / 'my.csv'}:" in said, "by the lines of the user's file"
    assert leaks_of(recipe) <= {"D101", "D102", "D104"}


def test_a_prompt_with_most_of_the_rows_is_refused_where_it_would_be_held_out(root, tmp_path):
    prompt = min((f"What is {at}?" for at in range(99)), key=lambda text: group_hash(text.lower()))
    rows = [(prompt, f"A thing of number {at}.") for at in range(240)]
    with pytest.raises(DataError, match="of 304 rows 53 would be left to train on") as error:
        fork(root, table(tmp_path / "my.csv", [*PAIRS, *rows]))
    assert "one has 240" in str(error.value)


def test_a_column_of_topics_holds_the_rows_of_a_topic_together(root, tmp_path):
    rows = [(q, a, SUBJECTS[at % 16], at) for at, (q, a) in enumerate(PAIRS)]
    recipe, _ = fork(root, table(tmp_path / "my.csv", rows, ("question", "answer", "topic", "ticket")))
    assert config_of(recipe).data.split_by == "topic"
    splits = splits_of(recipe)
    topics = [{row.extra["topic"] for row in part} for part in splits.values()]
    assert not topics[0] & topics[1]


@pytest.mark.parametrize(
    "topics",
    [
        ["", *[f"t{at % 16}" for at in range(63)]],
        [f"t{at % 3}" for at in range(64)],
        [f"t{at}" for at in range(64)],
        ["t", *["t"] * 39, *[f"t{at}" for at in range(24)]],
    ],
    ids=["a row has none", "too few", "as many as rows", "one is large"],
)
def test_a_column_that_makes_no_groups_is_not_taken(root, tmp_path, topics):
    rows = [(*pair, topic) for pair, topic in zip(PAIRS, topics, strict=True)]
    recipe, _ = fork(root, table(tmp_path / "my.csv", rows, ("question", "answer", "topic")))
    assert config_of(recipe).data.split_by is None
    assert not leaks_of(recipe)


def test_a_column_that_would_part_equal_prompts_is_not_taken(root, tmp_path):
    rows = [(*pair, f"t{(at + again) % 16}") for again in range(2) for at, pair in enumerate(PAIRS)]
    recipe, _ = fork(root, table(tmp_path / "my.csv", rows, ("question", "answer", "topic")))
    assert config_of(recipe).data.split_by is None
    assert not leaks_of(recipe)


def test_the_share_means_the_rows_it_says_and_adding_one_moves_no_other(root, tmp_path):
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    before = {row.prompt for row in splits_of(recipe)["held_out"]}
    with (recipe / "data/rows.jsonl").open("a") as file:
        file.write('{"prompt": "What is new here?", "response": "This one."}\n')
    after = {row.prompt for row in splits_of(recipe)["held_out"]}
    assert before == after - {"What is new here?"}


@pytest.mark.parametrize(
    ("rows", "batch", "limit", "stop", "warm", "every"),
    [
        (52, 32, None, ("num_epochs", 5), 1, 3),  # 9 steps
        (335, 8, 300, ("num_epochs", 3), 13, 42),  # 126 steps
        (900, 8, 300, ("max_steps", 300), 30, 100),  # 338 would be more than the limit
        (5_000, 32, None, ("num_epochs", 2), 32, 105),  # 313 steps
        (50_000, 32, None, ("num_epochs", 1), 100, 521),  # 1563 steps; the warm-up ends at 100
    ],
)
def test_passes_and_intervals_by_the_number_of_rows(rows, batch, limit, stop, warm, every):
    found = {key.rpartition(".")[2]: value for key, (value, _) in [*schedule(rows, batch, limit).items()][:3]}
    assert found == {stop[0]: stop[1], "warmup_steps": warm, "every": every}


def test_a_base_that_is_not_here_is_not_fetched_and_that_is_said(root, tmp_path, tiny_base, monkeypatch):
    for layer in ("config.yaml", "hw/cpu.yaml"):
        path = root / "recipes/parent" / layer
        path.write_text(path.read_text().replace(str(tiny_base), "tinyllama-1.1b-chat"))
    monkeypatch.setattr("common.model.bases._pinned", lambda *words: pytest.fail("it is fetched"))
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    assert "tokens are counted by the first run: tinyllama-1.1b-chat is not on this machine" in said
    assert config_of(recipe).eval.max_new_tokens == 32


def test_neither_torch_nor_the_network_is_needed(root, tmp_path, monkeypatch):
    for name in ("torch", "transformers", "huggingface_hub", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("socket.socket.connect", None)
    assert fork(root, table(tmp_path / "my.csv"))[0].is_dir()


def test_the_licence_is_asked_for_until_it_is_written(root, tmp_path):
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    card = recipe / "data/README.md"
    assert "to fill in" in said
    assert licence_of([recipe / "data", recipe]) is None
    card.write_text(card.read_text().replace("TO FILL IN (for example Apache-2.0", "CC0 (not Apache-2.0"))
    assert "CC0" in str(licence_of([recipe / "data", recipe]))


# --- what is refused --------------------------------------------------------------------------------------------------

LINES = "".join(f"{question},{answer}\n" for question, answer in PAIRS)
FEW, SAME = "question,answer\n" + LINES[: LINES.index("Who")], "question,answer\n" + "What is it?,A fox.\n" * 90
KEY = "AKIA" + "ABCDEFGHIJKLMNOP"
BAD: dict[str, tuple[object, str, str]] = {
    "other columns": ("ask,say\n" + LINES, "columns: ask, say", "--map prompt=COLUMN --map response=COLUMN"),
    "too few": (FEW, "16 with 16 different prompts, 44 are needed", "32 to train on"),
    "all the same": (SAME, "90 with 1 different prompts, 44 are needed", "write more"),
    "empty": ("", "no row", "my.csv"),
    "no row": ("question,answer\n", "no row", "my.csv"),
    "too many fields": ("question;answer\n" + "a;b;c\n" * 50, "50 rows cannot be used", "not the 2 columns"),
    "not UTF-8": ("question,answer\nWo ist das Café?,Da.\n".encode("latin-1"), "not UTF-8: byte 0xe9", "UTF-8"),
    "bad rows": (
        "question,answer\n,no question\n" + LINES + "No answer?,  \n",
        "my.csv:67: 'answer' is only white space",
        "correct or remove",
    ),
    "a key": ("question,answer\n" + LINES.replace("\n", f" {KEY}\n"), "error D004", "correct these"),
    "a marker": ("question,answer\n" + LINES.replace("\n", " <|user|>\n"), "error D005", "correct these"),
    "too long": (
        "question,answer\n" + LINES + f"What is long?,{'xyz ' * 400}\n",
        "the model has positions for 256",
        "shorten",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_end_with_3_and_say_what_and_where_and_what_to_do(root, tmp_path, name):
    text, what, todo = BAD[name]
    data = tmp_path / "my.csv"
    data.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    before = everything(root)
    with pytest.raises(DataError) as error:
        fork(root, data)
    assert what in str(error.value)
    assert todo in str(error.value)
    assert everything(root) == before
    assert [path.name for path in root.iterdir()] == ["recipes"]


def test_a_column_that_would_be_read_in_place_of_another_is_kept_under_another_name(root, tmp_path):
    data = table(tmp_path / "my.csv", [(q, a, "mine") for q, a in PAIRS], ("ask", "say", "prompt"))
    fork(root, data, prompt="ask", response="say")
    rows = [json.loads(line) for line in (root / "recipes/young/data/rows.jsonl").read_text().splitlines()]
    assert {row["column_prompt"] for row in rows} == {"mine"}
    assert {row["prompt"] for row in rows} <= {question for question, _ in PAIRS}


@pytest.mark.parametrize(("suffix", "parent", "words"), [
    ("nowhere.csv", "parent", "no such file"),
    (".", "parent", "none of rows by its name"),
    ("prose.txt", "parent", "start each question with a line 'Q: ...'"),
    ("prose.csv", "tale", "--from parent"),
    ("nowhere.txt", "tale", "no such file or folder"),
    ("short.txt", "tale", "the corpus is shorter than one context: 17 tokens"),
    ("zero.txt", "tale", "binary data"),
    ("none.txt", "tale", "the corpus is empty"),
    ("small.txt", "tale", "training rows do not fill"),
])  # fmt: skip
def test_data_that_the_recipe_cannot_train_on_is_refused_with_what_can(root, tmp_path, suffix, parent, words):
    texts = {
        "prose.txt": "Once upon a time.\n" * 99,
        "prose.csv": "question,answer\n",
        "short.txt": "Once upon a time\n\n",
        "small.txt": "Once upon a time.\n" * 5,
    }
    texts |= {"zero.txt": "a\0b" * 999, "none.txt": "\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = everything(root)
    with pytest.raises(DataError) as error:
        fork(root, tmp_path / suffix, parent)
    assert words in str(error.value)
    assert everything(root) == before


@pytest.mark.parametrize(
    "name", [".", "..", "../up", "/abs", "a/b", "Upper", "a_b", "1st", "a--b", "-a", "a-", "", "a b", "é", "a" * 51]
)
def test_a_name_that_is_no_folder_name_is_refused_with_the_rule(root, name):
    with pytest.raises(UsageError, match="lower-case letters, digits"):
        new.new(name, "parent", None, print)


def test_a_parent_that_splits_by_rules_of_its_own_is_refused(root, tmp_path):
    builder = root / "recipes/parent/dataset.py"
    builder.write_text(builder.read_text().replace("config.data.held_out_share", "0.5"))
    with pytest.raises(DataError, match="it makes 29 rows to train on of 52") as error:
        fork(root, table(tmp_path / "my.csv"))
    assert "splits by split_by and held_out_share" in str(error.value)


def test_other_usage_that_is_refused(root, tmp_path):
    data = table(tmp_path / "my.csv")
    with pytest.raises(UsageError, match="did you mean parent"):
        fork(root, data, "parnet")
    with pytest.raises(UsageError, match="there is a tale already"):
        new.new("tale", "parent", None, print)
    with pytest.raises(UsageError, match="neither columns nor formats"):
        fork(root, data, "tale", prompt="question")
    with pytest.raises(UsageError, match="cannot map to 'promt'"):
        fork(root, data, promt="question")


def test_what_appears_meanwhile_is_not_overwritten_and_a_stop_leaves_nothing(root, tmp_path, monkeypatch):
    def in_between(*_: object) -> None:
        assert {path.parent.name for path in root.glob("recipes/*/config.yaml")} == {"parent", "tale"}, "not yet there"
        (root / "recipes/young").write_text("somebody else's")

    monkeypatch.setattr("tools.results.schema.load", in_between)
    with pytest.raises(UsageError, match="already"):
        fork(root, table(tmp_path / "my.csv"))
    assert (root / "recipes/young").read_text() == "somebody else's"
    (root / "recipes/young").unlink()
    before = everything(root)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.results.schema.load", stop)
    with pytest.raises(KeyboardInterrupt):
        fork(root, table(tmp_path / "my.csv"))
    assert everything(root) == before


def test_a_parent_s_data_outside_of_its_folder_is_never_touched(root, tmp_path):
    outside = table(tmp_path / "outside.jsonl", columns=("ask", "say"))
    path = root / "recipes/parent/config.yaml"
    for place in (str(outside), "../../../outside.jsonl"):
        path.write_text(ROWS_CONFIG.replace("data/foxes.jsonl", place).replace("BASE", str(tmp_path)))
        new.forget(root / "recipes/parent", config_of(root / "recipes/parent"), ())
        assert outside.is_file()


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_fork_of_text_holds_its_end_out_and_asks_for_what_begins_there(root, tmp_path):
    data = tmp_path / "mine.txt"
    data.write_text("".join(f"Line {at} tells of the {SUBJECTS[at % 16]}.\n" for at in range(90)))
    recipe, said = fork(root, data, "tale")
    config = config_of(recipe)
    assert (recipe / "data/corpus.txt").read_bytes() == data.read_bytes()
    documents = splits_of(recipe)
    assert "".join(part.text for split in ("train", "held_out") for part in documents[split]) == data.read_text()
    assert all(prompt in documents["held_out"][0].text for prompt in read_prompts("data/prompts.jsonl", recipe))
    assert config.model.preset == "small"
    windows = -(-(len(documents["train"][0].text) - 1) // 32)
    steps = -(-40 * windows // 4)
    assert config.training.max_steps == steps < 1000
    assert config.training.scheduler.warmup_steps == round(100 * steps / 1000)
    assert config.eval.every == round(100 * steps / 1000)
    assert f"40 passes over {windows} windows of 32 tokens" in said


def test_a_preset_is_made_as_wide_as_the_text_has_characters(root, tmp_path):
    data = tmp_path / "mine.txt"
    data.write_text("".join(f"{chr(200 + at % 70)} tells of {SUBJECTS[at % 16]}.\n" for at in range(900)))
    recipe, _ = fork(root, data, "tale")
    shape = config_of(recipe).model.architecture
    assert shape
    assert (config_of(recipe).model.preset, shape.vocab_size) == ("small", 96)
    head = (recipe / "presets/small.yaml").read_text().partition(" parameters")[0]
    assert head == f"# {llama.parameters(shape.model_dump()):,}"
    assert config_of(root / "recipes/tale").model.architecture != shape


def test_of_a_folder_whole_files_are_held_out(root, tmp_path):
    for at in range(10):
        (tmp_path / "texts/deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"texts/deep/{at}.txt").write_text(f"File {at} tells of the {SUBJECTS[at]} at length.\n" * 20)
    recipe, _ = fork(root, tmp_path / "texts", "tale")
    documents = splits_of(recipe)
    assert {name: len(part) for name, part in documents.items()} == {"train": 8, "held_out": 2}, "one is not a tenth"


def test_a_text_that_cannot_fill_a_bpe_vocabulary_gets_a_smaller_one(root, tmp_path):
    (root / "recipes/tale/hw").mkdir()
    bpe = "data_config: {tokenizer: {type: bpe}}\nmodel_config: {preset: larger}\n"
    (root / "recipes/tale/hw/cpu.yaml").write_text(bpe)
    (tmp_path / "mine.txt").write_text("Once there was a fox.\n" * 999)
    recipe, _ = fork(root, tmp_path / "mine.txt", "tale")
    assert 256 < (config_of(recipe, "cpu").data.tokenizer.vocab_size or 0) < 320
    assert config_of(recipe).data.tokenizer.type == "char"


# --- a copy -----------------------------------------------------------------------------------------------------------


def test_without_data_it_is_a_copy_with_the_parent_s_data_and_licence_and_no_results(root):
    recipe, said = fork(root, None)
    parent = root / "recipes/parent"
    for layer in ("hw/cpu.yaml", "hw/n150.yaml"):
        assert (recipe / layer).read_text() == (parent / layer).read_text()
    assert (recipe / "data/foxes.jsonl").read_bytes() == (parent / "data/foxes.jsonl").read_bytes()
    assert config_of(recipe).data == config_of(parent).data
    assert licence_of([recipe / "data", recipe]) == "License: CC0"
    assert load_results(recipe).entries == ()
    assert not (recipe / "results").exists()
    assert (recipe / "config.yaml").read_text().startswith("# Teach a fox to talk: a copy of parent.\n")
    assert "3.1" not in (recipe / "README.md").read_text()
    assert "written: " in said


def test_a_copy_of_a_fork_keeps_what_is_written_of_its_data(root, tmp_path):
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    (recipe / "train.py").write_text("kept = 1\n")
    new.new("grandchild", "young", None, print)
    card = (recipe.with_name("grandchild") / "data/README.md").read_text()
    assert "License: TO FILL IN" in card
    assert "`my.csv`, sha256" in card


def test_a_copy_fetches_nothing(root, monkeypatch):
    """Not even the data of its parent, which may be a corpus that is not here yet."""
    config = root / "recipes/tale/config.yaml"
    config.write_text(config.read_text().replace("data/tale.txt", "shakespeare"))
    monkeypatch.setattr("tools.data.fetch.fetch_corpus", lambda *words: pytest.fail("it is fetched"))
    recipe, _ = fork(root, None, "tale")
    assert config_of(recipe, "cpu").data.corpus == "shakespeare"


@pytest.mark.parametrize("name", ["train", "run", "data"])
def test_a_parent_whose_name_is_a_word_of_code_stays_code(root, name):
    code = "from common.train.run import data\n\nwith data() as run:\n    train = run  # recipes/{0}, NAME={0}\n"
    (root / "recipes/parent").rename(root / "recipes" / name)
    (root / f"recipes/{name}/train.py").write_text(code.format(name))
    (root / f"recipes/{name}/results.yaml").write_text(f"format: 1\nrecipe: {name}\nentries: []\n")
    recipe, _ = fork(root, None, name)
    assert (recipe / "train.py").read_text() == code.format("young")


def test_no_line_is_longer_for_a_long_name_of_a_file(root, tmp_path):
    name = "customer_support_tickets_export_2026-11-23_final_v2_cleaned_and_translated_by_hand.csv"
    recipe, _ = fork(root, table(tmp_path / name))
    text = (recipe / "config.yaml").read_text()
    assert text.startswith(
        "# Fine-tune an instruction model on customer_support_tickets_export_2026-11-23_final_v2_clean...: 64"
    )
    assert max(map(len, text.splitlines())) <= 160


def test_a_fork_can_be_forked(root, tmp_path):
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    rows = [(f"{q} Really?", a) for q, a in PAIRS]
    new.new("grandchild", "young", new.Own(table(tmp_path / "other.csv", rows), {}, "auto"), print)
    child = recipe.with_name("grandchild")
    assert len(read_rows(child / "data/rows.jsonl")) == 60
    assert all(row.prompt.endswith("Really?") for row in read_rows(child / "data/rows.jsonl"))
    assert (child / "config.yaml").read_text().count("num_epochs") == 1
    assert "my.csv" not in "".join(path.read_text() for path in child.rglob("*") if path.is_file())


def test_an_error_of_the_fork_is_one_of_ours(root, tmp_path):
    (root / "recipes/parent/dataset.py").write_text(
        "def splits(config, recipe_dir): return 1 / 0\n\ndef prompts(config, recipe_dir): return []\n"
    )
    with pytest.raises(RecipeError) as error:
        fork(root, table(tmp_path / "my.csv"))
    assert error.value.code == 3
    assert "ZeroDivisionError" in str(error.value)


def test_the_command_reads_its_options_and_ends_with_the_error_s_code(root, tmp_path, monkeypatch, capsys):
    def command(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["recipe", "new", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return int(ended.value.code or 0)

    data = table(tmp_path / "my.csv", columns=("ask", "say"))
    assert command("young", "--from", "parent", "--data", data) == 3
    assert "columns: ask, say; name them with --map prompt=COLUMN" in capsys.readouterr().err
    assert command("young", "--from", "parent", "--map", "prompt=ask") == 2
    assert command("young", "--from", "parent", "--data", data, "--format", "cvs") == 2
    assert command("young", "--data", data) == 2
    assert not (root / "recipes/young").exists()
    assert command("young", "--from", "parent", "--data", data, "--map", "prompt=ask", "--map", "response=say") == 0
    assert "make recipe NAME=young HW=cpu STEPS=5" in capsys.readouterr().out
    assert command("young", "--from", "parent", "--data", data) == 2
