"""The from-scratch recipe's step beside a bare PyTorch loop over the same model, and how fast a corpus is built.

    .venv/bin/python bench/scratch.py [--preset nanollama3_char --batch-size 64] [--compile never]

Both sides take turns, step by step, in one process: what else the machine does falls on both. Same weights, rows,
optimizer, clipping, precision, threads and compile setting; the bare side is what one writes in a notebook. It draws
its rows from memory, ours from the token files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.data import vocabulary
from common.data.build import windows
from common.data.texts import Document
from common.data.tokens import write
from common.train.plan import Plan, make_plan
from engines.registry import engine_for
from tools.data.fetch import fetch_pinned
from tools.launch.resolve import resolve
from tools.recipes import find_recipe, load_dataset

WARM_UP = 5  # steps that do not count, as in tools/runs/folder.py: compilation, caches, the first touch of memory


def bare_step(plan: Plan, compiled: bool) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return a function that takes one bare optimizer step on ids and labels, int64 [B, T], and returns its loss."""
    training = plan.config.training
    model = LlamaForCausalLM(LlamaConfig.from_dict(plan.base.architecture))
    tied = plan.base.architecture["tie_word_embeddings"]
    weights = {name: torch.from_numpy(array) for name, array in plan.base.weights().items()}
    model.load_state_dict(weights, strict=not tied)
    options = training.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        fused=True,
    )

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(ids: torch.Tensor, labels: torch.Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16-mixed"):
            loss = forward(ids, labels)
        loss.backward()
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def compare(plan: Plan, steps: int) -> dict[str, Any]:
    """Return the seconds of each step on both sides, their ratios, and their losses."""
    config, rows = plan.config, plan.dataset.train
    seconds: dict[str, list[float]] = {"recipe": [], "bare": []}
    losses: dict[str, list[float]] = {"recipe": [], "bare": []}
    with engine_for(plan.hw).open_backend(plan.hw, config) as backend:
        backend.build(plan.base.architecture)
        backend.load(plan.base.weights())
        bare = bare_step(plan, backend.info.compiled)
        for step in range(1, steps + WARM_UP + 1):
            started = time.perf_counter()
            batch = rows.batch(step, config.training.seed, config.training.batch_size)
            micro_batches = batch.split(config.accumulation)
            losses["recipe"].append(backend.train_step(micro_batches, config.training.learning_rate, step).loss)
            between = time.perf_counter()
            ids, labels = (torch.from_numpy(array.astype("int64")) for array in (batch.input_ids, batch.labels))
            losses["bare"].append(bare(ids, labels))
            seconds["recipe"].append(between - started)
            seconds["bare"].append(time.perf_counter() - between)
        compiled = backend.info.compiled
    medians = {side: statistics.median(taken[WARM_UP:]) for side, taken in seconds.items()}
    # Step by step, too: what slows the machine down for a while falls on both sides of one ratio.
    ratios = [ours / bare for ours, bare in zip(seconds["recipe"], seconds["bare"], strict=True)][WARM_UP:]
    return {
        "model": plan.base.name,
        "batch": f"{config.training.batch_size} x {plan.dataset.length}",
        "precision": config.training.precision,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "median_seconds": medians,
        "ratio_of_medians": medians["recipe"] / medians["bare"],
        "median_of_ratios": statistics.median(ratios),
        "seconds": seconds,
        "losses": losses,
    }


def building_rate(kind: str, megabytes: int, text: str) -> float:
    """Return MB of UTF-8 text a second from documents to token files, tokenizer included; the best of three."""
    document = Document("bench.txt", text * (megabytes * 1_000_000 // len(text.encode()) + 1))
    best = 0.0
    for _ in range(3):
        with tempfile.TemporaryDirectory(prefix="bench-corpus-") as folder:
            started = time.perf_counter()
            # The vocabulary of the preset pico, and rows as long as the boards'.
            made = vocabulary.train(kind, 1024, [document], Path(folder) / "tokenizer")
            tokenizer = vocabulary.load(made)
            ids = vocabulary.encode(tokenizer, kind, [document])
            splits = {"train": windows(ids, 256, tokenizer.token_to_id(vocabulary.UNKNOWN))}
            write(Path(folder) / "tokens", splits, source_key="bench", info={}, length=256)
            best = max(best, len(document.text.encode()) / 1e6 / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="nano-transformer-scratch")
    parser.add_argument("--preset", default="pico")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", choices=["always", "never"], default="always")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    overrides = (
        f"model_config.preset={given.preset}",
        f"training_config.batch_size={given.batch_size}",
        f"training_config.micro_batch_size={given.batch_size}",  # in one pass, as on the bare side
        f"device_config.compile={given.compile}",
        "data_config.tokenizer.type=" + ("bpe" if given.preset == "pico" else "char"),
    )
    launch = resolve(find_recipe(given.recipe), hw="cpu", overrides=overrides, steps=given.steps + WARM_UP)
    fetch_pinned(launch.config, launch.recipe_dir, print)
    plan = make_plan(launch, *load_dataset(launch.recipe_dir), lambda _line: None, lambda _line: None)
    result = compare(plan, given.steps)
    text = "".join(plan.tokenizer.decode(plan.dataset.train.row(row).ids[1:]) for row in range(8000))
    result["corpus_mb_per_second"] = {
        kind: building_rate(kind, size, text) for kind, size in (("char", 20), ("bpe", 4))
    }
    if given.json:
        print(json.dumps(result, indent=1))
        return
    medians = result["median_seconds"]
    print(
        f"{result['model']}, batch {result['batch']}, {result['precision']}, "
        f"{'compiled' if result['compiled'] else 'eager'}, {result['threads']} threads, {result['steps']} steps:\n"
        f"  recipe {medians['recipe']:.3f} s/step, bare loop {medians['bare']:.3f} s/step: "
        f"{result['ratio_of_medians']:.3f} (median of the ratios step by step {result['median_of_ratios']:.3f})"
    )
    for kind, rate in result["corpus_mb_per_second"].items():
        print(f"  corpus to token files, {kind}: {rate:.0f} MB/s")


if __name__ == "__main__":
    main()
