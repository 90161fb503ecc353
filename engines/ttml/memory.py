"""What training keeps in the memory of a chip, by arithmetic over shapes; and the refusal of what cannot fit.

A board keeps tensors in tiles: the last two dimensions are padded to 32, and a vector is one row. Weights, gradients
and AdamW's two moments are bf16, 2 bytes an element; AdamWFullPrecision has fp32 masters and moments. Every device of
a data-parallel mesh keeps all of them. Activations are counted from below: what the backward pass cannot do without.
So a total above the chip's memory cannot fit; one below it may still not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from common.config import Config
from common.config.schema import Lora, Projection
from common.errors import UsageError
from common.hardware import TILE, Hardware, round_up
from common.model import llama
from engines.ttml import hf_map

MIB = 2**20
BF16, FP32 = 2, 4
LORA_TO_TRY = "model_config.lora={rank: 16, alpha: 32}"


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, by what they are for."""

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def mib(self) -> dict[str, float]:
        """Return the components in MiB, and `total`."""
        return {name: round(size / MIB, 1) for name, size in {**vars(self), "total": self.total}.items()}


def elements(shape: tuple[int, ...], tile: int = TILE) -> int:
    """Return the elements of a tensor with its last two dimensions padded to whole tiles."""
    rows, columns = (1, *shape)[-2:]
    return math.prod(shape[:-2]) * round_up(rows, tile) * round_up(columns, tile)


def adapters(config: Config) -> Lora | None:
    """Return the adapters of `config` with their groups named.

    Those of a build that nobody has asked yet are taken for the ones of a build that fuses least: it needs the most.
    """
    return config.model.lora and config.model.lora.tied(hf_map.ties_of(["attention/kv_linear"]))


