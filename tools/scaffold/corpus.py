"""A fork's plain text: copied, held out by its end or by whole files, and what its size makes of the config."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import Config
from common.config.layers import read_file
from common.data import build, vocabulary
from common.data.chat import ChatTokenizer
from common.data.rows import hold_out
from common.data.texts import Document, cut_in_two, read_texts
from common.errors import DataError
from common.hardware import round_up
from common.model import llama
from tools.edit_yaml import set_key
from tools.recipes import load_dataset
from tools.scaffold.rows import PROMPTS, Settings
from tools.scaffold.split import ASKED, share_of

CORPUS = "data/corpus"
ROW_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")
SHARE = 0.1  # of the characters, held out
PASSES = 40  # over the text; the published curve of the character model makes 44, and learns by heart in them
BEGINNING = 40  # characters of an evaluation prompt, at most
Documents = Mapping[str, Sequence[Document]]


def copy(data: Path, folder: Path) -> str:
    """Copy a text file, or the *.txt files of a folder, into the fork in `folder`; return its name there.

    Raises DataError for no such file, no UTF-8, binary data, or no text at all.
    """
    if not data.exists():
        raise DataError("no such file or folder", where=str(data))
    read_texts(str(data.resolve()), folder)
    name = f"{CORPUS}.txt" if data.is_file() else CORPUS
    for file in [data] if data.is_file() else sorted(data.rglob("*.txt")):
        target = folder / name / ("" if data.is_file() else file.relative_to(data))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return name


def settings(name: str, folder: Path) -> tuple[Settings, Documents]:
    """Return what the text sets on every board, and its documents as they are split: a tenth of it held out."""
    documents = read_texts(name, folder)
    sizes = {document.where: len(document.text) for document in documents}
    share = SHARE if len(documents) == 1 else share_of(sizes, SHARE * sum(sizes.values()))
    if len(documents) == 1:
        splits = cut_in_two(documents[0], share)
    else:
        held_out = hold_out(sizes, share)
        splits = {
            "train": [document for document in documents if document.where not in held_out],
            "held_out": [document for document in documents if document.where in held_out],
        }
    whole = f"the hash puts {len(splits['held_out'])} of the {len(documents)} texts below it"
    return {
        "data_config.corpus": (name, f"{sum(sizes.values()):,} characters"),
        "data_config.held_out_share": (share, "the end of the text" if len(documents) == 1 else whole),
        "eval_config.prompts": (PROMPTS, "beginnings of held-out lines"),
    }, splits


def fit_vocabulary(made: Path, config: Config, documents: Documents) -> Settings:
    """Make room in the preset for every character of the text, or return as many pieces as it gives where they are few.

    Which of the two depends on the tokenizer of `config`: characters, or byte-level BPE.
    """
    shape = config.model.architecture
    assert shape is not None, "random weights have an architecture"
    if config.data.tokenizer.type == "bpe":
        pieces = vocabulary.bpe_tokenizer(documents["train"], shape.vocab_size).get_vocab_size()
        few = pieces < (config.data.tokenizer.vocab_size or shape.vocab_size)
        return {"data_config.tokenizer.vocab_size": (pieces, "pieces that the text gives")} if few else {}
    needed = len(vocabulary.characters(documents["train"])) + 1
    if needed > shape.vocab_size:
        layer = made / f"presets/{config.model.preset}.yaml" if config.model.preset else made / "config.yaml"
        why = f"{needed} characters, and what makes a multiple of 32"
        text = set_key(layer.read_text(encoding="utf-8"), "model_config.architecture.vocab_size", round_up(needed), why)
        layer.write_text(text, encoding="utf-8")
        count = llama.parameters(read_file(layer).get("model_config.architecture"))
        layer.write_text(re.sub(r"\A# [\d,]+ parameters", f"# {count:,} parameters", text), encoding="utf-8")
    return {}


def schedule(made: Path, config: Config, home: Path) -> Settings:
    """Return fewer steps for a short text, and with them shorter intervals; nothing where the text is long.

    The tokens are made in `home`, as the fork's first run would. Raises DataError for what would end that run.
    """
    parts = build.read_splits(load_dataset(made)[0], config, made)
    folder = build.corpus_tokenizer(config, parts["train"], home)
    windows = len(build.build(config, parts, ChatTokenizer.load(folder), folder, home).train)
    asked, most = config.training.max_steps, math.ceil(PASSES * windows / config.training.batch_size)
    if asked is None or asked <= most:
        return {}
    intervals = {
        "training_config.scheduler.warmup_steps": config.training.scheduler.warmup_steps,
        "eval_config.every": config.eval.every,
        "checkpoint_config.every": config.checkpoint.every,
    }
    why = f"{PASSES} passes over {windows} windows of {config.data.max_length} tokens"
    found: Settings = {"training_config.max_steps": (most, why)}
    for key, steps in intervals.items():
        if steps:
            found[key] = (max(1, round(steps * most / asked)), f"it was {steps} of {asked}")
    return found


def write_prompts(folder: Path, documents: Documents) -> None:
    """Write where the model is asked to go on: starts of held-out lines, of characters that are trained on."""
    known = set(vocabulary.characters(documents["train"]))
    lines = [line.strip() for document in documents["held_out"] for line in document.text.splitlines()]
    starts = [shortened(line) for line in lines if len(line) >= 10 and set(line) <= known]
    found = list(dict.fromkeys(starts)) or [shortened(documents["train"][0].text.strip())]
    chosen = [found[at * len(found) // ASKED] for at in range(ASKED)] if len(found) > ASKED else found
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in chosen)
    (folder / PROMPTS).write_text(text, encoding="utf-8")


def shortened(line: str) -> str:
    """Return the whole words of the first characters of a line."""
    return line if len(line) <= BEGINNING else line[:BEGINNING].rpartition(" ")[0] or line[:BEGINNING]
