"""From what a recipe's `splits()` gives to token files, reused while nothing that shapes them changes.

`splits(config, recipe_dir)` returns {"train": [...], "held_out": [...]}: rows of a conversation, read with the base's
tokenizer; or, for `data_config.corpus`, texts, from whose training part a tokenizer is made. A split of texts is one
stream of tokens, cut into windows of `data_config.max_length` predictions; every token but the first of a stream is
predicted once an epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import recipe
from common.data import tokens, vocabulary
from common.data.chat import ChatTokenizer, given
from common.data.rows import Row, control_rows
from common.data.texts import Document, text_sha256
from common.data.tokens import Arrays, Encoded, TokenDataset
from common.data.vocabulary import Ids
from common.errors import DataError
from common.files import clear, sha256_file

if TYPE_CHECKING:
    from common.config import Config
    from common.config.schema import Data
    from common.recipe import Splits

SPLITS = ("train", "held_out")
# Files whose code shapes tokens out of rows and texts: an edit of one, be it of a comment, makes every token set anew.
# Once too often is only time; once too seldom would train on what an older rule made.
SHAPERS = ("build.py", "chat.py", "tokens.py", "vocabulary.py")
CUTS_SHOWN = 10  # of the screen; dataset.json has all
UNKNOWN_ALLOWED = 1e-3  # share of held-out characters; above it bits per byte would leave out too much text

Parts = Mapping[str, Sequence[Any]]  # rows, or texts, by split
# Yields what ChatTokenizer.encode_rows does of the rows of a split, by its other arguments; and gets the split's name.
Encode = Callable[[ChatTokenizer, Sequence[Row], tuple[Any, ...], str], Iterable["Encoded | DataError"]]


@dataclass(frozen=True)
class BuildReport:
    """How the tokens came about: `action` is built, reused or rebuilt, with its reason; counts by split.

    `cut` lists the rows that did not fit: their split, where they stand, and what was taken away.
    """

    action: str
    reason: str
    folder: str
    length: int
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    supervised_share: float
    cut: Sequence[Mapping[str, str]]
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Return the report for a person, one line a fact."""
        rows = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.rows.items())
        size = f"{sum(self.tokens.values())} tokens, length {self.length}"
        found = [f"data {self.action} ({self.reason}): {rows} rows, {size}", *self.notes]
        if self.supervised_share < 1:
            found.append(f"supervised tokens: {self.supervised_share:.1%} of what is trained on")
        if self.cut:
            found.append(f"{len(self.cut)} rows cut to fit {self.length} tokens:")
            found += [f"  {cut['where']} ({cut['split']}): {cut['what']}" for cut in self.cut[:CUTS_SHOWN]]
        if len(self.cut) > CUTS_SHOWN:
            found.append(f"  and {len(self.cut) - CUTS_SHOWN} more")
        return found


def read_splits(splits: Splits, config: Config, recipe_dir: Path) -> dict[str, list[Any]]:
    """Call a recipe's `splits`; return the rows, or the texts of a corpus, always under both names.

    Raises DataError for a fault in the recipe's code, for what is neither, and where there is nothing to train on.
    """
    found = recipe.call(splits, config, recipe_dir)
    where = str(recipe_dir / "dataset.py")
    if not isinstance(found, Mapping) or not set(found) <= set(SPLITS):
        raise DataError(f"splits() must return a dict of {' and '.join(SPLITS)}", where=where)
    parts = {name: list(found.get(name, ())) for name in SPLITS}
    kind = Document if config.data.corpus else Row
    if strangers := [part for name in SPLITS for part in parts[name] if not isinstance(part, kind)]:
        raise DataError(f"splits() holds a {type(strangers[0]).__name__}, not a {kind.__name__}", where=where)
    if not parts["train"] and not config.data.corpus:
        todo = "add rows or lower data_config.held_out_share"
        raise DataError("no training row", where=str(config.data.source), todo=todo)
    return parts


