"""Does an export compute what the run computed? Asked of plain transformers and plain PEFT, on the held-out rows.

Nothing of the engine is used here: rows go through the loaded models in fp32, by transformers' own calls.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.data.tokens import Encoded, TokenSplit, spread
from common.errors import DataError
from common.model.llama import HEAD, PREFIX
from common.model.weights import Shapes, Weights
from common.train.evaluate import HeldOut, from_rows, held_out
from tools.export.hf_folder import merged_shapes
from tools.runs import trained
from tools.runs.trained import TrainedRun

if TYPE_CHECKING:
    import torch

# Nats per token between the export's held-out loss and the run's. On the run of `recipe verify calibrate` (a CPU, fp32)
# a sound export was 2e-8 apart, in bf16 3e-5; K and V swapped were 0.42, RoPE rows swapped 0.010 apart, which the bound
# for fp32 sees and the one for bf16 would not: so what needs no rounding is held to fp32's.
ALLOWED = {"fp32": 1e-3, "bf16": 0.02}
CHECKED_ROWS = 64  # a larger held-out set is sampled evenly: parity shows on any rows, and the check stays short
AT_ONCE = 4  # rows at most, and so few that a logit for each of their tokens and words stays within LOGITS
LOGITS = 1 << 26  # 256 MB in fp32: one row of 500 tokens over Llama 3's 128,256 words, four of 340 over 49,152


@dataclass
class ExportCheck:
    """`status` is verified, unverified (could not be measured here) or failed; `reason` says why if not verified."""

    status: str
    reason: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    run_loss: float | None = None
    compared_with: str = ""
    rows: int = 0
    held_out_rows: int = 0
    seconds: float = 0.0

    @property
    def difference(self) -> dict[str, float]:
        return {name: abs(loss - (self.run_loss or 0.0)) for name, loss in self.losses.items()}

    def record(self) -> dict[str, Any]:
        """Return what export.json holds of the check."""
        values = {key: value for key, value in vars(self).items() if key not in ("status", "reason")}
        found = {"verified": self.status == "verified", "status": self.status, "reason": self.reason}
        return {**found, "check": {**values, "difference": self.difference}}

    def line(self) -> str:
        """Return what was measured, in one line."""
        if not self.losses:
            return f"{self.status}: {self.reason}"
        parts = ", ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
        sample = "" if self.rows == self.held_out_rows else f" on {self.rows} of {self.held_out_rows} held-out rows"
        worst = max(self.difference, key=lambda name: self.difference[name])
        return (
            f"{self.status}: held-out loss {parts}, the run's own {self.run_loss:.4f}{sample}; difference "
            f"{self.difference[worst]:.1e}, allowed {self.allowed[worst]:g} ({self.seconds:.0f} s)"
        )


def check(folder: Path, run: TrainedRun, dtype: str) -> ExportCheck:
    """Check the export in `folder`: names and shapes, tokenizer, then the held-out loss of each model in it."""
    started = time.perf_counter()
    if faults := file_faults(folder, run):
        return ExportCheck("failed", "; ".join(faults[:5]))
    if missing := missing_packages():
        return ExportCheck("unverified", f"names and shapes were checked, the loss was not: no {missing} here")
    if faults := tokenizer_faults(folder / "merged", run):
        return ExportCheck("failed", faults[0])
    try:
        split = run.held_out_split()
    except DataError as error:
        return ExportCheck("unverified", f"the run's held-out rows are not here: {error.what}")
    if not len(split):
        return ExportCheck("unverified", "the run has no held-out rows")
    outcome = measure(folder, run, dtype, split)
    outcome.seconds = time.perf_counter() - started
    return outcome


def measure(folder: Path, run: TrainedRun, dtype: str, split: TokenSplit) -> ExportCheck:
    """Compare the held-out loss of each model of the export with the run's own, over the same rows."""
    rows = spread(len(split), CHECKED_ROWS).tolist()
    own, compared_with = run_evaluation(run)
    chosen = HeldOut(own.nll[rows], own.tokens[rows])
    outcome = ExportCheck(
        "verified",
        run_loss=chosen.loss,
        compared_with=compared_with,
        rows=len(rows),
        held_out_rows=len(split),
    )
    for name in ("merged", "adapter"):
        if not (folder / name).is_dir():
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers deprecate
                model = load_adapter(folder / name, run) if name == "adapter" else load_plain(folder / name)
        except Exception as error:  # whatever the libraries raise: a user would meet it, too
            return replace(
                outcome, status="failed", reason=f"{name}/ cannot be loaded: {type(error).__name__}: {error}"
            )
        found = plain_nll(model, split, rows)
        del model
        gc.collect()  # before the next one is loaded: two models at once may not fit
        outcome.losses[name] = found.loss
        # The adapter is the run's, bit for bit, over the base as the run held it: no rounding is its excuse, unless
        # the run's own loss was computed in bf16, as a board computes it.
        exact = dtype == "fp32" or name == "adapter"
        outcome.allowed[name] = ALLOWED["fp32" if exact and run.evaluated_in == "fp32" else "bf16"]
        if not np.array_equal(found.tokens, chosen.tokens):
            outcome.status, outcome.reason = (
                "failed",
                "the held-out rows have other tokens than the run evaluated",
            )
        elif not outcome.difference[name] <= outcome.allowed[name]:  # a NaN is no pass
            outcome.status = "failed"
            outcome.reason = (
                f"{name}/ has a held-out loss of {found.loss:.6f}, the run measured {chosen.loss:.6f}: "
                f"{outcome.difference[name]:.2g} apart, {outcome.allowed[name]:g} is allowed"
            )
    return outcome


