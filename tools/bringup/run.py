"""`recipe verify board`: what to look at before a board is trusted with a training run, each line with a verdict.

It needs no base, no data and no torch: a small random Llama, and numpy's answer to what it computes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial

from common.errors import MachineError, VerificationError
from common.hardware import Hardware
from engines.ttml.contract import Build, probe
from engines.ttml.mesh import prepare_environment
from tools.bringup import gradients as slopes
from tools.bringup import mesh as several
from tools.bringup import one_device as one
from tools.bringup.bench import Bench
from tools.bringup.reference_llama import SCALED_ROPE, TIED
from tools.checklist import ChecklistLine, Result, failed, go_through, silent, to_json

BASE_LOSS = "needs a pretrained base: compare a run's held-out loss before training on this board and with HW=cpu"
KILLED = "ends this process: kill -9 a run, and see whether the next one opens the board without tt-smi -r"
# Faults of tt-metal's kernels that a line would show, by their numbers there. Which release has which mend only the git
# log of its tag can tell.
GROUPED = (
    "if it is k_proj and v_proj, the order of grouped heads' gradients: tt-metal 57825 (mended about October 2026)"
)
RECTANGULAR = "if it is one matrix, its product with a transposed factor: tt-metal 57829 (mended about October 2026)"
PADDED = "padded columns left unmasked in the loss's backward: tt-metal 53209 (mended by 53219, August 2026)"
LONG = (
    "if it is k_proj alone, long sums that lose bits: tt-metal 53313 (open in September 2026; exact to TF32 it passes)"
)
ADAMW = partial(one.update, kind="AdamW")
ADAMW_FP32 = partial(one.update, kind="AdamWFullPrecision")
LINES: tuple[ChecklistLine, ...] = (
    ChecklistLine("build", "ttml and ttnn have what the backend needs", one.build),
    ChecklistLine("open", "one device opens, and closes", one.opens, ("build",)),
    ChecklistLine("reopen", "it opens again", one.opens_again, ("open",)),
    ChecklistLine("parameters", "the Llama has the tensors we map, in shape", one.parameters, ("reopen",)),
    ChecklistLine("first-loss", "ttml's own initial weights guess uniformly", one.first_loss, ("parameters",)),
    ChecklistLine("labels", "the loss takes labels[t] for position t", one.labels, ("reopen",)),
    ChecklistLine("weights", "weights go in and come out bit for bit", one.weights, ("parameters",)),
    ChecklistLine("causality", "without a mask, no position sees a later one", one.causality, ("weights",)),
    ChecklistLine("forward", "logits are numpy's (layout of weights, RoPE)", one.forward, ("causality",)),
    ChecklistLine("tied", "and with tied embeddings", partial(one.forward, architecture=TIED), ("forward",)),
    ChecklistLine(
        "rope-scaling", "and with Llama 3's RoPE", partial(one.forward, architecture=SCALED_ROPE), ("forward",)
    ),
    ChecklistLine("loss", "the held-out loss is numpy's", one.loss, ("forward", "labels")),
    ChecklistLine("padded", "both with a vocabulary of no whole tiles", one.padded_vocabulary, ("loss",)),
    ChecklistLine("base-loss", "a pretrained base has its published loss", one.cannot(BASE_LOSS), ("loss",)),
    ChecklistLine("reads", "a weight reads otherwise after a step", one.reads, ("weights",)),
    ChecklistLine(
        "gradient",
        "loss and gradients of a step are numpy's",
        slopes.gradient,
        ("loss", "reads"),
        f"{GROUPED}; {RECTANGULAR}",
    ),
    ChecklistLine(
        "gradient-heads",
        "and logits, with real grouped heads, over 96 tokens",
        slopes.grouped_heads,
        ("gradient",),
        GROUPED,
    ),
    ChecklistLine("gradient-wide", "and of matrices far from square", slopes.rectangular, ("gradient",), RECTANGULAR),
    ChecklistLine(
        "gradient-padded",
        "and with a vocabulary of no whole tiles",
        slopes.padded_vocabulary,
        ("gradient", "padded"),
        PADDED,
    ),
    ChecklistLine("gradient-long", "and over rows of 1024 tokens", slopes.long_rows, ("gradient",), LONG),
    ChecklistLine("accumulation", "one batch of 8 is four of 2", one.accumulation, ("gradient",)),
    ChecklistLine("recompute", "gradient checkpointing changes no gradient", one.recompute, ("gradient",)),
    ChecklistLine("clipping", "the norm is of before clipping, which holds", one.clipping, ("gradient",)),
    ChecklistLine("update", "AdamW updates as numpy does", ADAMW, ("reads",)),
    ChecklistLine("update-fp32", "AdamWFullPrecision does, in fp32", ADAMW_FP32, ("reads",)),
    ChecklistLine(
        "update-gains", "AdamW over fp32 gains does, on builds that have it", one.update_of_gains, ("update",)
    ),
    ChecklistLine("rounding", "with stochastic rounding gains move", one.rounding, ("reads",)),
    ChecklistLine("row-length", "rows that ttml would mistake are refused", one.row_length, ("weights",)),
    ChecklistLine("repeat", "the same step has the same bits", one.repeats, ("reads",)),
    ChecklistLine("checkpoint", "a restored state goes on bit for bit", one.checkpoint, ("repeat",)),
    ChecklistLine("non-finite", "a step over no numbers is refused, or shows", one.not_finite, ("repeat",)),
    ChecklistLine("lora", "adapters where they were asked for, and nothing else trained", one.lora, ("reads",)),
    ChecklistLine("lora-merged", "adapters compute what their merged weights do", one.lora_merged, ("lora", "forward")),
    ChecklistLine("seeds", "dropout depends only on seed and step", one.seeds, ("lora", "repeat")),
    ChecklistLine("mesh", "all devices open as one mesh", several.mesh, ("reopen",)),
    ChecklistLine("rows", "a batch is shared out by rows", several.rows, ("mesh",)),
    ChecklistLine("sync", "several devices have one device's gradients", several.sync, ("rows", "reads")),
    ChecklistLine("replicas", "they hold the same bits after 3 steps", several.replicas, ("sync",)),
    ChecklistLine("curve", "and train as one device does", several.curve, ("replicas",)),
    # Last: where it fails, the device may be left open, and no other line could open it.
    ChecklistLine("interrupt", "an interrupted step leaves the device usable", one.interrupt, ("repeat",)),
    ChecklistLine("killed", "a killed process leaves it usable", one.cannot(KILLED), ("interrupt",)),
)


def bring_up(
    hw: Hardware, say: Callable[[str], None] = silent, lines: Sequence[ChecklistLine] | None = None
) -> tuple[Build, list[Result]]:
    """Go through the checklist on `hw`. Raises MachineError where there is no ttml that the backend can use."""
    prepare_environment(hw, (1, 1))
    with contextlib.suppress(MachineError):  # importing ttml reads it; what is wrong with it, the line `mesh` says
        prepare_environment(hw, hw.mesh_shape)
    build = probe(hw, 1)
    return build, go_through(LINES if lines is None else lines, Bench(hw, build), say)


def print_bring_up(hw: Hardware, reason: str, as_json: bool, say: Callable[[str], None]) -> None:
    """Print each line as it ends, or all of them as one JSON object. Raises VerificationError if one fails."""
    if as_json:
        os.environ.setdefault("TT_LOGGER_LEVEL", "FATAL")  # tt-metal logs to standard output
        build, results = bring_up(hw)
        say(to_json(results, hw=hw.name, why=reason, build=build.versions()))
    else:
        say(f"bring-up of {reason}")
        results = bring_up(hw, say)[1]
    if bad := failed(results):
        raise VerificationError(
            f"{len(bad)} of {len(results)} lines of the bring-up failed: {', '.join(bad)}",
            where=f"HW={hw.name}",
            todo="do not train here before they pass; report them with the build's versions",
        )
