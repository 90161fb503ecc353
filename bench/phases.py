"""Where the default run's time goes, phase by phase, here and at an earlier commit: `make bench PHASES=1`.

    .venv/bin/python -m bench.phases [--before COMMIT] [--isa avx2] [--steps 8] [--rounds 2]

The sides take turns, each run in a process of its own, on caches that a run before them has warmed. Without `--steps`
it is the whole default run. results/phases.json keeps every run by instruction set; phased.py has the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.data import unpacked
from bench.throughput import BENCH, ROOT, machine
from common.train import metrics

OUT = BENCH / "results" / "phases.json"
BEFORE = "0ef4a26"  # the last commit before the main job was made faster
RECIPE = "tinyllama-finetune"
# What stands in for a machine without bf16 units: each library is told of no more than AVX2, and fp32 is what
# `precision: auto` means there.
ISAS: Mapping[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "native": ({}, ()),
    "avx2": (
        {"DNNL_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        ("training_config.precision=fp32",),
    ),
}
Measured = dict[str, Any]


def measured(tree: Path, words: Sequence[str], variables: Mapping[str, str], out: Path) -> Measured:
    """Run `recipe run` of the code in `tree` below the folder `out`; return phases, held-out losses and answers."""
    load = os.getloadavg()[0]
    place = {"PYTHONPATH": str(tree), "PHASES": str(out / "phases.json")}
    command = [sys.executable, str(BENCH / "phased.py"), "run", *words, "--out", str(out / "runs"), "--resume", "never"]
    started = time.perf_counter()
    environment = {**os.environ, **variables, **place, "STARTED": str(started)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    found: Measured = json.loads((out / "phases.json").read_text(encoding="utf-8"))
    found["phases"]["end of the process"] = {"seconds": seconds - found.pop("until"), "calls": 1}
    run = next((out / "runs").glob("*/manifest.json")).parent
    records = [record for record in metrics.read(run / "metrics.jsonl") if "eval_loss" in record]
    samples = [[s["answer"] for s in record["samples"]] for record in metrics.read(run / "evaluations.jsonl")]
    facts = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "seconds_to_the_first_evaluation": found["first"].get("step-0 evaluation"),
        "seconds_to_the_first_step": found["first"].get("steps"),
        "load": load,
        "held_out": [{key: record[key] for key in ("step", "eval_loss", "eval_loss_se")} for record in records],
        "peak_memory_mib": facts["peak_memory_mib"],
        "precision": facts["backend"]["precision"],
        "threads": facts["backend"]["threads"],
        "phases": found["phases"],
        "answers": samples,
    }


def summary(runs: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Return medians by side, what they are to each other, and how many answers are the same letter for letter."""
    sides = {side: medians(found) for side, found in runs.items()}
    keys = ("seconds", "seconds_to_the_first_evaluation", "seconds_to_the_first_step", "peak_memory_mib")
    before, now = runs["before"][0], runs["now"][0]
    pairs = [
        (ours, theirs)
        for mine, old in zip(now["answers"], before["answers"], strict=True)
        for ours, theirs in zip(mine, old, strict=True)
    ]
    losses = [
        (ours["eval_loss"], old["eval_loss"]) for ours, old in zip(now["held_out"], before["held_out"], strict=True)
    ]
    return {
        "sides": sides,
        "now_over_before": {key: sides["now"][key] / sides["before"][key] for key in keys},
        "held_out_moved_by": max(abs(ours - old) for ours, old in losses),
        "answers_alike": [sum(ours == old for ours, old in pairs), len(pairs)],
    }


def medians(runs: Sequence[Measured]) -> dict[str, Any]:
    """Return the medians of a side's runs: seconds by phase, of the whole, to the first evaluation and step."""
    keys = ("seconds", "seconds_to_the_first_evaluation", "seconds_to_the_first_step", "peak_memory_mib")
    names = dict.fromkeys(name for run in runs for name in run["phases"])
    phases = {n: statistics.median(run["phases"].get(n, {"seconds": 0.0})["seconds"] for run in runs) for n in names}
    return {**{key: statistics.median(run[key] for run in runs) for key in keys}, "phases": phases}


def table(found: Mapping[str, Any]) -> list[str]:
    """Return the medians as text: a line a phase, the longest before this commit first, and what they come to."""
    before, now = (found["sides"][side] for side in ("before", "now"))
    names = sorted(before["phases"] | now["phases"], key=lambda name: -before["phases"].get(name, 0.0))
    lines = [f"{'seconds':<36}{'before':>9}{'now':>9}"]
    for name in names:
        lines.append(f"{name:<36}{before['phases'].get(name, 0.0):>9.2f}{now['phases'].get(name, 0.0):>9.2f}")
    for key, ratio in found["now_over_before"].items():
        lines.append(f"{key.replace('_', ' '):<36}{before[key]:>9.2f}{now[key]:>9.2f}  {ratio:.2f} times")
    alike, answers = found["answers_alike"]
    lines.append(f"held-out losses moved by {found['held_out_moved_by']:.1e} nats at most; ")
    lines[-1] += f"{alike} of {answers} answers are the same"
    return lines


def main() -> None:
    """Measure both sides in turns, print what each phase took, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="what to compare with")
    parser.add_argument("--isa", choices=ISAS, default="native", help="avx2 stands in for a machine without bf16 units")
    parser.add_argument("--steps", type=int, help="in place of the recipe's own number")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for recipe run")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    variables, settings = ISAS[asked.isa]
    words = [asked.recipe, "--hw", "cpu"]
    words += [word for setting in (*settings, *asked.set) for word in ("--set", setting)]
    words += ["--steps", str(asked.steps)] * (asked.steps is not None)
    runs: dict[str, list[Measured]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory(prefix="phases-") as scratch:
        trees = {"before": unpacked(asked.before, Path(scratch) / "tree"), "now": ROOT}
        for number in range(asked.rounds):
            for side, tree in trees.items():
                (out := Path(scratch) / f"{side}-{number}").mkdir()
                runs[side].append(measured(tree, words, variables, out))
                print(f"bench: round {number + 1}, {side}: {runs[side][-1]['seconds']:.1f} s", flush=True)
    found = summary(runs)
    print("\n".join(table(found)))
    kept: dict[str, Any] = {"format": 1, "by_isa": {}}
    if asked.out.is_file():
        kept = json.loads(asked.out.read_text(encoding="utf-8"))
    for run in (*runs["before"], *runs["now"]):
        del run["answers"]  # counted above
    kept["by_isa"][asked.isa] = {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "before": asked.before,
        "command": ["recipe", "run", *words],
        "variables": dict(variables),
        **found,
        "runs": runs,
    }
    asked.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
