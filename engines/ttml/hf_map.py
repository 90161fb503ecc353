"""Names and layouts, both ways, between Hugging Face's Llama and ttml's. numpy only.

A ttml parameter is [1, 1, rows, columns] under a path such as `Llama/blocks/0/attention/qkv_linear/weight`; matrices
are [out, in] on both sides. Four things differ:

- Several Hugging Face matrices may lie in one ttml tensor, the rows of one after those of the other: K then V; newer
  builds Q, K, V and gate, up. A LoRA adapter on such a tensor has one A for all of them, and B has their rows.
- Rows of Q and K: Hugging Face rotates row j of a head together with row j + d/2, ttml with its neighbour. So a head's
  rows 0, 1, 2, ... are 0, d/2, 1, 1 + d/2, ... of Hugging Face's (RoFormer, Su et al., 2021, pairs neighbours too).
- The vocabulary is padded with zero rows to a multiple of 32.
- Tied embeddings are one tensor, called `fc/weight` (some builds: `tok_emb/weight`).

Moments and fp32 masters of an optimizer have the layout of their parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.config.schema import Lora, Projection
from common.errors import MachineError, UsageError
from common.hardware import round_up
from common.model import llama
from common.model.llama import EMBEDDING, FINAL_NORM, HEAD, PREFIX
from engines.refusals import misfit

Array = np.ndarray[Any, Any]

# ttml's linear layers by their path in a block, and the Hugging Face projections whose rows they hold, in order.
LINEARS: dict[str, tuple[Projection, ...]] = {
    "attention/q_linear": ("q_proj",),
    "attention/kv_linear": ("k_proj", "v_proj"),
    "attention/qkv_linear": ("q_proj", "k_proj", "v_proj"),
    "attention/out_linear": ("o_proj",),
    "mlp/w1": ("gate_proj",),
    "mlp/w3": ("up_proj",),
    "mlp/w_gate_up": ("gate_proj", "up_proj"),
    "mlp/w2": ("down_proj",),
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside a ttml tensor. `heads` > 0: rows paired for RoPE, in that many heads."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Entry:
    """One ttml tensor, [1, 1, rows, columns], and the Hugging Face tensors in it.

    `shared`: each part is the whole matrix (the A of an adapter on a fused layer); else their rows follow one another,
    and rows that no part fills are padding.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    shared: bool = False

    def to_hf(self, array: Array) -> Iterator[tuple[str, Array]]:
        """Yield the parts of a ttml array by name: views of it, or copies where rows change places."""
        matrix = array.reshape(self.shape[2:])
        row = 0
        for part in self.parts:
            rows = len(matrix) if self.shared else _matrix_shape(part.shape)[0]
            block = matrix[row : row + rows]
            row += 0 if self.shared else rows
            yield part.name, (to_halves(block, part.heads) if part.heads else block).reshape(part.shape)

    def from_hf(self, tensors: Mapping[str, Array], dtype: Any, prefix: str = "") -> Array:
        """Return the ttml array, C-contiguous and of `dtype`, from `tensors[prefix + name]`, read one at a time.

        Raises MachineError for a part of another shape, and where parts that share one matrix differ.
        """
        out = np.zeros(self.shape, dtype)
        matrix = out[0, 0]
        row = 0
        for part in self.parts:
            source = tensors[prefix + part.name]
            if tuple(source.shape) != part.shape:
                raise misfit([f"{prefix}{part.name} is {tuple(source.shape)}, expected {part.shape}"])
            if self.shared:
                self._take_shared(matrix, source, part)
                continue
            rows, columns = _matrix_shape(part.shape)
            target, block = matrix[row : row + rows], source.reshape(rows, columns)
            if part.heads:  # as `to_pairs`, written in place: a second copy of a large matrix is what must not be
                target.reshape(part.heads, -1, 2, columns)[:] = block.reshape(part.heads, 2, -1, columns).swapaxes(1, 2)
            else:
                target[:] = block
            row += rows
        return out

    def _take_shared(self, matrix: Array, source: Array, part: Part) -> None:
        if part is self.parts[0]:
            matrix[:] = source
        elif not np.array_equal(matrix, source.astype(matrix.dtype)):
            raise MachineError(
                f"the adapter was trained with another tying of A: {part.name} is not {self.parts[0].name}, and this "
                f"build of ttml has one A for both",
                where="model_config.lora.tie_groups",
                todo="train on with HW=cpu and the adapter's own tie_groups, or train a new adapter here",
            )

    def under_optimizer(self) -> Entry:
        """Return the same tensor's moments: named as PyTorch names parameters, a shared one once."""
        parts = tuple(replace(part, name=_parameter_name(part.name)) for part in self.parts)
        return replace(self, parts=parts[:1] if self.shared else parts)


