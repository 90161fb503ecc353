"""A tiny random Llama in Hugging Face format, with a tokenizer: what tests and `verify calibrate` train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json
from common.model import llama

Array = np.ndarray[Any, Any]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HEADS = 2  # of queries, which share one key/value head: grouped queries, as in the models that the recipes tune
CORPUS = [
    "A fox at a market stall explains gradient descent: feel the slope, step downhill, repeat.",
    "What is a learning rate? The length of one step, nothing more and nothing less.",
    "Overfitting is a student who learns the answer sheet and fails the exam.",
    "Attention scores are dot products, and the weights sum to one.",
]


def write_tiny_base(
    folder: Path,
    *,
    vocab_size: int = 512,
    hidden: int = 64,
    layers: int = 2,
    heads: int = HEADS,
    kv_heads: int = 1,
    ffn: int = 96,
    context: int = 256,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Write config, tokenizer, chat template and random weights to `folder`; return it."""
    # The defaults are whole tiles of 32 in every width, as a board's engine asks for them (engines/ttml/limits.py).
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **tokens},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    save_file(random_llama(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_llama(config: Mapping[str, Any], seed: int) -> dict[str, Array]:
    """Return float32 weights by Hugging Face names: norm gains 1, everything else N(0, 0.05^2)."""
    rng = np.random.default_rng(seed)
    shapes = llama.shapes(config)
    # One stream for all: the head is drawn right after the embedding, and the order of the rest is that of `shapes`.
    order = sorted(shapes, key=lambda name: name not in (llama.EMBEDDING, llama.HEAD))
    return {
        name: np.ones(shapes[name], np.float32)
        if len(shapes[name]) == 1
        else (rng.standard_normal(shapes[name]) * 0.05).astype(np.float32)
        for name in order
    }
