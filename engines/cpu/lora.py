"""LoRA on torch, with one A per group of projections that an engine fuses.

Hu et al., 2021: y = W x + (alpha / rank) B A x, A uniform in +-1/sqrt(fan_in), B zero, so that training starts at the
base. A build of ttml that fuses projections, {q,k,v} and {gate,up} or {k,v}, has one A for each group; tying A here
makes both engines train the same function. Names and files are PEFT's: each projection is written with its own copy of
A.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.schema import Lora
from common.errors import UsageError
from common.model.init import uniform
from engines.cpu import TIES

# Shapes: ... any leading dimensions, I in_features, O out_features, R rank.


class Frozen(nn.Module):
    """A linear layer that is not trained. `weight16` is its bf16 copy: what autocast would make again at every use."""

    def __init__(self, linear: nn.Linear, keep_half: bool) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        self.weight16 = self.weight.detach().bfloat16() if keep_half else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight16 is not None and torch.is_autocast_enabled("cpu"):
            return F.linear(x.bfloat16(), self.weight16, self.bias)
        return F.linear(x, self.weight, self.bias)


class LoraLinear(Frozen):
    """A frozen linear layer plus its low-rank update. `lora_A` [R, I] may be shared, `lora_B` is [O, R]."""

    def __init__(self, linear: nn.Linear, lora_A: nn.Parameter, scale: float, dropout: float, keep_half: bool) -> None:
        super().__init__(linear, keep_half)
        self.lora_A = lora_A
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, lora_A.shape[0], dtype=lora_A.dtype))
        self.scale, self.dropout, self.enabled = scale, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, super().forward(x))  # [..., I] -> [..., O]

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the frozen layer's y [..., O] of x [..., I] plus the low-rank update of x."""
        if not self.enabled:
            return y
        x = F.dropout(x.to(y.dtype), self.dropout, self.training)
        low = F.linear(x, self.lora_A.to(y.dtype))  # [..., R]
        # One product that scales and adds as it goes: y + scale x low B^T, with no [..., O] in between.
        flat = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_B.to(y.dtype).t(), alpha=self.scale)
        return flat.view_as(y)


def add_lora(model: nn.Module, lora: Lora, seed: int, *, dtype: torch.dtype, keep_half: bool) -> int:
    """Freeze `model` and adapt each targeted linear layer; return how many. Raises UsageError for an unmet target."""
    lora = lora.tied(TIES)
    model.requires_grad_(False)
    targets = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    shared: dict[str, nn.Parameter] = {}
    replaced = 0
    for name, linear in targets:
        parent, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
        if leaf not in lora.target_modules:
            # The head's bf16 copy is Objective's (engine.py): a Frozen would hold a second one.
            if leaf != "lm_head":
                setattr(model.get_submodule(parent), leaf, Frozen(linear, keep_half))
            continue
        key = f"{parent}.{lora.key_of(leaf)}.lora_A"
        if key not in shared:
            # By the name of the A, not by a stream of numbers: which other layers have adapters changes no value.
            values = uniform(seed, key, (lora.rank, linear.in_features), linear.in_features**-0.5)
            shared[key] = nn.Parameter(torch.from_numpy(values).to(dtype))
        layer = LoraLinear(linear, shared[key], lora.alpha / lora.rank, lora.dropout, keep_half)
        setattr(model.get_submodule(parent), leaf, layer)
        replaced += 1
    found = {name.rpartition(".")[2] for name, _ in targets}
    if missing := [target for target in lora.target_modules if target not in found]:
        raise UsageError(
            f"LoRA targets that match no layer: {', '.join(missing)}",
            where="model_config.lora.target_modules",
            todo=f"choose from {', '.join(sorted(found - {'lm_head'}))}",
        )
    return replaced


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (name, layer) of every adapted projection, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