def to_pairs(rows: Array, heads: int) -> Array:
    """Bring Hugging Face's row order to ttml's: in a head, row j next to row j + d/2. `rows` [heads x d, columns]."""
    columns = rows.shape[1]
    return rows.reshape(heads, 2, -1, columns).swapaxes(1, 2).reshape(-1, columns)


def to_halves(rows: Array, heads: int) -> Array:
    """Undo `to_pairs`."""
    columns = rows.shape[1]
    return rows.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(-1, columns)


def map_parameters(shapes: Mapping[str, Sequence[int]], architecture: Mapping[str, Any]) -> dict[str, Entry]:
    """Return an entry for each ttml parameter of a Llama of `architecture`, by its name; adapters included.

    Raises MachineError where the build has a parameter this map does not know, one of another shape, or where a
    Hugging Face tensor is in none or in two.
    """
    tied = sum(tail_of(name) in ("tok_emb/weight", "fc/weight") for name in shapes) == 1
    hf = llama.shapes(architecture)
    paired = {"q_proj": architecture["num_attention_heads"], "k_proj": llama.kv_heads(architecture)}
    entries = {n: Entry(n, tuple(shape), *_parts(n, shape, hf, paired, tied)) for n, shape in shapes.items()}
    odd = [
        f"{entry.name} is {entry.shape}, expected {wanted}"
        for entry in entries.values()
        if entry.shape != (wanted := _expected_shape(entry))
    ]
    held = [part.name for entry in entries.values() for part in entry.parts if not part.name.startswith(PREFIX)]
    odd += [f"{name} has no place in it" for name in sorted(set(hf) - set(held))]
    odd += [f"{name} is in it {held.count(name)} times" for name in sorted(set(held)) if held.count(name) > 1]
    odd += [f"it has an output head of its own for {name}" for name in sorted(set(held) - set(hf))]
    if odd:
        raise MachineError(
            f"ttml built another model than the architecture asks for: {'; '.join(odd[:5])}",
            where="the parameters of ttml.models.llama.Llama",
            todo="use the pinned image; if it is the pinned image, report this: its layout is not one we know",
        )
    return entries


def _parts(
    name: str, shape: Sequence[int], hf: Mapping[str, llama.Shape], paired: Mapping[str, int], tied: bool
) -> tuple[tuple[Part, ...], bool]:
    """Return the Hugging Face tensors in the ttml parameter `name`, and whether they share one matrix."""
    tail = tail_of(name)
    if tail in ("tok_emb/weight", "fc/weight"):
        return (Part(EMBEDDING if tied or tail == "tok_emb/weight" else HEAD, hf[EMBEDDING]),), False
    if tail == "ln_fc/gamma":
        return (Part(FINAL_NORM, hf[FINAL_NORM]),), False
    if match := re.fullmatch(r"blocks/(\d+)/(attention_norm|mlp_norm)/gamma", tail):
        return (Part(f"model.layers.{match[1]}.{NORMS[match[2]]}.weight", hf[FINAL_NORM]),), False
    match = re.fullmatch(r"blocks/(\d+)/(\w+/\w+)/(weight|lora_A|lora_B)", tail)
    modules = [module_of(int(match[1]), projection) for projection in LINEARS.get(match[2], ())] if match else []
    if match is None or not modules or f"{modules[0]}.weight" not in hf:
        raise MachineError(
            f"ttml has a parameter we do not know: {name} {tuple(shape)}",
            where="the parameters of ttml.models.llama.Llama",
            todo="use the pinned image; if it is the pinned image, report this",
        )
    kind, parts = match[3], []
    for module in modules:
        rows, columns = hf[f"{module}.weight"]
        heads = paired.get(module.rpartition(".")[2], 0)
        if kind == "weight":
            parts.append(Part(f"{module}.weight", (rows, columns), heads))
        elif kind == "lora_A":
            parts.append(Part(f"{PREFIX}{module}.lora_A.weight", (int(shape[2]), columns)))
        else:
            parts.append(Part(f"{PREFIX}{module}.lora_B.weight", (rows, int(shape[3])), heads))
    return tuple(parts), kind == "lora_A"


