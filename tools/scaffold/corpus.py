"""A fork's plain text: copied, held out by its end or by whole files, and what its size makes of the config."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.config.layers import read_file
from common.config.schema import Architecture
from common.data import corpora, vocabulary
from common.data.corpora import Document
from common.data.rows import group_hash
from common.errors import DataError
from common.model import llama
from tools.scaffold.yaml import Setting

CORPUS, PROMPTS = "data/corpus", "data/prompts.jsonl"
ROW_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")
SHARE = 0.1  # of the characters, held out
PASSES = 40  # over the text; the published curve of the character model makes 44, and learns by heart in them
ASKED, BEGINNING = 4, 40  # evaluation prompts, and their characters at most
SAMPLE = 1 << 20  # characters that show whether a text fills a BPE vocabulary
LARGE = 20 << 20  # bytes that no longer belong into a repository


@dataclass(frozen=True)
class Text:
    """A corpus as the fork has it: `name` below the recipe, its documents by split, and how they were split."""

    name: str
    splits: dict[str, list[Document]]
    held_out_share: Setting

    def characters(self, *splits: str) -> int:
        """Of these splits, or of all."""
        return sum(len(document.text) for split in splits or self.splits for document in self.splits[split])

    def __str__(self) -> str:
        return f"{self.characters('train'):,} characters to train on, {self.characters('held_out'):,} held out"


def copy(data: Path, folder: Path) -> Text:
    """Copy a text file, or the *.txt files of a folder, into the fork in `folder`, and split it.

    Raises DataError for no UTF-8, binary data, or no text at all.
    """
    if not data.exists():
        raise DataError("no such file or folder", where=str(data))
    name = f"{CORPUS}.txt" if data.is_file() else CORPUS
    target = folder / name
    target.parent.mkdir()
    if data.is_file():
        shutil.copyfile(data, target)
    else:
        for file in sorted(data.rglob("*.txt")):
            (target / file.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(data))
        target.mkdir(exist_ok=True)
    try:
        documents = corpora.read_corpus(name, folder)
    except DataError as error:  # what is wrong is wrong with the user's own file
        where = (error.where or "").replace(str(target), str(data))
        raise DataError(error.what, where=str(data) if where == name else where, todo=error.todo) from error
    share = held_out_share(documents)
    return Text(name, corpora.split_documents(documents, float(share.value)), share)


def held_out_share(documents: Sequence[Document]) -> Setting:
    """The end of one text; of several, whole ones that come to a tenth of the characters, by a hash of their names."""
    key = "data_config.held_out_share"
    if len(documents) == 1:
        return Setting(key, SHARE, "the end of the text")
    order = sorted(documents, key=lambda document: group_hash(document.where))
    wanted, held = SHARE * sum(len(document.text) for document in documents), list[Document]()
    while sum(len(document.text) for document in held) < wanted and len(held) < len(order) - 1:
        held.append(order[len(held)])
    last, following = (group_hash(order[at].where) for at in (len(held) - 1, len(held)))
    digits = next(n for n in range(3, 15) if last < math.ceil(last * 10**n) / 10**n <= following)
    why = f"the hash puts {len(held)} of the {len(documents)} texts below it, whole"
    return Setting(key, math.ceil(last * 10**digits) / 10**digits, why)


# --- what it makes of the config ------------------------------------------------------------------------------------


def vocabulary_settings(text: Text, config: Config, recipe: Path) -> list[Setting]:
    """Keep tokenizer and preset where the text fits them; else another preset of the recipe; none: DataError."""
    found = {path.stem: shape for path in sorted((recipe / "presets").glob("*.yaml")) for shape in shapes_in(path)}
    own = config.model.architecture
    assert own is not None, "random weights have an architecture"
    characters = len(vocabulary.characters(text.splits["train"])) + 1
    if fits(text, config.data.tokenizer.type, characters, own):
        return []
    room = own.vocab_size

    def distance(name: str) -> float:
        counts = (llama.parameters(llama.hf_config(shape.model_dump())) for shape in (found[name], own))
        return abs(math.log(next(counts) / next(counts)))

    for name in sorted(found, key=distance):
        for kind in ("char", "bpe"):
            long_enough = found[name].max_position_embeddings >= length_of(config)
            if long_enough and fits(text, kind, characters, found[name]):
                why = f"nearest in size to {config.model.preset} that fits: {characters} ids as characters, not {room}"
                return [
                    Setting("model_config.preset", name, why),
                    Setting("data_config.tokenizer.type", kind, f"into the {found[name].vocab_size} ids of {name}"),
                ]
    rooms = ", ".join(f"{name} {shape.vocab_size}" for name, shape in found.items())
    raise DataError(
        f"the text has {characters} different characters, and no preset of this recipe has room for them: {rooms}",
        where="model_config.preset",
        todo="fork a recipe with a preset of a larger vocabulary, or use more text, which fills one of BPE",
    )


def length_of(config: Config) -> int:
    return config.data.max_length or 0


def shapes_in(preset: Path) -> Iterator[Architecture]:
    """The architecture of a preset, if it holds a whole one."""
    tree = read_file(preset).get("model_config.architecture")
    if isinstance(tree, dict):
        yield Architecture.model_validate(tree)


def fits(text: Text, kind: str, characters: int, shape: Architecture) -> bool:
    """Whether a tokenizer of this kind over the text has ids for the whole vocabulary of a model, and no more."""
    if kind == "char":
        return characters <= shape.vocab_size
    if shape.vocab_size <= 256:  # the bytes alone fill it
        return False
    sample, left = list[Document](), SAMPLE
    for document in text.splits["train"]:
        sample.append(Document(document.where, document.text[:left]))
        left -= len(sample[-1].text)
    return vocabulary.bpe_tokenizer(sample, shape.vocab_size).get_vocab_size() == shape.vocab_size


def tokens_in(text: Text, config: Config) -> int:
    """Tokens to train on: the characters, or for BPE as many as a sample of the text gives."""
    if config.data.tokenizer.type == "char":
        return text.characters("train")
    assert config.model.architecture is not None, "random weights have an architecture"
    sample = "".join(document.text for document in text.splits["train"])[:SAMPLE]
    tokenizer = vocabulary.bpe_tokenizer([Document("sample", sample)], config.model.architecture.vocab_size)
    return len(vocabulary.bpe_ids(tokenizer, sample)) * text.characters("train") // len(sample)


def schedule(text: Text, config: Config, where: str) -> list[Setting]:
    """Fewer steps for a short text, and with them shorter intervals; what the recipe has where the text is long.

    Raises DataError where the text cannot fill one batch.
    """
    length, batch, asked = length_of(config), config.training.batch_size, config.training.max_steps
    tokens = tokens_in(text, config)
    windows = math.ceil(max(tokens - 1, 0) / length)
    if windows < batch:
        raise DataError(
            f"the text is too small: {tokens:,} tokens to train on, {batch * length:,} are needed",
            where=where,
            todo=f"use more text: one batch ({config.hw}) is {batch} windows of {length} tokens, and "
            f"{text.characters('held_out'):,} of the {text.characters():,} characters are held out",
        )
    most = math.ceil(PASSES * windows / batch)
    if asked is None or asked <= most:
        return []
    keys = {
        "training_config.scheduler.warmup_steps": config.training.scheduler.warmup_steps,
        "eval_config.every": config.eval.every,
        "checkpoint_config.every": config.checkpoint.every,
    }
    stop = Setting("training_config.max_steps", most, f"{PASSES} passes over {windows} windows of {length} tokens")
    shorter = [(key, max(1, round(n * most / asked)), n) for key, n in keys.items() if n]
    return [stop, *(Setting(key, value, f"shorter with the run: it was {n} of {asked}") for key, value, n in shorter)]


def points(text: Text, prompts: int) -> list[str]:
    """The files, for the pages."""
    asked = f"{prompts} beginnings of held-out lines, which the model continues at every evaluation"
    return [f"`{text.name}`: {text} ({text.held_out_share.why}).", f"`{PROMPTS}`: {asked}."]


def warnings(folder: Path) -> list[str]:
    """What a person should know about the copied text."""
    size = sum(path.stat().st_size for path in (folder / "data").rglob("*") if path.is_file())
    if size <= LARGE:
        return []
    text = f"warning: the recipe holds {size >> 20} MB of text now, which git is not made for"
    return [f"{text}; data_config.corpus may also name a file outside, and the copy be deleted"]


def beginnings(text: Text) -> list[str]:
    """Where the model is asked to go on: starts of held-out lines, evenly spread, of characters that are trained on."""
    known = set(vocabulary.characters(text.splits["train"]))
    lines = [line.strip() for document in text.splits["held_out"] for line in document.text.splitlines()]
    short = [shortened(line) for line in lines if len(line) >= 10 and set(line) <= known]
    found = list(dict.fromkeys(short)) or [shortened(text.splits["train"][0].text.strip())]
    return [found[at * len(found) // ASKED] for at in range(ASKED)] if len(found) > ASKED else found


def shortened(line: str) -> str:
    """Whole words of the first characters of a line."""
    if len(line) <= BEGINNING:
        return line
    return line[:BEGINNING].rpartition(" ")[0] or line[:BEGINNING]


def write_prompts(folder: Path, prompts: Sequence[str]) -> None:
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    (folder / PROMPTS).write_text("".join(lines), encoding="utf-8")
