"""A tokenizer.json as GGUF's vocabulary: three ways to say it, each for tokenizers that llama.cpp then reads alike.

Which one a tokenizer is, is read off its parts, never off its name: llama.cpp cannot run a tokenizer.json, it has
tokenizers of its own, and a file that names the wrong one is read without an error, into other tokens.

byte-level BPE      model "gpt2": tokens and merges, and the name of llama.cpp's pattern of words
BPE with bytes      model "llama": it knows scores, no merges, so a token's score says when its merge comes
characters          model "llama" without anything to merge
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from common.data.chat import ChatTokenizer
from common.data.vocabulary import UNKNOWN
from common.errors import UsageError

SPACE = "\u2581"  # sentencepiece's sign for a space, which llama.cpp's "llama" puts in place of every one
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# llama.cpp's names (tokenizer.ggml.pre) of the patterns of words that byte-level tokenizers may have.
WORDS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("gpt-2", BYTE_LEVEL),
    ("smollm", {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}),
)
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
# A byte that no UTF-8 has, in the letters that byte-level BPE writes bytes with: what such a model never saw.
NO_BYTE = "\u00ff"
TO_DO = "use a server that takes Hugging Face folders: recipe serve RUN"


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer; ids are the places in `tokens`. `end` ends answers, if need be for want of one.

    `words` is llama.cpp's name of a pattern, `prefix` whether a space is put before a text and after special tokens.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    end: int
    ends: Sequence[int] = ()  # those that the tokenizer itself has, the first of which is `end`
    begin: int | None = None
    unknown: int | None = None
    pad: int | None = None
    words: str = "default"
    merges: Sequence[str] = ()
    scores: Sequence[float] = field(default=())
    prefix: bool = False

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the keys tokenizer.ggml.* to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.words)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.model == "llama":
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.prefix)
        else:
            writer.add_token_merges(list(self.merges))
        # Where a file names none, llama.cpp takes 1 and 2, or 11 twice, whatever these are: an answer would end at a
        # comma. So both are always named.
        writer.add_bos_token_id(self.end if self.begin is None else self.begin)
        writer.add_eos_token_id(self.end)
        if len(self.ends) > 1:
            writer.add_eot_token_id(self.ends[1])
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        # Training and `recipe generate` put nothing before a text that its template does not write itself.
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)


def vocabulary_of(folder: Path) -> Vocabulary:
    """Return what GGUF is to hold of a Hugging Face folder's tokenizer. Raises UsageError for one it cannot say."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = ChatTokenizer.load(folder)
    model = spec["model"]
    for token in spec["added_tokens"]:
        if odd := [name for name in ("lstrip", "rstrip", "single_word") if token[name]]:
            raise refusal(f"the token {token['content']!r} is {odd[0]}, which GGUF cannot say", path)
    if len(tokenizer.eos_ids) > 2:
        raise refusal(f"{len(tokenizer.eos_ids)} tokens end an answer, GGUF names two at most", path)
    if model["type"] == "WordLevel":
        return characters(spec, tokenizer, path)
    if model["type"] != "BPE":
        raise refusal(f"a {model['type']} tokenizer, of which llama.cpp has none that reads it alike", path)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise refusal(f"its BPE has {name}={model[name]!r}", path)
    return with_bytes(spec, tokenizer, path) if model["byte_fallback"] else byte_level(spec, tokenizer, path)


def refusal(what: str, path: Path) -> UsageError:
    return UsageError(f"no GGUF can be written of this tokenizer: {what}", where=str(path), todo=TO_DO)


def byte_level(spec: Mapping[str, Any], tokenizer: ChatTokenizer, path: Path) -> Vocabulary:
    """Return byte-level BPE. Raises UsageError for a pattern of words that llama.cpp has no name for."""
    words = [name for name, known in WORDS if holds(spec["pre_tokenizer"], known)]
    if not words or spec["normalizer"]:
        raise refusal("its pattern of words is none that is known here by llama.cpp's name", path)
    tokens, types = tokens_of(spec, tokenizer)
    return Vocabulary(
        "gpt2",
        tokens,
        types,
        words=words[0],
        merges=[" ".join(pair) for pair in pairs(spec)],
        **named(tokenizer, {token: id for id, token in enumerate(tokens)}, NO_BYTE, path),
    )


