"""From a recipe's documents to a tokenizer of their own and token files, each made once.

The recipe's `dataset.py` has `documents(config, recipe_dir) -> {"train": [Document], "held_out": [Document]}` in place
of `splits`. The tokenizer is trained on the training part alone. A split is one stream of tokens, cut into windows of
`data_config.max_length` predictions; every token but the first of a stream is predicted once an epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data import build, tokens, vocabulary
from common.data.build import Builder, BuildReport, file_sha256, refuse_too_small, reopen
from common.data.chat import ChatTokenizer
from common.data.corpora import Document, text_sha256
from common.data.tokens import Arrays, TokenDataset
from common.errors import DataError

if TYPE_CHECKING:
    from common.config import Config

SHAPERS = ("corpora.py", "vocabulary.py", "tokens.py", "order.py", "build_corpus.py")
UNKNOWN_ALLOWED = 1e-3  # share of held-out characters; above it bits per byte would leave out too much text
Documents = Mapping[str, Sequence[Document]]
Ids = vocabulary.Ids


def build_corpus(config: Config, recipe_dir: Path, home: Path) -> tuple[Path, TokenDataset]:
    """The recipe's tokenizer folder and token data set, with `.report`: the stored ones, or new ones in `home`.

    Raises DataError for a corpus that cannot fill one window or one batch, or a tokenizer that does not fit
    the model's vocabulary.
    """
    vocabulary.use_threads(config.data.num_proc)
    builder = Builder(config, recipe_dir)
    documents = builder.documents()
    refuse_too_short(sum(len(part.text.encode()) for part in documents["train"]), "bytes", config)
    folder = tokenizer_folder(config, documents["train"], home)
    tokenizer = ChatTokenizer.load(folder)
    key = source_key(config, builder, documents, tokenizer)
    stored = home / "tokens" / key[:16]
    dataset, action, reason = reopen(stored, key)
    if dataset is None:
        dataset = make(config, documents, folder, stored, key)
    dataset.report = report_of(dataset, action, reason)
    refuse_too_small(len(dataset.train), config.training.batch_size, builder.where)
    return folder, dataset


def tokenizer_folder(config: Config, documents: Sequence[Document], home: Path) -> Path:
    """The tokenizer of these training documents, made when it is not there."""
    options, room = config.data.tokenizer, room_of(config)
    size = min(options.vocab_size or room, room) if options.type == "bpe" else room
    if options.vocab_size and options.vocab_size > room:
        raise DataError(
            f"a tokenizer of {options.vocab_size} ids does not fit the model's vocabulary of {room}",
            where="data_config.tokenizer.vocab_size",
            todo="lower it, or choose a preset with a larger vocabulary",
        )
    code = file_sha256(Path(vocabulary.__file__))
    facts = json.dumps([options.type, size, text_sha256(documents), code])
    folder = home / "tokenizers" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    return folder if folder.is_dir() else vocabulary.train(options.type, size, documents, folder)


def room_of(config: Config) -> int:
    architecture = config.model.architecture
    assert architecture is not None, "a corpus comes with init: random, which has an architecture"
    return architecture.vocab_size


def source_key(config: Config, builder: Builder, documents: Documents, tokenizer: ChatTokenizer) -> str:
    """sha256 over everything that shapes the tokens; no library version, no path and no thread count is in it."""
    folder = Path(__file__).parent
    parts = {
        "format": tokens.FORMAT,
        "documents": {name: text_sha256(part) for name, part in documents.items()},
        "tokenizer": tokenizer.sha256,
        "builder": builder.sha256,
        "code": {name: file_sha256(folder / name) for name in SHAPERS},
        "length": config.data.max_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make(config: Config, documents: Documents, tokenizer: Path, folder: Path, key: str) -> TokenDataset:
    """Encode both splits and store them."""
    kind, length = config.data.tokenizer.type, config.data.max_length
    assert length is not None
    ids = {name: vocabulary.encode(tokenizer, kind, part) for name, part in documents.items()}
    refuse_too_short(len(ids["train"]), "tokens", config)
    unknown = vocabulary.unknown_id(tokenizer)
    splits = {name: windows(part, length, unknown) for name, part in ids.items()}
    sizes = vocabulary.bytes_of_ids(tokenizer, kind)
    info = {
        "supervised_share": 1.0,
        "cut": [],
        "rows": {name: window_names(splits[name], name) for name in splits},
        "vocab_size": len(sizes),
        "corpus": facts_of(documents),
        "unknown": unknown_share(ids["held_out"], unknown),
        "held_out_bytes": supervised_sums(splits["held_out"], sizes),
        "unigram_nll": unigram_nll(ids["train"], splits["held_out"], len(sizes)),
    }
    return tokens.write_arrays(folder, splits, source_key=key, info=info, length=length)


def refuse_too_short(size: int, unit: str, config: Config) -> None:
    """Raise DataError where the training text has no more tokens (or bytes: a token is one at least) than a context."""
    needed = (config.data.max_length or 0) + 1
    if size < needed:
        raise DataError(
            f"the corpus is shorter than one context: {size} {unit} to train on, {needed} tokens are needed",
            where=str(config.data.corpus),
            todo="use a larger corpus, or a smaller data_config.max_length",
        )


def windows(ids: Ids, length: int, unknown: int | None) -> Arrays:
    """A stream of tokens as rows of up to `length` predictions; the last token of a row is the next row's first.

    The unknown character is never supervised: no training text has it, so the model cannot know it.
    """
    starts = np.arange(0, max(len(ids) - 1, 0), length, dtype=np.int64)
    mask = np.ones(len(ids), np.uint8) if unknown is None else (ids != unknown).astype(np.uint8)
    return Arrays(ids, mask, starts, np.minimum(starts + length + 1, len(ids)))


def window_names(arrays: Arrays, split: str) -> list[str]:
    return [f"{split}, token {start}" for start in arrays.starts.tolist()]


def facts_of(documents: Documents) -> dict[str, Any]:
    """Names, sizes and hashes of a corpus, for the manifest and the screen."""
    return {
        name: {
            "sha256": text_sha256(part),
            "documents": [document.where for document in part],
            "characters": sum(len(document.text) for document in part),
        }
        for name, part in documents.items()
    }


def unknown_share(ids: Ids, unknown: int | None) -> float:
    return 0.0 if unknown is None or not len(ids) else float((ids == unknown).mean())


def supervised_sums(arrays: Arrays, values: np.ndarray[Any, Any]) -> list[float]:
    """For every row, the sum of `values` [ids] over its supervised labels."""
    per_token = np.concatenate([[0], np.cumsum(values[arrays.ids] * arrays.mask)])
    return [float(x) for x in per_token[arrays.ends] - per_token[arrays.starts + 1]]


def unigram_nll(train: Ids, held_out: Arrays, vocab_size: int) -> list[float]:
    """For every held-out row, the nats of its labels under a unigram model.

    It knows how often each token comes in the training text, one added to each count (Laplace), and nothing of what
    came before.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return supervised_sums(held_out, -np.log(counts / counts.sum()))


def report_of(dataset: TokenDataset, action: str, reason: str) -> BuildReport:
    """The report of a data set, from what is stored with it."""
    info = dataset.info
    parts = ", ".join(f"{name.replace('_', ' ')} {facts['characters']:,}" for name, facts in info["corpus"].items())
    notes = [f"characters: {parts} in {len(info['corpus']['held_out']['documents'])} held-out documents"]
    notes.append(f"vocabulary of {info['vocab_size']} ids; training text sha256 {info['corpus']['train']['sha256']}")
    if info["unknown"]:
        refused = "; bits per byte is not given" if info["unknown"] > UNKNOWN_ALLOWED else ""
        notes.append(f"warning: {info['unknown']:.3%} of the held-out characters are in no training text{refused}")
    return replace(build.report_of(dataset, action, reason), notes=notes)