def _expected_shape(entry: Entry) -> tuple[int, ...]:
    matrices = [_matrix_shape(part.shape) for part in entry.parts]
    rows = matrices[0][0] if entry.shared else sum(rows for rows, _ in matrices)
    if entry.parts[0].name in (EMBEDDING, HEAD):
        rows = round_up(rows)
    return (1, 1, rows, matrices[0][1])


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def tail_of(name: str) -> str:
    """Return a ttml name without its root, which is the class name of the outermost module."""
    return name.partition("/")[2]


def module_of(layer: int, projection: str) -> str:
    """Return Hugging Face's path of a projection."""
    block = "self_attn" if projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def _parameter_name(name: str) -> str:
    """Return the name PyTorch gives a parameter of that file name: PEFT's prefix and suffix are the files' alone."""
    return name.removeprefix(PREFIX).removesuffix(".weight") if name.startswith(PREFIX) else name


def check_names(given: Iterable[str], architecture: Mapping[str, Any]) -> None:
    """Raise MachineError naming the tensors of a base that are missing or unknown.

    A tied output head may be among them: it is ignored.
    """
    given, expected = set(given), set(llama.shapes(architecture))
    odd = [f"{name} is missing" for name in sorted(expected - given)]
    odd += [f"{name} is unknown" for name in sorted(given - expected - {HEAD})]
    if odd:
        raise misfit(odd)


# --- LoRA -----------------------------------------------------------------------------------------------------------


def linears_of(entries: Mapping[str, Entry]) -> list[str]:
    """Return the linear layers of a block in this build, such as `attention/qkv_linear`."""
    paths = {tail_of(name).removeprefix("blocks/0/").removesuffix("/weight") for name in entries}
    return sorted(paths & set(LINEARS))


def ties_of(linears: Iterable[str]) -> list[list[Projection]]:
    """Return the groups of projections that these layers fuse: an adapter on one has a single A."""
    return [list(LINEARS[linear]) for linear in sorted(linears) if len(LINEARS[linear]) > 1]


def lora_linears(linears: Iterable[str], lora: Lora) -> list[str]:
    """Return the layers of this build that get an adapter.

    Raises UsageError where `lora` ties A otherwise than the build does, or targets a fused layer in part.
    """
    lora = lora.tied(ties_of(linears))
    fused = {linear: LINEARS[linear] for linear in linears if set(LINEARS[linear]) & set(lora.target_modules)}
    wanted = {frozenset(group) for group in lora.tie_groups if set(group) <= set(lora.target_modules)}
    has = {frozenset(group) for group in fused.values() if len(group) > 1}
    untargeted = sorted({p for group in fused.values() for p in group} - set(lora.target_modules))
    if untargeted or {group for group in wanted if len(group) > 1} != has:
        raise UsageError(
            f"this build of ttml has one adapter for each of {ties_of(fused) or 'the projections'}: A is tied there "
            f"and nowhere else, but tie_groups is {lora.tie_groups} and target_modules {list(lora.target_modules)}",
            where="model_config.lora.tie_groups",
            todo="set model_config.lora.tie_groups=build"
            + (f", and target {untargeted} too" if untargeted else "")
            + "; the CPU twin (HW=cpu) trains any groups",
        )
    return sorted(fused)
