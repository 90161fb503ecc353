"""From a recipe's dataset builder to token files, built once and reused while nothing that shapes them has
changed.

A recipe's `dataset.py` has `splits(config, recipe_dir) -> {"train": rows, "held_out": rows}` and
`prompts(config, recipe_dir) -> [text]`. It may name the files it reads by `sources(config, recipe_dir) ->
[path]`; otherwise that is `data_config.source`. A builder depends on those files and on `data_config`, on
nothing else: that is what the key of the stored tokens covers.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common.data import tokens
from common.data.chat import ChatTokenizer
from common.data.corpora import Document
from common.data.rows import Row, control_rows
from common.data.tokens import Encoded, TokenDataset
from common.errors import DataError, RecipeError
from common.files import sha256_file

if TYPE_CHECKING:
    from common.config import Config
    from common.config.schema import Data

SPLITS = ("train", "held_out")
SHAPERS = ("rows.py", "chat.py", "tokens.py", "order.py", "build.py")
CUTS_SHOWN = 10


@dataclass(frozen=True)
class Cut:
    """A row that did not fit: its split, where it stands, and what was taken away."""

    split: str
    where: str
    what: str


@dataclass(frozen=True)
class BuildReport:
    """How the tokens came about: `action` is built, reused or rebuilt, with its reason; counts by split."""

    action: str
    reason: str
    folder: str
    length: int
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    supervised_share: float
    cut: Sequence[Cut]
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The report for a person, one line a fact."""
        rows = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.rows.items())
        size = f"{sum(self.tokens.values())} tokens, length {self.length}"
        found = [
            f"data {self.action} ({self.reason}): {rows} rows, {size}",
            *self.notes,
        ]
        if self.supervised_share < 1:
            found.append(f"supervised tokens: {self.supervised_share:.1%} of what is trained on")
        if self.cut:
            found.append(f"{len(self.cut)} rows cut to fit {self.length} tokens:")
            found += [f"  {cut.where} ({cut.split}): {cut.what}" for cut in self.cut[:CUTS_SHOWN]]
        if len(self.cut) > CUTS_SHOWN:
            found.append(f"  and {len(self.cut) - CUTS_SHOWN} more")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def build(config: Config, recipe_dir: Path, tokenizer: ChatTokenizer, home: Path) -> TokenDataset:
    """The recipe's token data set, with `.report`: the stored one if it verifies, else a new one in
    `home`/tokens.

    Raises DataError: for rows that cannot be used, a train split smaller than the batch, or tokens
    of which none are supervised (or all, unless `data_config.supervise_all` says so).
    """
    builder = Builder(config, recipe_dir)
    key = source_key(config, builder, tokenizer)
    folder = home / "tokens" / key[:16]
    dataset, action, reason = reopen(folder, key)
    if dataset is None:
        dataset = make(config, builder, tokenizer, folder, key)
    dataset.report = report_of(dataset, action, reason)
    refuse_too_small(len(dataset.train), config.training.batch_size, builder.where)
    return dataset


def reopen(folder: Path, key: str) -> tuple[TokenDataset | None, str, str]:
    """The stored data set of this key if it is whole, and what to say: (data set, action, reason)."""
    if not folder.exists():
        return None, "built", "no stored tokens for these sources"
    try:
        dataset = TokenDataset.open(folder)
    except DataError as error:
        return None, "rebuilt", f"the stored tokens did not verify: {error.what}"
    if dataset.source_key != key:
        return None, "rebuilt", "the stored tokens belong to other sources"
    return dataset, "reused", "sources unchanged"


def make(config: Config, builder: Builder, tokenizer: ChatTokenizer, folder: Path, key: str) -> TokenDataset:
    """Encode the recipe's rows and store them."""
    data = config.data
    splits = builder.splits()
    splits["train"] = control_rows(splits["train"], data.control)
    encoded = {name: encode(rows, tokenizer, data) for name, rows in splits.items()}
    share = supervised_share(encoded["train"])
    refuse_share(share, data.supervise_all, builder.where)
    cut = [
        asdict(Cut(name, row.where, tokens_of.cut))
        for name, rows in splits.items()
        for row, tokens_of in zip(rows, encoded[name], strict=True)
        if tokens_of.cut
    ]
    info = {
        "supervised_share": share,
        "cut": cut,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "rows": {name: [row.where for row in rows] for name, rows in splits.items()},
    }
    return tokens.write(folder, encoded, source_key=key, info=info, length=data.max_length)


def encode(rows: Sequence[Row], tokenizer: ChatTokenizer, data: Data) -> list[Encoded]:
    """Tokens and masks of rows, by a data config's options. Raises DataError naming the first bad row."""
    limit = None if data.max_length is None else data.max_length + 1  # n tokens make n-1 predictions
    return [
        tokenizer.encode_row(row, system=data.system_prompt, max_tokens=limit, supervise_all=data.supervise_all)
        for row in rows
    ]


def supervised_share(rows: Sequence[Encoded]) -> float:
    """Share of predicted tokens that count in the loss (the first token of a row is never predicted); 0 if
    none.
    """
    predicted = sum(len(row.ids) - 1 for row in rows)
    return sum(int(row.mask[1:].sum()) for row in rows) / predicted if predicted else 0.0


def refuse_share(share: float, supervise_all: bool, where: str) -> None:
    """Raises DataError when no token is supervised, or every one without being asked for."""
    if share == 0.0:
        raise DataError("no token is supervised: there is nothing to learn", where=where)
    if share == 1.0 and not supervise_all:
        raise DataError(
            "every token is supervised, prompts included",
            where=where,
            todo="check the chat template, or declare it with data_config.supervise_all: true",
        )


