"""A double of the Python Llama of `ttml.models.llama`, with fused or unfused projections."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import ttnn
from ttnn import _switches

from . import _ops, init
from .autograd import Tensor, create_tensor, record_forward, without_graph
from .modules import AbstractModuleBase, Embedding, LinearLayer, ModuleList, Parameter, RunMode

TILE = 32
RMS_EPSILON = 1e-5  # fixed: there is no config field


class RunnerType(enum.Enum):
    """MemoryEfficient computes a block again for its backward pass, with the generator as it was the first time."""

    MemoryEfficient = 0
    Default = 1


class WeightTyingType(enum.Enum):
    Disabled = 0
    Enabled = 1


class EmbeddingParallelType(enum.Enum):
    FeatureParallel = 0
    VocabParallel = 1


class EmbeddingPlacement(enum.Enum):
    Replicated = 0
    VocabParallel = 1


@dataclass(frozen=True)
class LlamaRopeScalingConfig:
    scaling_factor: float = 0.0
    high_freq_factor: float = 4.0
    low_freq_factor: float = 1.0
    original_context_length: int = 0


@dataclass(frozen=True)
class _Config:
    """What both generations have. That head_dim is a multiple of 32 is checked by the model only."""

    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    vocab_size: int = 256
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    runner_type: RunnerType = RunnerType.Default
    weight_tying: WeightTyingType = WeightTyingType.Disabled
    rope_scaling: LlamaRopeScalingConfig = field(default_factory=LlamaRopeScalingConfig)

    def __post_init__(self) -> None:
        if self.max_position_embeddings % TILE:
            raise ValueError(f"Max position embeddings must be divisible by 32: {self.max_position_embeddings}")
        if self.hidden_size % TILE:
            raise ValueError(f"Hidden size must be divisible by 32: {self.hidden_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("Hidden size must be divisible by the number of attention heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("Number of attention heads must be divisible by the number of key/value heads")


_embedding_field: tuple[str, type, Any] = {
    "B": ("embedding_parallel", EmbeddingParallelType, field(default=EmbeddingParallelType.FeatureParallel)),
    "C": ("embedding_placement", EmbeddingPlacement, field(default=EmbeddingPlacement.Replicated)),
}[_switches.GENERATION]
LlamaConfig = make_dataclass("LlamaConfig", [_embedding_field], bases=(_Config,), frozen=True)


class RMSNormLayer(AbstractModuleBase):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = Parameter(init.constant(1.0)((1, 1, 1, features)))

    def forward(self, x: Tensor) -> Tensor:
        return _ops.rmsnorm(x, self.gamma.tensor, RMS_EPSILON)


class _Attention(AbstractModuleBase):
    """RoPE rotates neighbours. Dropout acts on the output, not on the attention weights."""

    def __init__(self, config: _Config, rope_params: _ops.RotaryEmbeddingParams) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = hidden // self.heads
        self.kv_rows = self.kv_heads * self.head_dim
        self.out_linear = LinearLayer(hidden, hidden, False)
        self.rope_params, self.dropout_prob = rope_params, config.attention_dropout

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """What holds Q, what holds K and V, and the row at which K starts there."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        from_q, from_kv, k_starts = self._projected(x)
        query = _ops.split_heads(from_q, 0, self.heads, self.head_dim)
        key = _ops.split_heads(from_kv, k_starts, self.kv_heads, self.head_dim)
        value = _ops.split_heads(from_kv, k_starts + self.kv_rows, self.kv_heads, self.head_dim)
        query, key = _ops.rope(query, self.rope_params), _ops.rope(key, self.rope_params)
        attended = _ops.scaled_dot_product_attention(query, key, value, mask)
        return _drop(self, self.out_linear(_ops.heads_fusion(attended)))


class _FusedAttention(_Attention):
    """Rows are Q, K, V in `qkv_linear`."""

    def __init__(self, config: _Config, rope_params: _ops.RotaryEmbeddingParams) -> None:
        super().__init__(config, rope_params)
        hidden = config.hidden_size
        self.qkv_linear = LinearLayer(hidden, hidden + 2 * self.kv_rows, False)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        qkv = self.qkv_linear(x)
        return qkv, qkv, self.heads * self.head_dim


class _UnfusedAttention(_Attention):
    """Rows are Q in `q_linear`, and K, V in `kv_linear`."""

    def __init__(self, config: _Config, rope_params: _ops.RotaryEmbeddingParams) -> None:
        super().__init__(config, rope_params)
        hidden = config.hidden_size
        self.q_linear = LinearLayer(hidden, hidden, False)
        self.kv_linear = LinearLayer(hidden, 2 * self.kv_rows, False)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        return self.q_linear(x), self.kv_linear(x), 0


