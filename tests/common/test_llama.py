"""Parameter counts by arithmetic; tests/recipes holds every preset's against the model that is built."""

from __future__ import annotations

from common.model import llama

TIED = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
PUBLISHED = {
    "vocab_size": 96,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "tie_word_embeddings": False,
}


def test_the_count_that_tt_train_publishes():
    assert llama.parameters(PUBLISHED) == 9_810_816


def test_a_tied_head_is_counted_once():
    tied, untied = TIED, TIED | {"tie_word_embeddings": False}
    assert llama.parameters(untied) - llama.parameters(tied) == 256 * 256
