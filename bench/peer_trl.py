"""The peer's side: trl.SFTTrainer on the same tokens. Runs in the peer's environment and knows nothing of ours.

The rows come as token ids with their supervision (label -100 where there is none), so both sides train the same
positions; with padding they come in the same order too, and the first step's loss must be ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


def training_set(job: dict[str, Any]) -> Dataset:
    """Return the rows of every step, one after the other, in the order in which our side takes them."""
    rows = [job["rows"][str(row)] for row in job["order"]]
    # -100 is what transformers' losses leave out (cross_entropy's ignore_index).
    labels = [[i if keep else -100 for i, keep in zip(row["ids"], row["mask"], strict=True)] for row in rows]
    return Dataset.from_dict({"input_ids": [row["ids"] for row in rows], "labels": labels})


def packed_length(job: dict[str, Any], micro_batch: int) -> int:
    """Return the tokens of a bin: as many as `micro_batch` rows have on average, so that a step takes as many rows."""
    lengths = [len(job["rows"][str(row)]["ids"]) for row in job["order"]]
    return max(max(lengths), round(micro_batch * sum(lengths) / len(lengths)))


def settings(job: dict[str, Any], mode: str, folder: str) -> SFTConfig:
    training, optimizer = job["training"], job["training"]["optimizer"]
    micro_batch = training["micro_batch_size"]
    packing = mode == "packing"
    return SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=training["precision"] == "bf16-mixed",
        per_device_train_batch_size=1 if packing else micro_batch,
        gradient_accumulation_steps=training["batch_size"] // micro_batch,
        packing=packing,
        max_length=packed_length(job, micro_batch) if packing else None,
        gradient_checkpointing=job["gradient_checkpointing"],
        max_steps=job["steps"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=optimizer["weight_decay"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["epsilon"],
        max_grad_norm=training["max_grad_norm"],
        seed=training["seed"],
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,  # in this process, as ours: a worker would take a core from the arithmetic
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Counts what each step consumed and keeps its loss; nothing else differs from SFTTrainer."""

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        step = self.state.global_step
        while len(self.consumed) <= step:
            self.consumed.append({"rows": 0, "tokens": 0, "loss": 0.0})
        if "attention_mask" in inputs:
            rows, tokens = len(inputs["input_ids"]), int(inputs["attention_mask"].sum())
        else:
            # Packed rows lie end to end, and the positions of each begin at 0 again.
            rows, tokens = int((inputs["position_ids"] == 0).sum()), inputs["position_ids"].numel()
        loss = super().training_step(model, inputs, *rest, **named)
        self.consumed[step]["rows"] += rows
        self.consumed[step]["tokens"] += tokens
        self.consumed[step]["loss"] += float(loss)
        return loss


class Clock(TrainerCallback):
    """Seconds from one step's end to the next one's: with data, forward, backward, clipping and update."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []  # of the wall, and of this process's own work (all threads)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    on_step_end = on_train_begin

    def steps(self) -> list[dict[str, float]]:
        pairs = zip(self.ends[:-1], self.ends[1:], strict=True)
        return [{"seconds": after[0] - before[0], "cpu_seconds": after[1] - before[1]} for before, after in pairs]


def watch_precision(model: Any, evidence: dict[str, Any]) -> Any:
    """Return a hook that notes, at the first forward pass, the dtypes in and out of the first layer's q_proj."""
    adapted = hasattr(model, "get_base_model")
    base = model.get_base_model() if adapted else model
    projection = base.model.layers[0].self_attn.q_proj

    def note(_module: Any, inputs: Any, output: Any) -> None:
        evidence.update(
            autocast=torch.is_autocast_enabled("cpu"),
            q_proj_in=str(inputs[0].dtype),
            q_proj_out=str(output.dtype),
            weights=str((projection.base_layer if adapted else projection).weight.dtype),
            threads=torch.get_num_threads(),
        )
        if adapted:
            evidence["adapters"] = str(projection.lora_A["default"].weight.dtype)
        hook.remove()

    hook = projection.register_forward_hook(note)
    return hook


def adapters_of(lora: dict[str, Any] | None) -> LoraConfig | None:
    """Return the adapters; None where all weights are trained."""
    if lora is None:
        return None
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )


def measure(job: dict[str, Any], mode: str, attention: str) -> dict[str, Any]:
    """Train the job's steps; return, per step, its seconds, rows, tokens and loss."""
    torch.set_num_threads(job["threads"])
    evidence: dict[str, Any] = {}
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(
                job["base"]["folder"], dtype=torch.float32, attn_implementation=attention
            ),
            processing_class=AutoTokenizer.from_pretrained(job["base"]["folder"]),
            args=settings(job, mode, folder),
            train_dataset=training_set(job),
            peft_config=adapters_of(job["lora"]),
            callbacks=[clock],
        )
        trainer.consumed = []
        watch_precision(trainer.model, evidence)
        trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    evidence |= {
        "first_loss": trainer.consumed[0]["loss"],
        "trained_parameters": trained,
        "attention": trainer.model.config._attn_implementation,
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
        "max_length": trainer.args.max_length,
    }
    packages = ("torch", "transformers", "tokenizers", "numpy", "peft", "accelerate", "datasets", "trl")
    steps = [taken | used for taken, used in zip(clock.steps(), trainer.consumed, strict=True)]
    return {
        "steps": steps,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts in KiB
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "evidence": evidence,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=("padding", "packing"), required=True)
    parser.add_argument("--attention", choices=("sdpa", "eager"), required=True)
    arguments = parser.parse_args()
    measured = measure(json.loads(arguments.job.read_text(encoding="utf-8")), arguments.mode, arguments.attention)
    arguments.out.write_text(json.dumps(measured), encoding="utf-8")