def refuse_too_small(rows: int, batch_size: int, where: str) -> None:
    """Raises DataError when the rows do not fill one batch."""
    if rows < batch_size:
        raise DataError(
            f"{rows} training rows do not fill one batch of {batch_size}",
            where=where,
            todo="add rows, or lower training_config.batch_size",
        )


def report_of(dataset: TokenDataset, action: str, reason: str) -> BuildReport:
    """The report of a data set, from what is stored with it."""
    return BuildReport(
        action=action,
        reason=reason,
        folder=str(dataset.folder),
        length=dataset.length,
        rows={name: len(split) for name, split in dataset.splits.items()},
        tokens={name: split.tokens for name, split in dataset.splits.items()},
        supervised_share=float(dataset.info["supervised_share"]),
        cut=[Cut(**cut) for cut in dataset.info["cut"]],
    )


def source_key(config: Config, builder: Builder, tokenizer: ChatTokenizer) -> str:
    """sha256 over everything that shapes the tokens: sources, tokenizer and template, builder, options, this
    code.

    No library version and no path is in it: a moved repository or a newer numpy rebuilds nothing.
    """
    options = config.data.model_dump(mode="json")
    source = str(options.pop("source", ""))
    parts = {
        "format": tokens.FORMAT,
        "sources": builder.source_digests(),
        "source": source if source.startswith("hub:") else Path(source).name,
        "tokenizer": tokenizer.sha256,
        "builder": builder.sha256,
        "code": {name: file_sha256(Path(__file__).parent / name) for name in SHAPERS},
        "options": options,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file. Raises DataError if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", where=str(path)) from error


def source_path(config: Config, recipe_dir: Path) -> Path | None:
    """The file of `data_config.source`, relative to the recipe; None for a data set of the Hub."""
    source = config.data.source
    return None if not source or source.startswith("hub:") else recipe_dir / source


class Builder:
    """A recipe's `dataset.py`, loaded from its path (recipes are folders of scripts, not packages)."""

    def __init__(self, config: Config, recipe_dir: Path) -> None:
        self.config = config
        self.recipe_dir = recipe_dir
        self.path = recipe_dir / "dataset.py"
        self.where = str(config.data.corpus or source_path(config, recipe_dir) or config.data.source)
        try:
            code = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"the recipe has no dataset builder: {error.strerror}", where=str(self.path)) from error
        self.sha256 = hashlib.sha256(code).hexdigest()
        # Run from its source, under a name of its own: every recipe has a dataset.py. It must be in sys.modules
        # while it runs, where dataclasses look their annotations up.
        self.module = ModuleType(f"dataset_{self.sha256[:12]}")
        self.module.__file__ = str(self.path)
        sys.modules[self.module.__name__] = self.module
        self._guard(lambda: exec(compile(code, str(self.path), "exec"), self.module.__dict__))

    def splits(self) -> dict[str, list[Row]]:
        """The recipe's rows by split, always with both names. Raises DataError when they are none."""
        found = self._call("splits")
        if not isinstance(found, Mapping) or not set(found) <= set(SPLITS):
            raise DataError(f"splits() must return a dict of {' and '.join(SPLITS)}", where=str(self.path))
        rows = {name: list(found.get(name, ())) for name in SPLITS}
        strangers = [row for name in SPLITS for row in rows[name] if not isinstance(row, Row)]
        if strangers:
            raise DataError(f"splits() holds a {type(strangers[0]).__name__}, not a Row", where=str(self.path))
        if not rows["train"]:
            raise DataError("no training row", where=self.where, todo="add rows or lower data_config.held_out_share")
        return rows

    def documents(self) -> dict[str, list[Document]]:
        """The recipe's texts by split, always with both names; see `common.data.build_corpus`."""
        found = self._call("documents")
        if not isinstance(found, Mapping) or not set(found) <= set(SPLITS):
            raise DataError(f"documents() must return a dict of {' and '.join(SPLITS)}", where=str(self.path))
        return {name: list(found.get(name, ())) for name in SPLITS}

    def prompts(self) -> list[str]:
        """The recipe's evaluation prompts."""
        return list(self._call("prompts"))

    def source_digests(self) -> list[str]:
        """sha256 of every file the builder reads."""
        if hasattr(self.module, "sources"):
            paths = [Path(path) for path in self._call("sources")]
        else:
            own = source_path(self.config, self.recipe_dir)
            paths = [] if own is None else [own]
        return [file_sha256(path) for path in paths]

    def _call(self, name: str) -> Any:
        function = getattr(self.module, name, None)
        if not callable(function):
            raise DataError(f"no function {name}(config, recipe_dir)", where=str(self.path))
        return self._guard(lambda: function(self.config, self.recipe_dir))

    def _guard(self, call: Any) -> Any:
        """Run the recipe's code; a fault in it is the recipe's, named with its line."""
        try:
            return call()
        except RecipeError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(self.path)), None)
            line = getattr(error, "lineno", None) or line
            raise DataError(f"{type(error).__name__}: {error}", where=f"{self.path}:{line or 1}") from error


def prompts(config: Config, recipe_dir: Path) -> list[str]:
    """The recipe's evaluation prompts, from its `dataset.py`."""
    return Builder(config, recipe_dir).prompts()


def rows(config: Config, recipe_dir: Path) -> dict[str, list[Row]]:
    """The recipe's rows by split, from its `dataset.py`."""
    return Builder(config, recipe_dir).splits()