def build(
    config: Config, parts: Parts, tokenizer: ChatTokenizer, base: Path, home: Path, encode: Encode | None = None
) -> TokenDataset:
    """Return the token data set of a recipe's rows or texts: the stored one if it verifies, else a new one.

    It is stored below `home`/tokens; its `.report` says how it came about. Raises DataError for rows that cannot be
    used, and for too few of them to fill an optimizer step.
    """
    data = config.data
    # Before the key is taken, so that a control has token files of its own.
    parts = {**parts, "train": parts["train"] if data.corpus else control_rows(parts["train"], data.control)}
    key = source_key(data, parts, tokenizer)
    folder = home / "tokens" / key[:16]
    dataset, action, reason = reopen(folder)
    if dataset is None:
        (spill := folder.parent).mkdir(parents=True, exist_ok=True)  # a container may write there, not beside it
        splits, info = of_texts(data, parts, base) if data.corpus else of_rows(data, parts, tokenizer, encode, spill)
        dataset = tokens.write(folder, splits, source_key=key, info=info, length=data.max_length)
    dataset.report = report_of(dataset, action, reason)
    if len(dataset.train) < config.training.batch_size:
        what = f"{len(dataset.train)} training rows do not fill one batch of {config.training.batch_size}"
        todo = "add rows, or lower training_config.batch_size"
        raise DataError(what, where=str(data.corpus or data.source), todo=todo)
    return dataset


def reopen(folder: Path) -> tuple[TokenDataset | None, str, str]:
    """Return the stored data set if it is whole, else delete it; and what to say: (data set, action, reason)."""
    if not folder.exists():
        return None, "built", "no stored tokens for these rows"
    try:
        dataset = TokenDataset.open(folder)
    except DataError as error:
        clear(folder)
        return None, "rebuilt", f"the stored tokens did not verify: {error.what}"
    return dataset, "reused", "nothing changed"


