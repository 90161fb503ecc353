"""A model from random weights knows nothing: its first loss is known before it trains."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.errors import VerificationError
from common.model.weights import InitialWeights
from common.train.first_loss import check_first_loss

ARCHITECTURE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
EVENLY = np.arange(5120, dtype=np.uint32) % 512
GUESS = math.log(512) + 64 * 0.02**2 / 2  # the logits of a tied head have a variance of hidden_size x 0.02^2


@pytest.fixture
def initial() -> InitialWeights:
    return InitialWeights(ARCHITECTURE, "ttml", 1)


@pytest.mark.parametrize("off", [-0.1, 0.0, 0.1])
def test_guessing_among_all_ids_passes(initial, off):
    assert check_first_loss(GUESS + off, initial, EVENLY).startswith(f"the first loss is {GUESS + off:.4f}; untrained")


@pytest.mark.parametrize("loss", [GUESS / 2, GUESS * 2, GUESS - 0.2, math.nan, math.inf])
def test_another_loss_ends_the_run_with_code_6(initial, loss):
    with pytest.raises(VerificationError, match=r"untrained weights give 6\.25 ± 0\.12") as error:
        check_first_loss(loss, initial, EVENLY)
    assert error.value.code == 6


def test_a_text_of_few_tokens_widens_the_band(initial):
    few = np.zeros(5120, np.uint32)
    check_first_loss(GUESS - 0.2, initial, few)
