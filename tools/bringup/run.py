"""`recipe verify board`: what to look at before a board is trusted with a training run, each line with a verdict.

It needs no base, no data and no torch: a small random Llama, and numpy's answer to what it computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence

from common.errors import MachineError, VerificationError
from common.hardware import Hardware
from engines.ttml.contract import Build, probe
from engines.ttml.mesh import prepare_environment
from tools.bringup import mesh as several
from tools.bringup import one_device as one
from tools.bringup.bench import Bench
from tools.checklist import Line, Result, failed, go_through

FORMAT = 1  # of the JSON
BASE_LOSS = "needs a pretrained base: compare a run's held-out loss before training on this board and with HW=cpu"
KILLED = "ends this process: kill -9 a run, and see whether the next one opens the board without tt-smi -r"
LINES: tuple[Line, ...] = (
    Line("build", "ttml and ttnn have what the backend needs", one.build),
    Line("open", "one device opens, and closes", one.opens, ("build",)),
    Line("reopen", "it opens again", one.opens_again, ("open",)),
    Line("parameters", "the Llama has the tensors we map, in shape", one.parameters, ("reopen",)),
    Line("first-loss", "ttml's own initial weights guess uniformly", one.first_loss, ("parameters",)),
    Line("labels", "the loss takes labels[t] for position t", one.labels, ("reopen",)),
    Line("weights", "weights go in and come out bit for bit", one.weights, ("parameters",)),
    Line("causality", "without a mask, no position sees a later one", one.causality, ("weights",)),
    Line("forward", "logits are numpy's (layout of weights, RoPE)", one.forward, ("causality",)),
    Line("tied", "and with tied embeddings", one.forward_tied, ("forward",)),
    Line("rope-scaling", "and with Llama 3's RoPE", one.forward_scaled, ("forward",)),
    Line("loss", "the held-out loss is numpy's", one.loss, ("forward", "labels")),
    Line("padded", "both with a vocabulary of no whole tiles", one.padded_vocabulary, ("loss",)),
    Line("base-loss", "a pretrained base has its published loss", one.cannot(BASE_LOSS), ("loss",)),
    Line("reads", "a weight reads otherwise after a step", one.reads, ("weights",)),
    Line("gradient", "loss and gradients of a step are numpy's", one.gradient, ("loss", "reads")),
    Line("accumulation", "one batch of 8 is four of 2", one.accumulation, ("gradient",)),
    Line("recompute", "gradient checkpointing changes no gradient", one.recompute, ("gradient",)),
    Line("clipping", "the norm is of before clipping, which holds", one.clipping, ("gradient",)),
    Line("update", "AdamW updates as numpy does", one.update, ("reads",)),
    Line("update-fp32", "AdamWFullPrecision does, in fp32", one.update_full_precision, ("reads",)),
    Line("rounding", "with stochastic rounding gains move", one.rounding, ("reads",)),
    Line("row-length", "rows that ttml would mistake are refused", one.row_length, ("weights",)),
    Line("repeat", "the same step has the same bits", one.repeats, ("reads",)),
    Line("checkpoint", "a restored state goes on bit for bit", one.checkpoint, ("repeat",)),
    Line("non-finite", "a step that is not finite is refused", one.not_finite, ("repeat",)),
    Line("lora", "adapters where they were asked for, and nothing else trained", one.lora, ("reads",)),
    Line("lora-merged", "adapters compute what their merged weights do", one.lora_merged, ("lora", "forward")),
    Line("seeds", "dropout hangs on seed and step alone", one.seeds, ("lora", "repeat")),
    Line("mesh", "all devices open as one mesh", several.mesh, ("reopen",)),
    Line("rows", "a batch is shared out by rows", several.rows, ("mesh",)),
    Line("sync", "several devices have one device's gradients", several.sync, ("rows", "reads")),
    Line("replicas", "they hold the same bits after 3 steps", several.replicas, ("sync",)),
    Line("curve", "and train as one device does", several.curve, ("replicas",)),
    # Last: where it fails, the device may be left open, and no other line could open it.
    Line("interrupt", "an interrupted step leaves the device usable", one.interrupt, ("repeat",)),
    Line("killed", "a killed process leaves it usable", one.cannot(KILLED), ("interrupt",)),
)


def bring_up(
    hw: Hardware,
    begun: Callable[[Line], None] = lambda _line: None,
    ended: Callable[[Result], None] = lambda _result: None,
    lines: Sequence[Line] | None = None,
) -> tuple[Build, list[Result]]:
    """Go through the checklist on `hw`. Raises MachineError where there is no ttml that the backend can use."""
    prepare_environment(hw, (1, 1))
    with contextlib.suppress(MachineError):  # importing ttml reads it; what is wrong with it, the line `mesh` says
        prepare_environment(hw, hw.mesh_shape)
    build = probe(hw, 1)
    results = []
    for result in go_through(LINES if lines is None else lines, Bench(hw, build), begun):
        ended(result)
        results.append(result)
    return build, results


def report(hw: Hardware, reason: str, as_json: bool, say: Callable[[str], None]) -> None:
    """Print each line as it ends, or all of them as one JSON object. Raises VerificationError if one fails."""
    if as_json:
        os.environ.setdefault("TT_LOGGER_LEVEL", "FATAL")  # tt-metal logs to standard output
        build, results = bring_up(hw)
        lines = [dataclasses.asdict(result) for result in results]
        found = {"format": FORMAT, "hw": hw.name, "why": reason, "build": build.versions(), "lines": lines}
        say(json.dumps(found, indent=1))
    else:
        say(f"bring-up of {reason}")
        results = bring_up(hw, lambda line: say(f"{line.id}: {line.says} ..."), lambda result: say(f"  {result}"))[1]
    if bad := failed(results):
        raise VerificationError(
            f"{len(bad)} of {len(results)} lines of the bring-up failed: {', '.join(bad)}",
            where=f"HW={hw.name}",
            todo="do not train here before they pass; report them with the build's versions",
        )