def run_evaluation(run: TrainedRun) -> tuple[HeldOut, str]:
    """Return the run's own evaluation of the exported step, made now if it is not there, and where it stands."""
    if (recorded := run.held_out(run.step)) is not None:
        return recorded, f"evaluations.jsonl, step {run.step}"
    with trained.engine(run) as backend:
        return held_out(backend, run.held_out_split()), f"the engine at step {run.step}, which the run did not evaluate"


def plain_nll(model: torch.nn.Module, split: TokenSplit, rows: Sequence[int]) -> HeldOut:
    """Return per row the sum of -log p(token | tokens before) over supervised tokens, and their number.

    What all rows begin with is computed once, then handed to transformers as the cache of a text begun.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    encoded = [split.row(index) for index in rows]
    ids = [torch.from_numpy(row.ids.astype(np.int64)) for row in encoded]
    masks = [torch.from_numpy(row.mask.astype(bool)) for row in encoded]
    shared = begun_alike(encoded)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    with torch.inference_mode():
        begun = model(input_ids=ids[0][None, :shared], use_cache=True).past_key_values if shared else None
        config: Any = model.config
        for chosen in together([len(row) - shared for row in ids], config.vocab_size):
            past = copy.deepcopy(begun)
            if past is not None:
                past.batch_repeat_interleave(len(chosen))
            # Filled on the right: attention is causal, so that nothing behind a row's end has an effect on it.
            tokens = pad_sequence([ids[at][shared:] for at in chosen], batch_first=True)  # [B, n]
            counted = pad_sequence([masks[at][shared:] for at in chosen], batch_first=True)[:, 1:]
            predicted = counted.any(dim=0).nonzero()[:, 0]  # [N]; position p predicts token p + 1
            # The head computes the supervised positions alone: [B, N, V], not a row for each token.
            cached = {"past_key_values": past, "use_cache": past is not None, "logits_to_keep": predicted}
            logits = model(input_ids=tokens[:, :-1], **cached).logits.float()
            labels = tokens[:, 1:][:, predicted]
            # The vocabulary is the last axis: over another one torch 2.13 sums so that 49,152 ids lose 1.5e-4 a token.
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            nll = nll.view_as(labels)  # [B, N]
            sums[chosen] = (nll.double() * counted[:, predicted]).sum(dim=1)
    return from_rows(sums.tolist(), [int(mask[1:].sum()) for mask in masks])


def together(lengths: Sequence[int], vocabulary: int) -> Iterator[list[int]]:
    """Yield which rows to compute at once, by length, so that few places are filled: AT_ONCE and LOGITS bound them."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if len(group) == AT_ONCE or (group and (len(group) + 1) * lengths[row] * vocabulary > LOGITS):
            yield group
            group = []
        group.append(row)
    yield group