def source_key(data: Data, parts: Parts, tokenizer: ChatTokenizer) -> str:
    """Return the sha256 over all that shapes the tokens: rows or texts, tokenizer and template, options, this code.

    No library version and no path is in it: a moved repository or a newer numpy builds nothing anew.
    """
    facts = {
        "format": tokens.FORMAT,
        "parts": {name: text_sha256(part) if data.corpus else rows_sha256(part) for name, part in parts.items()},
        "tokenizer": tokenizer.sha256,
        "options": [data.max_length, data.system_prompt, data.supervise_all],
        "code": {name: sha256_file(Path(__file__).with_name(name)) for name in SHAPERS},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def rows_sha256(rows: Sequence[Row]) -> str:
    """Return the sha256 over what rows say and the file names and lines they stand at, in order."""
    digest = hashlib.sha256()
    for row in rows:
        place = f"{row.where.rpartition('/')[2]}\n{row.roles}\n{len(row.words)}\n{row.fields or ''}{row.tools or ''}\n"
        digest.update(place.encode() + row.words)
    return digest.hexdigest()


def report_of(dataset: TokenDataset, action: str, reason: str) -> BuildReport:
    """Return the report of a data set, from what is stored with it."""
    info, notes = dataset.info, []
    if "corpus" in info:
        sizes = [f"{name.replace('_', ' ')} {facts['characters']:,}" for name, facts in info["corpus"].items()]
        count = len(info["corpus"]["held_out"]["documents"])
        notes = [
            f"characters: {', '.join(sizes)} in {count} held-out documents",
            f"vocabulary of {info['vocab_size']} ids; training text sha256 {info['corpus']['train']['sha256']}",
        ]
        if info["unknown"]:
            refused = "; bits per byte is not given" if info["unknown"] > UNKNOWN_ALLOWED else ""
            notes.append(f"warning: {info['unknown']:.3%} of the held-out characters are in no training text{refused}")
    rows = {name: len(split) for name, split in dataset.splits.items()}
    ids = {name: split.tokens for name, split in dataset.splits.items()}
    share = float(info["supervised_share"])
    return BuildReport(action, reason, str(dataset.folder), dataset.length, rows, ids, share, info["cut"], notes)


# --- rows ---------------------------------------------------------------------------------------------------------


def of_rows(data: Data, parts: Parts, tokenizer: ChatTokenizer, encode: Encode | None, spill: Path) -> tuple[Any, Any]:
    """Return each split's arrays, in files in `spill`, and what is stored with them. Raises DataError for a bad row."""
    cut: list[dict[str, str]] = []
    limit = None if data.max_length is None else data.max_length + 1  # n tokens make n-1 predictions
    options = (data.system_prompt, limit, data.supervise_all)

    def noted(name: str) -> Iterator[Encoded]:
        rows = parts[name]
        found = encode(tokenizer, rows, options, name) if encode else tokenizer.encode_rows(rows, *options)
        # By number: no row is looked at, which may be in memory that is shared with other processes.
        for at, encoded in zip(range(len(rows)), map(given, found), strict=True):
            if encoded.cut:
                cut.append({"split": name, "where": rows[at].where, "what": encoded.cut})
            yield encoded

    splits = {name: tokens.pack(noted(name), spill) for name in parts}
    info = {
        "supervised_share": supervised_share(splits["train"]),
        "cut": cut,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "places": {name: (row.where for row in rows) for name, rows in parts.items()},
    }
    return splits, info


def supervised_share(rows: Arrays) -> float:
    """Return the share of predicted tokens that count in the loss; the first token of a row is never predicted."""
    predicted = len(rows.ids) - len(rows.starts)
    return int(rows.mask.sum() - rows.mask[rows.starts].sum()) / predicted if predicted else 0.0


# --- texts --------------------------------------------------------------------------------------------------------


def corpus_tokenizer(config: Config, texts: Sequence[Document], home: Path) -> Path:
    """Return the folder below `home` of the tokenizer of these training texts, which is made when it is not there.

    Raises DataError for a tokenizer that does not fit the model's vocabulary.
    """
    options, architecture = config.data.tokenizer, config.model.architecture
    assert architecture is not None, "a corpus comes with init: random, which has an architecture"
    vocabulary.use_threads(config.data.num_proc)
    size = options.vocab_size or architecture.vocab_size
    facts = json.dumps([options.type, size, text_sha256(texts), sha256_file(Path(vocabulary.__file__))])
    folder = home / "tokenizers" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    return folder if folder.is_dir() else vocabulary.train(options.type, size, texts, folder)


def of_texts(data: Data, parts: Mapping[str, Sequence[Document]], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Encode texts by the tokenizer in `folder`; return the arrays of each split, and what is stored beside them."""
    kind, length = data.tokenizer.type, data.max_length
    assert length is not None, "a corpus has a context"
    tokenizer = vocabulary.load(folder)
    ids = {name: vocabulary.encode(tokenizer, kind, part) for name, part in parts.items()}
    if len(ids["train"]) <= length:
        what = f"{len(ids['train'])} tokens to train on, {length + 1} are needed"
        todo = "use a larger corpus, or a smaller data_config.max_length"
        raise DataError(f"the corpus is shorter than one context: {what}", where=str(data.corpus), todo=todo)
    unknown, sizes = tokenizer.token_to_id(vocabulary.UNKNOWN), vocabulary.bytes_of_ids(tokenizer, kind)
    splits = {name: windows(part, length, unknown) for name, part in ids.items()}
    held_out = splits["held_out"]
    # A unigram model: how often each id comes in the training text, one added to each count (Laplace).
    counts = np.bincount(ids["train"], minlength=len(sizes)) + 1.0
    info = {
        "supervised_share": 1.0,
        "cut": [],
        "places": {name: map(f"{name}, token {{}}".format, part.starts) for name, part in splits.items()},
        "vocab_size": len(sizes),
        "corpus": {
            name: {
                "sha256": text_sha256(part),
                "documents": [document.where for document in part],
                "characters": sum(len(document.text) for document in part),
            }
            for name, part in parts.items()
        },
        "unknown": float((ids["held_out"] == unknown).mean()) if unknown is not None and len(ids["held_out"]) else 0.0,
        "held_out_bytes": supervised_sums(held_out, sizes),
        "unigram_nll": supervised_sums(held_out, -np.log(counts / counts.sum())),
    }
    return splits, info


def windows(ids: Ids, length: int, unknown: int | None) -> Arrays:
    """Return a stream of tokens as rows of up to `length` predictions; a row's last token is the next one's first.

    The unknown character is never supervised: no training text has it, so the model cannot know it.
    """
    # A stream of n tokens makes n - 1 predictions: one token alone makes no row.
    starts = np.arange(0, max(len(ids) - 1, 0), length, dtype=np.int64)
    mask = np.ones(len(ids), np.uint8) if unknown is None else (ids != unknown).astype(np.uint8)
    return Arrays(ids, mask, starts, np.minimum(starts + length + 1, len(ids)))


def supervised_sums(arrays: Arrays, values: np.ndarray[Any, Any]) -> list[float]:
    """Return, for every row, the sum of `values` [ids] over its supervised labels."""
    # [N + 1] sums from the stream's start: a row's is a difference of two, whatever its length. A row's first token is
    # no label, so its sum begins one later.
    per_token = np.concatenate([[0], np.cumsum(values[arrays.ids] * arrays.mask)])
    return [float(x) for x in per_token[arrays.ends] - per_token[arrays.starts + 1]]