class _MLP(AbstractModuleBase):
    """w2(silu(gate) * up)."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.hidden, self.inner = config.hidden_size, config.intermediate_size
        self.w2 = LinearLayer(self.inner, self.hidden, False)
        self.dropout_prob = config.mlp_dropout


class _FusedMLP(_MLP):
    """Rows are gate, up in `w_gate_up`."""

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        if self.inner % TILE:
            raise ValueError(f"Intermediate size must be a multiple of 32 for fused projections: {self.inner}")
        self.w_gate_up = LinearLayer(self.hidden, 2 * self.inner, False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.w_gate_up(x)
        gate, up = (_ops.slice_last_dim(both, start, start + self.inner) for start in (0, self.inner))
        return _drop(self, self.w2(_ops.mul(_ops.silu(gate), up)))


class _UnfusedMLP(_MLP):
    """Gate is `w1`, up is `w3`. The weights go to one op: no layer is called, and an adapter on one does nothing."""

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.w1 = LinearLayer(self.hidden, self.inner, False)
        self.w3 = LinearLayer(self.hidden, self.inner, False)

    def forward(self, x: Tensor) -> Tensor:
        if _switches.CALLS_MLP_LAYERS:
            return _drop(self, self.w2(_ops.mul(_ops.silu(self.w1(x)), self.w3(x))))
        return _drop(self, _ops.swiglu(x, self.w1.weight.tensor, self.w2.weight.tensor, self.w3.weight.tensor))


GroupedQueryAttention = _FusedAttention if "qkv" in _switches.FUSED else _UnfusedAttention
LlamaMLP = _FusedMLP if "gate_up" in _switches.FUSED else _UnfusedMLP


def _drop(module: _Attention | _MLP, x: Tensor) -> Tensor:
    active = module.get_run_mode() is RunMode.TRAIN and module.dropout_prob > 0
    return _ops.dropout(x, module.dropout_prob) if active else x


class LlamaBlock(AbstractModuleBase):
    def __init__(self, config: _Config, rope_params: _ops.RotaryEmbeddingParams) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNormLayer(config.hidden_size), RMSNormLayer(config.hidden_size)
        self.attention = GroupedQueryAttention(config, rope_params)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Llama(AbstractModuleBase):
    """`model(ids, mask)`: ids [B,1,1,T] to logits [B,1,T,vocab_size]. The mask has no default; None is causal.

    Weights have their vocabulary padded to whole tiles, logits are cut back.
    """

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.config = config
        padded_vocab_size = math.ceil(config.vocab_size / TILE) * TILE
        self.fc = LinearLayer(config.hidden_size, padded_vocab_size, False)
        self.tok_emb = Embedding(padded_vocab_size, config.hidden_size)
        if config.weight_tying is WeightTyingType.Enabled:
            self.tok_emb.weight = self.fc.weight
        scaling = _ops.RopeScalingParams()
        vars(scaling).update(vars(config.rope_scaling))
        head_dim = config.hidden_size // config.num_attention_heads
        rope_params = _ops.build_rope_params(config.max_position_embeddings, head_dim, config.rope_theta, scaling)
        self.blocks = ModuleList([LlamaBlock(config, rope_params) for _ in range(config.num_hidden_layers)])
        self.ln_fc = RMSNormLayer(config.hidden_size)

    def forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        record_forward()
        x = self._embed(input)
        for block in self.blocks:
            if self.config.runner_type is RunnerType.MemoryEfficient:
                without_graph(block, x, mask)
            x = block(x, mask)
        return _ops.slice_last_dim(self.fc(self.ln_fc(x)), 0, self.config.vocab_size)

    def _embed(self, ids: Tensor) -> Tensor:
        """Lengths off the tile are padded, and cut again outside the graph: the embedding then has no gradient."""
        length = ids.shape()[-1]
        missing = -length % TILE
        if not missing:
            return self.tok_emb(ids)
        tokens: Any = ids.get_value()
        padded = ttnn.pad(tokens, [(0, 0), (0, 0), (0, 0), (0, missing)], value=0.0)
        embedded = self.tok_emb(create_tensor(padded)).get_value()
        shape = embedded.shape
        return create_tensor(ttnn.slice(embedded, [0, 0, 0, 0], [shape[0], 1, length, shape[3]]))