def with_bytes(spec: Mapping[str, Any], tokenizer: ChatTokenizer, path: Path) -> Vocabulary:
    """Return Llama-2's layout: BPE over characters, spaces as U+2581, and a token for each byte of any other character.

    llama.cpp merges whatever makes the token with the highest score; so a score is minus the rank of the merge that
    makes the token, and tokens that no merge makes are never asked for theirs.
    """
    normalizers = (spec["normalizer"] or {}).get("normalizers", [spec["normalizer"]])
    prefix = len(normalizers) == 2 and holds(normalizers[0], PREPEND)
    if spec["pre_tokenizer"] or not holds(normalizers[-1], TO_SPACE) or len(normalizers) > 1 + prefix:
        raise refusal("it does not put U+2581 for spaces by `normalizer` alone, as Llama-2's does", path)
    tokens, types = tokens_of(spec, tokenizer)
    ids = {token: id for id, token in enumerate(tokens)}
    for byte in range(256):
        if (id := ids.get(f"<0x{byte:02X}>")) is None:
            raise refusal(f"it has no token for the byte 0x{byte:02X}", path)
        types[id] = TokenType.BYTE
    unknown = ids[spec["model"]["unk_token"]]
    types[unknown] = TokenType.UNKNOWN
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs(spec), 1):
        ranks.setdefault(left + right, rank)  # a token that several merges make: llama.cpp takes whichever comes
    return Vocabulary(
        "llama",
        tokens,
        types,
        scores=[-float(ranks.get(token, 0)) for token in tokens],
        prefix=prefix,
        **{**named(tokenizer, ids, tokens[unknown], path), "unknown": unknown},
    )


def characters(spec: Mapping[str, Any], tokenizer: ChatTokenizer, path: Path) -> Vocabulary:
    """Return an id a character: "llama" without merges. A character that it does not know is an error in llama.cpp."""
    vocab = spec["model"]["vocab"]
    whole = holds(spec["pre_tokenizer"], EVERY_CHARACTER) and not spec["normalizer"]
    if not whole or SPACE in vocab or any(len(token) != 1 for token in vocab) or UNKNOWN not in vocab:
        raise refusal("it is a list of words; of such, those of single characters can be written", path)
    tokens, types = tokens_of(spec, tokenizer)
    tokens = [SPACE if token == " " else token for token in tokens]
    types[vocab[UNKNOWN]] = TokenType.UNKNOWN
    ids = {token: id for id, token in enumerate(tokens)}
    return Vocabulary(
        "llama",
        tokens,
        types,
        scores=[0.0] * len(tokens),
        **{**named(tokenizer, ids, UNKNOWN, path), "unknown": vocab[UNKNOWN]},
    )


def named(tokenizer: ChatTokenizer, ids: Mapping[str, int], instead: str, path: Path) -> dict[str, Any]:
    """Return the ids of the named tokens; where no token ends an answer, `instead` stands for the end."""
    if not tokenizer.eos_ids and instead not in ids:
        raise refusal("it has no token that ends an answer, and none that could stand for it", path)
    known = {name: ids[token] for name, token in tokenizer.tokens.items() if token in ids}
    return {
        "begin": known.get("bos_token"),
        "unknown": known.get("unk_token"),
        "pad": known.get("pad_token"),
        "end": next(iter(tokenizer.eos_ids), None) if tokenizer.eos_ids else ids[instead],
        "ends": tokenizer.eos_ids,
    }


def tokens_of(spec: Mapping[str, Any], tokenizer: ChatTokenizer) -> tuple[list[str], list[TokenType]]:
    """Return every token by id, and its type; an id without a token is unused."""
    tokens = [f"[unused {id}]" for id in range(tokenizer.vocab_size)]
    types = [TokenType.UNUSED] * len(tokens)
    special = {token["content"] for token in spec["added_tokens"] if token["special"]} | {*tokenizer.tokens.values()}
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token, id in {**spec["model"]["vocab"], **added}.items():
        tokens[id], types[id] = token, TokenType.USER_DEFINED if token in added else TokenType.NORMAL
        if token in special:
            types[id] = TokenType.CONTROL
    return tokens, types


def pairs(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges in their order; older files have each as one text, newer ones as a list of two."""
    found = (merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    return [(left, right) for left, right in found]


def holds(found: Any, wanted: Any) -> bool:
    """Return whether part of a tokenizer.json says all that `wanted` says; it may say more, such as defaults."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(holds(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(holds, found, wanted))
    return bool(found == wanted)
