"""`recipe new`: what a fork is made of, what it refuses, and that it is there whole or not at all."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from common import config as configs
from common import hardware
from common.config.schema import Architecture
from common.data.build import Builder
from common.data.corpora import Document
from common.data.rows import group_hash, read_prompts, read_rows
from common.errors import DataError, RecipeError, UsageError
from tools.cli import main
from tools.cli.data import licence_of
from tools.data import checks
from tools.results.schema import load as load_results
from tools.scaffold import corpus, new
from tools.scaffold import rows as scaffold_rows
from tools.scaffold.rows import Lengths, max_length, schedule
from tools.scaffold.yaml import Setting, YamlFile

ROWS_BUILDER = '''"""The rows of recipes/parent."""
from tools.data.convert import read_source
from common.data.rows import evaluation_prompts, split_held_out

def splits(config, recipe_dir):
    return split_held_out(read_source(config.data, recipe_dir), config.data.held_out_share, by=config.data.split_by)

def prompts(config, recipe_dir):
    return evaluation_prompts(config.eval.prompts, recipe_dir)
'''
TEXT_BUILDER = """
from common.data.corpora import read_corpus, split_documents
from common.data.rows import evaluation_prompts

def documents(config, recipe_dir):
    return split_documents(read_corpus(config.data.corpus, recipe_dir), config.data.held_out_share)

def prompts(config, recipe_dir):
    return evaluation_prompts(config.eval.prompts, recipe_dir)
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
  source: data/foxes.csv
  format: csv
  map: {prompt: ask, response: say}
  held_out_share: 0.3
eval_config:
  every: 5
  prompts: [Why]
checkpoint_config:
  every: 5
"""
SHAPE = """\
# A model of its own.
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
LEAKS = {"D002", "D003", "D101", "D102", "D103", "D104"}
QUESTIONS = [f"{ask} the {subject}?" for ask in ("What is", "Who knew", "Why not", "Where lay") for subject in SUBJECTS]
PAIRS = [
    (question, f"{question.split()[-1][:-1].title()} number {at} is long told.")
    for at, question in enumerate(QUESTIONS)
]