def begun_alike(rows: Sequence[Encoded]) -> int:
    """Return how many tokens all rows begin with, none of which predicts a supervised one."""
    shortest = min(len(row.ids) for row in rows)
    same = (np.stack([row.ids[:shortest] for row in rows]) == rows[0].ids[:shortest]).all(axis=0)
    free = ~np.stack([row.mask[:shortest] for row in rows]).any(axis=0)
    # The last token of the beginning predicts the one behind it: that one must be no label either.
    return max(0, min(int(same.cumprod().sum()), int(free.cumprod().sum()) - 1))


def load_adapter(folder: Path, run: TrainedRun) -> torch.nn.Module:
    """Return the adapter over its base, rounded to the precision that the run stored and widened to fp32."""
    import peft

    base = load_plain(run.base.folder, half=run.config.training.precision == "bf16")
    model: torch.nn.Module = peft.PeftModel.from_pretrained(base, str(folder))
    return model.float().eval()


def load_plain(folder: Path, half: bool = False) -> torch.nn.Module:
    """Return the model of a Hugging Face folder in fp32, as a user loads it; with `half`, rounded to bf16 before."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if half else torch.float32
    )
    return model.float().eval()


def tokenizer_faults(folder: Path, run: TrainedRun) -> list[str]:
    """Return a line for each prompt of which AutoTokenizer makes other ids than the run did."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    system = run.config.data.system_prompt
    before = [{"role": "system", "content": system}] if system else []
    record = (run.evaluations or [{"samples": []}])[-1]
    faults = []
    for prompt in [sample["prompt"] for sample in record["samples"]] or ["Hello!"]:
        turns = [*before, {"role": "user", "content": prompt}]
        if run.tokenizer.template:
            ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        else:
            ids = theirs(prompt)["input_ids"]
        if list(ids) != run.tokenizer.prompt_ids(prompt, system):
            faults.append(f"AutoTokenizer makes other tokens of the prompt {prompt!r} than the run did")
    return faults


def file_faults(folder: Path, run: TrainedRun) -> list[str]:
    """Return tensors that are missing, unknown or misshapen in the merged model and the adapter."""
    expected = {"merged/model.safetensors": merged_shapes(run)}
    if run.config.model.lora:
        expected["adapter/adapter_model.safetensors"] = adapter_shapes(run)
    faults = []
    for name, shapes in expected.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
            continue
        found = Weights([folder / name]).shapes
        faults += [f"{name}: {tensor} is missing" for tensor in shapes if tensor not in found]
        faults += [f"{name}: {tensor} is unknown" for tensor in found if tensor not in shapes]
        faults += [
            f"{name}: {tensor} is {found[tensor]}, expected {shape}"
            for tensor, shape in shapes.items()
            if tensor in found and found[tensor] != shape
        ]
    return faults


def adapter_shapes(run: TrainedRun) -> Shapes:
    """Return names and shapes of the adapter that the config asks for."""
    lora = run.config.model.lora
    assert lora is not None
    shapes: Shapes = {}
    for name, shape in merged_shapes(run).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in lora.target_modules and name != HEAD:
            shapes[f"{PREFIX}{layer}.lora_A.weight"] = (lora.rank, shape[1])
            shapes[f"{PREFIX}{layer}.lora_B.weight"] = (shape[0], lora.rank)
    return shapes


def missing_packages() -> str:
    """Return which of the packages that load an export are not here; empty where all are."""
    return ", ".join(name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None)
