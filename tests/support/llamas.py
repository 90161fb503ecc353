"""Tiny random Llamas, one for each kind of tokenizer that a run may have: what GGUF files are written of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from common.data import vocabulary
from common.data.texts import Document
from tests.doubles.tiny_recipe import write_play
from tools.verify.tiny_base import CORPUS, write_tiny_base

TEXTS = [
    "A fox sleeps\n\n  under  12 trees. ",
    "What is 1234567, or  8 x 9?\tNobody's.",
    "café, naïve – “quoted” 東京 🦊 it's",
    "   three spaces, x  y",
    *CORPUS,
]
WIDER = 8.0  # times the tiny base's weights: its answers then hang on what they attend to


def louder(folder: Path) -> Path:
    """Make a tiny base's matrices larger, so that a defect of its attention shows in its answers; return it."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    scaled = {name: value if value.ndim == 1 else value * np.float32(WIDER) for name, value in weights.items()}
    save_file(scaled, path, metadata={"format": "pt"})
    return folder


def chat(folder: Path, tied: bool) -> Path:
    """Byte-level BPE with special tokens and a chat template, as of a base that is tuned."""
    return louder(write_tiny_base(folder, tied=tied))


def smollm(folder: Path, tied: bool) -> Path:
    """The same with SmolLM2's own pattern, in which every digit is a word: its merges of digits are never made."""
    write_tiny_base(folder, tied=tied)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, spec["pre_tokenizer"]]}
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for pair in (["Ġ", "1"], ["1", "2"]):
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    path.write_text(json.dumps(spec), encoding="utf-8")
    return louder(folder)


def bpe(folder: Path, tied: bool) -> Path:
    """Byte-level BPE made of a corpus, as of a run from random weights: no special token, no template, no end."""
    return with_own_vocabulary(folder, "bpe", tied)


def char(folder: Path, tied: bool) -> Path:
    """Characters made of a corpus, with more rows in the embedding than there are characters."""
    return with_own_vocabulary(folder, "char", tied)


def with_own_vocabulary(folder: Path, kind: str, tied: bool) -> Path:
    write_tiny_base(folder, vocab_size=320, tied=tied)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in config.items() if not key.endswith("token_id")}))
    text = write_play(folder / "play.txt").read_text(encoding="utf-8") + "".join(TEXTS)
    made = vocabulary.train(kind, 320, [Document("play", text)], folder.parent / f"{folder.name}-tokenizer")
    for file in made.iterdir():
        file.replace(folder / file.name)
    return louder(folder)


def with_bytes(folder: Path, tied: bool) -> Path:
    """Llama-2's layout, TinyLlama's: BPE over characters with a space before, and bytes for unknown characters.

    Its merges are all ways to make each token, in the order of the tokens, as transformers make them of
    sentencepiece's file.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    write_tiny_base(folder, vocab_size=640, tied=tied)
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=370, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    play = write_play(folder / "play.txt").read_text(encoding="utf-8")
    learned.train_from_iterator([line for line in play.splitlines() for _ in range(2)] + CORPUS * 4, trainer)
    by_id = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    tokens = [*by_id[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *by_id[3:]]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in by_id[3:]
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(by_id[:3])
    made.save(str(folder / "tokenizer.json"))
    return louder(folder)


KINDS: dict[str, Callable[[Path, bool], Path]] = {
    "chat": chat,
    "smollm": smollm,
    "bpe": bpe,
    "char": char,
    "with_bytes": with_bytes,
}