@pytest.fixture
def root(tmp_path, tiny_base, monkeypatch) -> Path:
    """A repository with two recipes: `parent` trains on rows, `tale` on a text."""
    monkeypatch.setenv("RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("common.paths.RECIPES", tmp_path / "root/recipes")
    files = {
        "parent/config.yaml": ROWS_CONFIG.replace("BASE", str(tiny_base)),
        "parent/hw/cpu.yaml": "training_config:\n  batch_size: 8\n",
        "parent/hw/n150.yaml": "data_config:\n  max_length: 64\n\nlogging_config:\n  log_every: 3\n",
        "parent/dataset.py": ROWS_BUILDER,
        "parent/train.py": '"""make recipe-fox, or recipe run parent"""\n',
        "parent/data/foxes.csv": "ask,say\n" + "".join(f"What is {n}?,A number: {n}.\n" for n in range(40)),
        "parent/README.md": "# parent\n\nLicense: CC0\n\nIt scored 3.1.\n",
        "parent/results.yaml": "format: 1\nrecipe: parent\nentries: []\n",
        "parent/results/curve.csv": "1,2\n",
        "tale/config.yaml": TEXT_CONFIG,
        "tale/presets/small.yaml": SHAPE.replace("VOCABULARY", "64").replace("LAYERS", "2"),
        "tale/presets/larger.yaml": SHAPE.replace("VOCABULARY", "128").replace("LAYERS", "3"),
        "tale/presets/largest.yaml": SHAPE.replace("VOCABULARY", "128").replace("LAYERS", "9"),
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


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def config_of(recipe: Path, board: str = "n150") -> configs.Config:
    return configs.load(recipe, hardware.get(board))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_user_s_is_in_the_fork_once_and_on_one_side(root, tmp_path):
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    splits = Builder(config_of(recipe), recipe).splits()
    asked = [json.loads(line) for line in (recipe / "data/prompts.jsonl").read_text().splitlines()]
    found = [(row.prompt, row.response) for part in splits.values() for row in part]
    assert sorted(found + [(row["prompt"], row["response"]) for row in asked]) == sorted(PAIRS)
    assert {name: len(part) for name, part in splits.items()} == {"train": 52, "held_out": 8}
    assert len(asked) == 4
    assert "64 rows of" in said
    assert "52 to train on, 8 held out, 4 asked" in said
    report = checks.check(splits, [row["prompt"] for row in asked])
    assert not [finding.id for finding in report.findings if finding.id <= "D104"], "no leak"


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
    assert config_of(recipe).data.format == "auto"
    assert config_of(recipe).data.map == {}
    assert load_results(recipe).entries == ()
    assert everything(root / "recipes/parent") == before


def test_what_is_set_follows_from_the_rows_and_stands_with_its_reason(root, tmp_path):
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    board, cpu = config_of(recipe), config_of(recipe, "cpu")
    assert (board.training.batch_size, board.training.num_epochs, board.training.max_steps) == (32, 5, None)
    assert (board.training.scheduler.warmup_steps, board.eval.every, board.checkpoint.every) == (1, 3, 3)  # of 9
    assert (cpu.training.batch_size, cpu.training.num_epochs, cpu.eval.every, cpu.checkpoint.every) == (8, 5, 11, 9)
    assert board.data.max_length is None
    assert "max_length: null" in (recipe / "config.yaml").read_text()
    assert (
        "num_epochs: 5                   # 52 rows: 1.6 steps of 32 a pass, 9 in all"
        in (recipe / "config.yaml").read_text()
    )
    assert "training_config.num_epochs: 5  (52 rows: 1.6 steps of 32 a pass, 9 in all)" in said
    assert "num_epochs" not in (recipe / "hw/cpu.yaml").read_text(), "an overlay holds what differs"
    assert (recipe / "hw/n150.yaml").read_text() == "logging_config:\n  log_every: 3\n", "cannot undo max_length"


def test_an_overlay_in_which_nothing_differs_any_more_goes(root, tmp_path):
    (root / "recipes/parent/hw/cpu.yaml").write_text("training_config:\n  num_epochs: 9\n")
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    assert not (recipe / "hw/cpu.yaml").exists()
    assert config_of(recipe, "cpu").training.num_epochs == 5


@pytest.mark.parametrize("format", ["jsonl", "messages", "alpaca", "sharegpt", "text", "semicolon"])
def test_every_format_that_data_convert_takes(tmp_path, format):
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
    rows, named = scaffold_rows.read(data, "auto", {})
    assert [(row.prompt, row.response) for row in rows] == PAIRS
    assert named == {"messages": "jsonl", "semicolon": "csv"}.get(format, format)


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
    assert set(read_prompts(recipe / "data/prompts.jsonl")) < set(QUESTIONS)


def test_nearly_the_same_prompts_stay_on_one_side_over_any_chain(root, tmp_path):
    words = "one two three four five six seven eight nine ten eleven".split()
    chain = [(" ".join(words[at : at + 9]), f"Link {at} of a chain that holds.") for at in range(3)]
    asked = [" ".join(f"{word}{at}" for word in SUBJECTS[:6]) for at in range(60)]
    kin = [(f"{text}{please}", f"Answer {text}.") for text in asked for please in (" please?", "?", " kindly?")]
    recipe, said = fork(root, table(tmp_path / "my.csv", [*chain, *kin]))
    assert config_of(recipe).data.split_by == "group"
    assert "nearly the same prompts (61 times)" in said
    assert "a row that is added needs a group too: any word of its own, or that of the rows it resembles" in said
    splits = Builder(config_of(recipe), recipe).splits()
    asked = read_prompts(recipe / "data/prompts.jsonl")
    found = {finding.id for finding in checks.check(splits, asked).findings}
    assert not found & LEAKS
    twins = read_prompts(recipe / "data/twins.jsonl")
    assert f"{len(asked)} rows set aside, with {len(twins)} like them" in said
    assert len(asked) + len(twins) + sum(map(len, splits.values())) == 183, "every row is somewhere, once"
    sides = {name for name, part in splits.items() for row in part if row.response.startswith("Link")}
    assert len(sides) == 1


def boiling(count: int) -> list[tuple[str, str]]:
    """Rows of one template: any two prompts are nearly the same."""
    text = "What is the boiling point of {} in degrees Celsius at sea level?"
    return [
        (text.format(f"{SUBJECTS[at % 16]}{at}"), f"Element {at} boils at {at * 7} degrees.") for at in range(count)
    ]


def leaks_of(recipe: Path) -> set[str]:
    prompts = read_prompts(recipe / "data/prompts.jsonl")
    report = checks.check(Builder(config_of(recipe), recipe).splits(), prompts)
    return {finding.id for finding in report.findings} & LEAKS


def test_a_template_is_split_by_the_exact_prompt_and_that_is_said(root, tmp_path):
    recipe, said = fork(root, table(tmp_path / "my.csv", boiling(60)))
    assert "48 to train on, 8 held out, 4 asked" in said
    assert "60 rows in nearly the same words are too many to stay on one side" in said
    assert config_of(recipe).data.split_by is None
    assert not leaks_of(recipe) & {"D002", "D003", "D103"}, "nearly the same is a warning, the same would be an error"


def test_a_large_template_beside_other_rows_is_not_held_out_whole(root, tmp_path):
    for size in (100, 240):  # one is held out whole, or trained on whole, by the luck of its hash
        recipe, said = fork(root, table(tmp_path / f"{size}.csv", [*boiling(size), *PAIRS[:60]]), name=f"young-{size}")
        splits = Builder(config_of(recipe), recipe).splits()
        assert 0.08 < len(splits["held_out"]) / (size + 60) < 0.2
        sides = {name for name, part in splits.items() for row in part if "boiling" in row.prompt}
        assert sides == {"train", "held_out"}
        assert f"{size} rows in nearly the same words" in said
        assert all("boiling" not in prompt for prompt in read_prompts(recipe / "data/prompts.jsonl")), "others are left"
        assert not leaks_of(recipe) & {"D002", "D003", "D102", "D103", "D104"}


def test_several_templates_that_would_take_more_than_is_wanted_come_apart_too(root, tmp_path):
    shapes = (
        "Tell me in one line what the colour {} is for",
        "How many grams of {} go into a cake of ours",
        "Name a city whose old market sells {} all year",
        "Which of your friends likes {} more than they say",
        "Write down the price that {} had last winter here",
        "Explain to a small child why {} falls from trees",
    )
    rows = [(shape.format(f"{word}{at}"), f"{word} {at}.") for at, shape in enumerate(shapes) for word in SUBJECTS[:14]]
    recipe, said = fork(root, table(tmp_path / "my.csv", rows))
    assert "not by group: " in said
    assert "would be held out or set aside, 12 are wanted" in said
    assert len(Builder(config_of(recipe), recipe).splits()["train"]) == 72


def test_one_prompt_with_most_of_the_rows_is_refused_where_it_would_be_held_out(root, tmp_path):
    prompt = min((f"What is {at}?" for at in range(99)), key=lambda text: group_hash(text.lower()))
    rows = [(prompt, f"A thing of number {at}.") for at in range(240)]
    with pytest.raises(DataError, match="of 304 rows would be held out or set aside, 34 are wanted") as error:
        fork(root, table(tmp_path / "my.csv", [*PAIRS, *rows]))
    assert "one prompt comes 240 times" in str(error.value)


def test_who_has_the_prompt_of_an_evaluation_is_neither_trained_on_nor_scored(root, tmp_path):
    rows = [(question, f"{answer} {more}") for question, answer in PAIRS for more in ("Yes.", "No.", "Perhaps.")]
    recipe, _ = fork(root, table(tmp_path / "my.csv", rows))
    assert not leaks_of(recipe)
    asked, twins = (read_prompts(recipe / f"data/{name}.jsonl") for name in ("prompts", "twins"))
    assert sorted(twins) == sorted(asked * 2)
    assert len(set(asked)) == len(asked) == 4
    assert f"{len(twins)} rows with the same or nearly the same prompts" in " ".join(
        (recipe / "README.md").read_text().split()
    )


def test_the_first_and_last_of_a_chain_are_kin_though_they_are_not_alike():
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    chain = [" ".join(words[at : at + 9]) for at in range(4)]
    assert not list(checks.near_pairs([(chain[0], "a")], [(chain[3], "b")]))
    assert checks.alike([chain[0], chain[3], "Another thing altogether", chain[2], chain[1]]) == [0, 0, 2, 0, 0]


def test_a_column_of_topics_holds_the_rows_of_a_topic_together(root, tmp_path):
    rows = [(q, a, SUBJECTS[at % 16], at) for at, (q, a) in enumerate(PAIRS)]
    recipe, said = fork(root, table(tmp_path / "my.csv", rows, ("question", "answer", "topic", "ticket")))
    assert config_of(recipe).data.split_by == "topic"
    assert "kept beside prompt and response, not trained on, part of the recipe: ticket" in said
    splits = Builder(config_of(recipe), recipe).splits()
    topics = [{row.extra["topic"] for row in part} for part in splits.values()]
    assert not topics[0] & topics[1]
    few = [(q, a, at % 3, at) for at, (q, a) in enumerate(PAIRS)]
    new.new(
        "other",
        "parent",
        new.Own(table(tmp_path / "few.csv", few, ("question", "answer", "topic", "n")), {}, "auto"),
        print,
    )
    assert config_of(recipe.with_name("other")).data.split_by is None, "three topics are too few to hold one out"


@pytest.mark.parametrize(
    ("topics", "reason"),
    [
        (["", *[f"t{at % 16}" for at in range(63)]], "1 of 64 rows have none"),
        ([f"t{at % 3}" for at in range(64)], "it has 3 values, 10 are needed"),
        ([f"t{at}" for at in range(64)], "it has 64 values for 64 rows"),
        (["t", *["t"] * 39, *[f"t{at}" for at in range(24)]], "one value has 40 of 64 rows"),
    ],
)
def test_why_a_column_is_not_taken_is_said(root, tmp_path, topics, reason):
    rows = [(*pair, topic) for pair, topic in zip(PAIRS, topics, strict=True)]
    recipe, said = fork(root, table(tmp_path / "my.csv", rows, ("question", "answer", "topic")))
    assert config_of(recipe).data.split_by is None
    assert f"; not by topic: {reason}" in said
    assert "not by topic" in (recipe / "config.yaml").read_text()


def test_the_share_means_the_rows_it_says_and_adding_one_moves_no_other(root, tmp_path):
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    before = {row.prompt for row in Builder(config_of(recipe), recipe).splits()["held_out"]}
    with (recipe / "data/rows.jsonl").open("a") as file:
        file.write('{"prompt": "What is new here?", "response": "This one."}\n')
    after = {row.prompt for row in Builder(config_of(recipe), recipe).splits()["held_out"]}
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
    found = {setting.key.rpartition(".")[2]: setting.value for setting in schedule(rows, batch, limit)[:3]}
    assert found == {stop[0]: stop[1], "warmup_steps": warm, "every": every}


def test_long_rows_are_cut_only_where_they_are_few_and_would_pad_all_the_others():
    def of(*sizes: int) -> int | None:
        return max_length(Lengths(sizes, sizes, "by a test", 2048)).value

    assert of(*[90] * 99, 180) is None, "within twice what the others need"
    assert of(*[90] * 99, 400) == 96
    assert of(*[90] * 50, *[400] * 50) is None, "half of the rows are no outliers"


def test_without_a_tokenizer_lengths_are_estimated_and_that_is_said(root, tmp_path, tiny_base):
    for layer in ("config.yaml", "hw/cpu.yaml"):
        path = root / "recipes/parent" / layer
        path.write_text(path.read_text().replace(str(tiny_base), "tinyllama-1.1b-chat"))
    recipe, said = fork(root, table(tmp_path / "my.csv"))
    assert "estimated at 3 bytes a token: no base's tokenizer is on this machine" in said
    assert config_of(recipe).data.max_length is None, "the build counts"


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
    "other columns": ("ask,say\n" + LINES, "columns: ask, say", "prompt=ask --map response=say"),
    "too few": (FEW, "16 with 16 different prompts, 44 are needed", "32 to train on"),
    "all the same": (SAME, "90 with 1 different prompts (case,", "write more"),
    "empty": ("", "no row", "Your own data"),
    "no row": ("question,answer\n", "no row", "Your own data"),
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
        "1 of 65 rows are longer than the 256 positions",
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


def test_a_column_that_would_be_read_in_place_of_another_is_refused(root, tmp_path):
    data = table(tmp_path / "my.csv", [(q, a, "mine") for q, a in PAIRS], ("ask", "say", "prompt"))
    with pytest.raises(DataError, match="read in their place") as error:
        fork(root, data, prompt="ask", response="say")
    assert "kept columns: prompt" in str(error.value)


@pytest.mark.parametrize(("suffix", "parent", "words"), [
    ("nowhere.csv", "parent", "no such file"),
    (".", "parent", "rows come from one file"),
    ("prose.txt", "parent", "--from tale"),
    ("prose.csv", "tale", "--from parent"),
    ("nowhere.txt", "tale", "no such file or folder"),
    ("short.txt", "tale", "too small: 17 tokens to train on, 128 are needed"),
    ("zero.txt", "tale", "binary data"),
    ("none.txt", "tale", "the corpus is empty"),
    ("wide.txt", "tale", "no preset of this recipe has room"),
])  # fmt: skip
def test_data_that_the_recipe_cannot_train_on_is_refused_with_what_can(root, tmp_path, suffix, parent, words):
    texts = {
        "prose.txt": "Once upon a time.\n" * 99,
        "prose.csv": "question,answer\n",
        "short.txt": "Once upon a time\n\n",
    }
    texts |= {"zero.txt": "a\0b" * 999, "none.txt": "\n", "wide.txt": "".join(map(chr, range(0x4E00, 0x5000))) * 4}
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

    monkeypatch.setattr(new, "check", in_between)
    with pytest.raises(UsageError, match="already"):
        fork(root, table(tmp_path / "my.csv"))
    assert (root / "recipes/young").read_text() == "somebody else's"
    (root / "recipes/young").unlink()
    before = everything(root)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(new, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        fork(root, table(tmp_path / "my.csv"))
    assert everything(root) == before


def test_a_parent_s_data_outside_of_its_folder_is_never_touched(root, tmp_path):
    outside = table(tmp_path / "outside.csv", columns=("ask", "say"))
    path = root / "recipes/parent/config.yaml"
    for place in (str(outside), "../../../outside.csv"):
        path.write_text(ROWS_CONFIG.replace("data/foxes.csv", place).replace("BASE", str(tmp_path)))
        new.forget(root / "recipes/parent", config_of(root / "recipes/parent"))
        assert outside.is_file()


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_fork_of_text_holds_its_end_out_and_asks_for_what_begins_there(root, tmp_path):
    data = tmp_path / "mine.txt"
    data.write_text("".join(f"Line {at} tells of the {SUBJECTS[at % 16]}.\n" for at in range(90)))
    recipe, said = fork(root, data, "tale")
    config = config_of(recipe)
    assert (recipe / "data/corpus.txt").read_bytes() == data.read_bytes()
    documents = Builder(config, recipe).documents()
    assert "".join(part.text for split in ("train", "held_out") for part in documents[split]) == data.read_text()
    assert all(prompt in documents["held_out"][0].text for prompt in read_prompts(recipe / "data/prompts.jsonl"))
    assert config.model.preset == "small"
    windows = -(-(len(documents["train"][0].text) - 1) // 32)
    steps = -(-40 * windows // 4)
    assert config.training.max_steps == steps < 1000
    assert config.training.scheduler.warmup_steps == round(100 * steps / 1000)
    assert config.eval.every == round(100 * steps / 1000)
    assert f"40 passes over {windows} windows of 32 tokens" in said


def test_a_text_of_more_characters_gets_the_preset_that_has_room_and_is_nearest_in_size(root, tmp_path):
    data = tmp_path / "mine.txt"
    data.write_text("".join(f"{chr(200 + at % 70)} tells of {SUBJECTS[at % 16]}.\n" for at in range(900)))
    recipe, said = fork(root, data, "tale")
    assert config_of(recipe).model.preset == "larger"
    assert "nearest in size to small that fits" in said


def test_of_a_folder_whole_files_are_held_out(root, tmp_path):
    for at in range(10):
        (tmp_path / "texts/deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"texts/deep/{at}.txt").write_text(f"File {at} tells of the {SUBJECTS[at]} at length.\n" * 20)
    recipe, _ = fork(root, tmp_path / "texts", "tale")
    documents = Builder(config_of(recipe), recipe).documents()
    assert {name: len(part) for name, part in documents.items()} == {"train": 8, "held_out": 2}, "one is not a tenth"


def test_bpe_must_be_filled_by_the_text(tmp_path):
    def of(text: str) -> corpus.Text:
        part = [Document("a", text)]
        return corpus.Text("a", {"train": part}, Setting("a", 0.1, ""))

    shape = Architecture(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    assert not corpus.fits(of("ab " * 99), "bpe", 4, shape)
    assert corpus.fits(of(" ".join(QUESTIONS)), "bpe", 40, shape)


# --- a copy -----------------------------------------------------------------------------------------------------------


def test_without_data_it_is_a_copy_with_the_parent_s_data_and_licence_and_no_results(root):
    recipe, said = fork(root, None)
    parent = root / "recipes/parent"
    for layer in ("hw/cpu.yaml", "hw/n150.yaml"):
        assert (recipe / layer).read_text() == (parent / layer).read_text()
    assert (recipe / "data/foxes.csv").read_bytes() == (parent / "data/foxes.csv").read_bytes()
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
    monkeypatch.setattr("common.data.corpora.fetched", lambda *words: pytest.fail("it is fetched"))
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


def test_lines_that_have_too_many_fields_are_no_matter_of_columns(root, tmp_path):
    path = tmp_path / "my.csv"
    path.write_text(
        "question;answer\n" + "".join(f"{question};one; two; three {at}\n" for at, question in enumerate(QUESTIONS))
    )
    with pytest.raises(DataError) as error:
        fork(root, path)
    assert "double quotes" in str(error.value.todo)
    assert "--map" not in str(error.value.todo)


def test_a_fork_can_be_forked(root, tmp_path):
    recipe, _ = fork(root, table(tmp_path / "my.csv"))
    rows = [(f"{q} Really?", a) for q, a in PAIRS]
    new.new("grandchild", "young", new.Own(table(tmp_path / "other.csv", rows), {}, "auto"), print)
    child = recipe.with_name("grandchild")
    assert len(read_rows(child / "data/rows.jsonl")) == 60
    assert all(row.prompt.endswith("Really?") for row in read_rows(child / "data/rows.jsonl"))
    assert (child / "config.yaml").read_text().count("num_epochs") == 1
    assert "my.csv" not in "".join(path.read_text() for path in child.rglob("*") if path.is_file())


# --- YAML -------------------------------------------------------------------------------------------------------------


def edited(tmp_path: Path, text: str, *settings: Setting, remove: tuple[str, ...] = ()) -> str:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    file = YamlFile(path)
    for key in remove:
        file.remove(key)
    for setting in settings:
        file.set(setting)
    file.write()
    return path.read_text() if path.is_file() else ""


def test_a_value_changes_in_its_line_and_the_rest_stays_as_it_was(tmp_path):
    text = "# head\na:\n  b: 1  # one\n  # about c\n  c: [1,\n    2]\n\n# about d\nd:\n  e:\n    - x\n    - y\n"
    found = edited(tmp_path, text, Setting("a.c", 3, "three"), Setting("d.e", "z", "now one"))
    assert found == (
        "# head\na:\n  b: 1  # one\n  c: 3                            # three\n\n# about d\nd:\n"
        "  e: z                            # now one\n"
    )


def test_a_key_that_is_not_there_goes_to_the_end_of_its_section(tmp_path):
    found = edited(
        tmp_path, "a:\n  b: 1\n\nd:\n  e: 2\n", Setting("a.x.y", None, "why " * 40), Setting("f.g", 1, "new")
    )
    assert found.startswith("a:\n  b: 1\n  x:\n    # why why")
    assert found.endswith("why\n    y: null\n\nd:\n  e: 2\n\nf:\n  g: 1                            # new\n")
    assert max(map(len, found.splitlines())) <= 120


def test_what_is_removed_takes_its_empty_section_along_and_an_empty_file_goes(tmp_path):
    text = "a:\n  b:\n    c: 1\n\nd: 2\n"
    assert edited(tmp_path, text, remove=("a.b.c", "nothing.here")) == "d: 2\n"
    assert edited(tmp_path, text, remove=("a.b.c", "d")) == ""


def test_flow_style_is_written_out(tmp_path):
    found = edited(tmp_path, "# head\na: {b: 1e-3, c: 2}\n", Setting("a.c", 3, "three"))
    assert found == "# head\na:\n  b: 0.001\n  c: 3                            # three\n"
    nested = "a:\n  b: 1  # one\n  c: {d: 1, e: {f: 2}}  # goes\ng: {h: 1}\n"
    assert edited(tmp_path, nested, remove=("a.c.e.f",)) == "a:\n  b: 1  # one\n  c:\n    d: 1\ng: {h: 1}\n"
    assert edited(tmp_path, '{"a": {"b": 1}}\n', Setting("a.b", 2, "two")).startswith("a:\n  b: 2 ")


def test_an_error_of_the_fork_is_one_of_ours(root, tmp_path):
    (root / "recipes/parent/dataset.py").write_text("def prompts(config, recipe_dir): return 1 / 0\n")
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
    assert "--map response=say (make: MAP='prompt=ask response=say')" in capsys.readouterr().err
    assert command("young", "--from", "parent", "--map", "prompt=ask") == 2
    assert command("young", "--from", "parent", "--data", data, "--format", "cvs") == 2
    assert command("young", "--data", data) == 2
    assert not (root / "recipes/young").exists()
    assert command("young", "--from", "parent", "--data", data, "--map", "prompt=ask", "--map", "response=say") == 0
    assert "make recipe NAME=young HW=cpu STEPS=5" in capsys.readouterr().out
    assert command("young", "--from", "parent", "--data", data) == 2