def trained_shapes(config: Config, architecture: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the shapes of what the optimizer updates: every tensor, or the adapters, a shared A once."""
    shapes = llama.shapes(architecture)
    lora = adapters(config)
    if lora is None:
        return list(shapes.values())
    found: list[tuple[int, ...]] = []
    seen: set[tuple[str, str]] = set()
    for name, shape in shapes.items():
        module, _, projection = name.removesuffix(".weight").rpartition(".")
        if projection not in lora.target_modules:
            continue
        key = (module, lora.key_of(projection))
        found += [] if key in seen else [(lora.rank, shape[1])]
        found.append((shape[0], lora.rank))
        seen.add(key)
    return found


def footprint(hw: Hardware, config: Config, architecture: Mapping[str, Any], length: int) -> Memory:
    """Return the memory of one device of `hw` for rows of `length` tokens."""
    tile, precision = (1, config.training.precision) if hw.is_cpu else (TILE, "bf16")
    stored = BF16 if precision == "bf16" else FP32
    computed = FP32 if precision == "fp32" else BF16
    weights = sum(elements(shape, tile) for shape in llama.shapes(architecture).values())
    trained = sum(elements(shape, tile) for shape in trained_shapes(config, architecture))
    added = trained if config.model.lora else 0
    full = config.training.optimizer.type == "AdamWFullPrecision"
    tokens = config.micro_batch * length
    # The CPU engine takes the output head in chunks and keeps no logits; a board keeps them and their gradient.
    vocabulary = 0 if hw.is_cpu else round_up(architecture["vocab_size"])
    return Memory(
        weights=(weights + added) * stored,
        masters=trained * FP32 if full and stored == BF16 else 0,
        gradients=trained * stored,
        moments=trained * 2 * (FP32 if full else stored),
        activations=tokens * saved_per_token(hw, config, architecture) * computed,
        logits=tokens * vocabulary * 2 * BF16,
    )


def saved_per_token(hw: Hardware, config: Config, architecture: Mapping[str, Any]) -> int:
    """Return the elements a token leaves for the backward pass, at least.

    A block's two norms need their inputs, attention its queries, keys, values and output, the product of gate and up
    both of them; a weight that is trained, and A of an adapter, also need the input of their layer. Recomputing
    (gradient_checkpointing) keeps the blocks' inputs, and one block's rest at a time. Attention scores are not counted:
    a fused kernel keeps none. Nor is silu(gate), but where adapters keep a board from its fused SwiGLU (see
    TTML._call_mlp_layers): that is the one tensor of which tt-metal PR 45335 made 26.7 GB 24.3.
    """
    hidden, wide = architecture["hidden_size"], architecture["intermediate_size"]
    queries, keys = llama.attention_widths(architecture)
    layers: int = architecture["num_hidden_layers"]
    lora = adapters(config)
    trained = set(get_args(Projection) if lora is None else lora.target_modules)
    block = 2 * hidden + 2 * queries + 2 * keys + 2 * wide
    block += hidden * bool(trained & {"q_proj", "k_proj", "v_proj"}) + hidden * bool(trained & {"gate_proj", "up_proj"})
    block += wide * ("down_proj" in trained)
    in_mlp = trained & {"gate_proj", "up_proj", "down_proj"}
    if lora and in_mlp and not hw.is_cpu and ["gate_proj", "up_proj"] not in lora.tie_groups:
        block += wide
    saved: int = hidden * layers + block if config.model.gradient_checkpointing else block * layers
    return saved


def capacity(hw: Hardware) -> int | None:
    """Return the bytes of a chip's memory; None for a CPU, whose memory is the host's."""
    return None if hw.dram_gib_per_chip is None else int(hw.dram_gib_per_chip * 2**30)


def refuse_too_large(hw: Hardware, config: Config, architecture: Mapping[str, Any], length: int) -> None:
    """Raise UsageError where training cannot fit into a chip, with the settings that would."""
    room, needed = capacity(hw), footprint(hw, config, architecture, length)
    if room is None or needed.total <= room:
        return
    parts = ", ".join(f"{name} {size:,.0f}" for name, size in needed.mib().items() if size and name != "total")
    ways = list(settings_that_fit(hw, config, architecture, length))
    raise UsageError(
        f"this training cannot fit into a chip of {hw.name}, which has {room / MIB:,.0f} MiB: it needs at least "
        f"{needed.total / MIB:,.0f} ({parts})",
        where="training_config.micro_batch_size, model_config",
        todo="; or ".join(ways[:3]) or "no batch of it fits: take a smaller model, or a board with more memory",
    )


def settings_that_fit(hw: Hardware, config: Config, architecture: Mapping[str, Any], length: int) -> Iterator[str]:
    """Yield what to add to the command so that it fits: smaller micro-batches, recomputation; then another training."""
    room = capacity(hw)
    assert room is not None, "a CPU refuses nothing"
    another: list[tuple[dict[str, Any], str]] = [({}, "")]
    if config.training.optimizer.type == "AdamWFullPrecision":
        another.append(({"training.optimizer.type": "AdamW"}, "training_config.optimizer.type=AdamW"))
    if config.model.lora is None and config.model.init == "pretrained":
        another.append(({"model.lora": {"rank": 16, "alpha": 32.0}}, f"'{LORA_TO_TRY}'"))
    for values, words in another:
        for recompute in sorted({config.model.gradient_checkpointing, True}):
            for changes in splits(config, recompute):
                changed = config.with_values(**values, **changes)
                if (values or changes) and footprint(hw, changed, architecture, length).total <= room:
                    yield as_flags(changes, words)
                    break


def splits(config: Config, recompute: bool) -> Iterator[dict[str, Any]]:
    """Yield the keys that change for the same batch in ever smaller micro-batches, the present one first."""
    runner = {"model.gradient_checkpointing": True} if recompute != config.model.gradient_checkpointing else {}
    yield runner
    for rows in range(config.micro_batch - 1, 0, -1):
        if config.training.batch_size // config.device.devices % rows == 0:
            yield {"training.micro_batch_size": rows, **runner}


def as_flags(changes: Mapping[str, Any], another: str) -> str:
    """Return `changes` as --set flags, after those of `another` training (or "")."""
    names = {"training": "training_config", "model": "model_config"}
    words = [another] if another else []
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        words.append(f"{names[section]}.{rest}={str(value).lower()}")
    return f"--set {' --set '.join(words)}" + (" (another training)" if another else " (the same training)")
