"""The export's held-out loss by plain transformers: several rows at once, what they begin with once, the same sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="an export is checked by transformers on torch")

import torch

from common.data import tokens
from common.data.tokens import Encoded, TokenSplit
from tools.export.check import load_plain, plain_nll
from tools.verify.tiny_base import write_tiny_base

BEGIN, LENGTHS = [7, 8, 9, 10, 11, 12], (3, 9, 4, 14, 2, 7)  # six rows: more than go through at once


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = write_tiny_base(tmp_path_factory.mktemp("plain") / "tiny", hidden=64, layers=2, heads=4, kv_heads=2)
    return load_plain(folder)


def rows(begin: list[int], supervised_from: int) -> list[Encoded]:
    rng = np.random.default_rng(5)
    texts = [[*begin, *rng.integers(20, 300, length)] for length in LENGTHS]
    masks = [[*[0] * supervised_from, *[1] * (len(text) - supervised_from)] for text in texts]
    masks[3][-2] = 0  # a gap, as a turn that is not trained on
    return [
        Encoded(np.array(text, np.uint32), np.array(mask, np.uint8)) for text, mask in zip(texts, masks, strict=True)
    ]


CASES = {
    "a common beginning": (rows(BEGIN, 8), 6),
    "supervised within it": (rows(BEGIN, 3), 2),
    "supervised from its last token": (rows(BEGIN, 6), 5),
    "supervised from the first token": (rows(BEGIN, 0), 0),
    "nothing in common": (rows([], 1), 0),
}


@pytest.mark.parametrize(("given", "once"), CASES.values(), ids=CASES)
def test_the_sums_are_those_of_each_row_alone(model, given, once):
    asked: list[tuple[int, ...]] = []
    watch = model.register_forward_pre_hook(
        lambda _model, _words, named: asked.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    found = plain_nll(model, TokenSplit(tokens.pack(given), 32), range(len(given)))
    watch.remove()
    for row, nll, count in zip(given, found.nll, found.tokens, strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        assert count == row.mask[1:].sum()
        assert nll == pytest.approx(float((nats * torch.from_numpy(row.mask[1:])).sum()), abs=1e-4)
    assert len(asked) == (3 if once else 2)
    assert not once or asked[0] == (1, once)


def test_long_rows_over_a_large_vocabulary_go_one_by_one(model, monkeypatch):
    """Four of 2,048 tokens over 128,256 words would take 4 GB of logits, and as much again for their softmax."""
    given, asked = rows(BEGIN, 8), []
    longest = max(LENGTHS) * model.config.vocab_size
    split = TokenSplit(tokens.pack(given), 32)
    together = plain_nll(model, split, range(len(given)))
    monkeypatch.setattr("tools.export.check.LOGITS", 2 * longest - 1)
    watch = model.register_forward_pre_hook(
        lambda _model, _words, named: asked.append(named["input_ids"].shape), with_kwargs=True
    )
    found = plain_nll(model, split, range(len(given)))
    watch.remove()
    np.testing.assert_allclose(found.nll, together.nll, atol=1e-4)
    assert all(count * length * model.config.vocab_size <= longest * 2 for count, length in asked)
    assert asked[-1] == (1, max(LENGTHS) - 1), "the longest by itself"
    assert asked[1][0] > 1, "short ones together"
