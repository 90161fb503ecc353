"""Tokenizers made from a corpus: characters, or byte-level BPE. Written as Hugging Face folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.data.texts import Document
from common.errors import DataError
from common.files import made_whole, write_atomic, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The unknown character: Unicode's own sign for it, and one character, so that no text holds it by accident as a word.
UNKNOWN = "\ufffd"
CODE_POINTS = 0x110000  # of Unicode: a table of 4.3 MiB, which makes the ids of a whole text one look-up
# Characters that the BPE encoder takes at once: its threads share the chunks of a text, so a text has to have many.
CHUNK = 1 << 16
Ids = npt.NDArray[np.uint32]


def train(kind: str, vocab_size: int, documents: Sequence[Document], folder: Path) -> Path:
    """Write the tokenizer of `kind` (char or bpe) over `documents` to the Hugging Face folder `folder`; return it.

    `vocab_size` is the largest number of ids: BPE must reach it, characters must fit in it. Raises DataError.
    """
    tokenizer = char_tokenizer(documents) if kind == "char" else bpe_tokenizer(documents, vocab_size)
    found = tokenizer.get_vocab_size()
    if found > vocab_size:
        ids, other = ("a byte each", "char") if kind == "bpe" else ("characters, and one for unknown ones", "bpe")
        what = f"the corpus has {found} ids ({ids}), the vocabulary room for {vocab_size}"
        todo = f"choose a preset with a larger vocabulary, or data_config.tokenizer.type={other}"
        raise DataError(what, where="model_config.architecture.vocab_size", todo=todo)
    if kind == "bpe" and found < vocab_size:
        what = f"the corpus cannot fill a BPE vocabulary of {vocab_size}: it gives {found} ids"
        todo = f"set data_config.tokenizer.vocab_size={found} or less, or tokenizer.type=char; or use more text"
        raise DataError(what, where="data_config.tokenizer.vocab_size", todo=todo)
    with made_whole(folder) as made:
        write_atomic(made / "tokenizer.json", tokenizer.to_str(pretty=True))
        # Without the clean-up: it would take the space before punctuation away when ids are made text again.
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        # Left out, transformers 4 would give the model token_type_ids, which no Llama takes.
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        settings |= {"unk_token": UNKNOWN} if kind == "char" else {}
        write_json(made / "tokenizer_config.json", settings)
    return folder


def use_threads(num_proc: int | None) -> None:
    """Let the tokenizers library work with `num_proc` threads (None: one a core)."""
    # It reads the variable once, at its first parallel call in a process: so this is called before any.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if num_proc is not None:
        os.environ["RAYON_NUM_THREADS"] = str(num_proc)


# --- characters -----------------------------------------------------------------------------------------------------


def code_points(text: str) -> Ids:
    """Return the text as Unicode code points, uint32 [characters]."""
    # Four bytes a character, and on a little-endian machine those of a uint32: no loop over characters.
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def characters(documents: Sequence[Document]) -> list[str]:
    """Return the distinct characters of the documents, by code point; U+FFFD stands for the unknown and is none."""
    seen = np.zeros(CODE_POINTS, bool)
    for document in documents:
        seen[code_points(document.text)] = True
    seen[ord(UNKNOWN)] = False
    return [chr(code) for code in np.flatnonzero(seen)]


def char_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """Return a tokenizer with one id a character, the unknown one last."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {character: number for number, character in enumerate([*characters(documents), UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # [\s\S] and not a dot, which leaves line feeds out.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def char_table(tokenizer: Tokenizer) -> Ids:
    """Return the id of every code point by the character tokenizer, uint32 [CODE_POINTS]."""
    # Ids then come from one look-up over a whole text; `tokenizers` has the same map (a test holds the two together).
    vocab = tokenizer.get_vocab()
    table = np.full(CODE_POINTS, vocab[UNKNOWN], np.uint32)
    for character, number in vocab.items():
        table[ord(character)] = number
    return table


# --- byte-level BPE -------------------------------------------------------------------------------------------------


def bpe_tokenizer(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """Return byte-level BPE with GPT-2's word pattern: every byte has an id, so nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes have an id from the start, those too that no training text has.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((part for document in documents for part in chunks(document.text)), trainer)
    return tokenizer


def bpe_ids(tokenizer: Tokenizer, text: str) -> Ids:
    """Return the ids of a text by BPE, uint32 [tokens], encoded by the library's threads."""
    parts = tokenizer.encode_batch_fast(list(chunks(text)), add_special_tokens=False)
    return np.concatenate([np.array(part.ids, np.uint32) for part in parts] or [np.zeros(0, np.uint32)])


def chunks(text: str) -> Iterator[str]:
    """Yield the text in parts of about CHUNK characters that are encoded alone as they are within the whole."""
    # GPT-2's pattern leaves the last white-space character before a word to that word's side, so a part may begin with
    # a line feed that another character than white space follows, and nowhere else.
    start = 0
    for match in re.finditer(r"\n(?=\S)", text):
        if match.start() - start >= CHUNK:
            yield text[start : match.start()]
            start = match.start()
    if start < len(text):
        yield text[start:]


# --- both -----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Tokenizer:
    """Return the tokenizer that `train` wrote to `folder`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode(tokenizer: Tokenizer, kind: str, documents: Sequence[Document]) -> Ids:
    """Return the ids of all documents one after the other, uint32 [tokens]."""
    if kind == "char":
        table = char_table(tokenizer)
        parts = [table[code_points(document.text)] for document in documents]
    else:
        parts = [bpe_ids(tokenizer, document.text) for document in documents]
    return np.concatenate(parts or [np.zeros(0, np.uint32)])


def bytes_of_ids(tokenizer: Tokenizer, kind: str) -> npt.NDArray[np.int64]:
    """Return how many UTF-8 bytes of text each id stands for, int64 [ids]: what makes tokenizers comparable."""
    # A byte-level token has one character of its alphabet for each byte.
    vocab = tokenizer.get_vocab()
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    for token, number in vocab.items():
        sizes[number] = len(token.encode()) if kind == "char" else len(token)
    return sizes
