"""How fast this recipe trains beside trl.SFTTrainer: `make bench`. What is compared, and why it is fair: README.md.

One invocation measures both, in turns and each time in a process of its own, because a machine that is busy or warm
now may not be so in ten minutes. The peer lives in `.venv-trl`, made on first use from `requirements-trl.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
LOCK = BENCH / "requirements-trl.txt"
PEER_VENV = ROOT / ".venv-trl"
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")  # as in ci/setup.sh
PEER_MODES = ("padding", "packing")
SAME_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")
Job = dict[str, Any]
Measured = dict[str, Any]


# --- the peer's environment -------------------------------------------------------------------------------------------


def torch_requirement(lock: str) -> str:
    """Return the lock's torch line with its hashes: installed first and alone, from the index that has CPU builds."""
    found = re.search(r"^torch==\S+(?:.*\\\n)*.*\n", lock, re.MULTILINE)
    if found is None:
        raise SystemExit("the peer's lock names no torch")
    return found[0]


def stamp_of(lock: str, python: str) -> str:
    """Return a hash that changes when the peer's environment must be made again."""
    return hashlib.sha256(f"{python}\n{lock}".encode()).hexdigest()


def peer_python(path: Path, venv: Path) -> Path:
    """Return the interpreter of a peer's environment, which is made from the lock at `path` unless it is up to date."""
    python, stamp = venv / "bin" / "python", venv / "bench.stamp"
    lock, version = path.read_text(encoding="utf-8"), platform.python_version()
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == stamp_of(lock, version):
        return python
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(f"the peer's lock is for Python 3.11, this is {version}: make setup PYTHON=python3.11 first")
    print(f"bench: making the peer's environment in {venv.name} (once, minutes)", flush=True)
    stamp.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", venv])
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "install",
        "--quiet",
        "--no-deps",
    ]
    pip += ["--require-hashes", "--only-binary", ":all:"]
    torch = venv / "torch.txt"
    torch.write_text(torch_requirement(lock), encoding="utf-8")
    index = ["--extra-index-url", TORCH_INDEX] if TORCH_INDEX else []
    run([*pip, "--retries", "1", "--timeout", "10", *index, "-r", torch])
    run([*pip, "-r", path])
    stamp.write_text(stamp_of(lock, version), encoding="utf-8")
    return python


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None, log: Path | None = None) -> None:
    """Run a command to its end. With `log` its output goes there, and its end is shown when the command fails."""
    words = [str(part) for part in command]
    if log is None:
        code = subprocess.run(words, env=env, check=False).returncode
    else:
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(words, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            print(log.read_text(encoding="utf-8")[-3000:], file=sys.stderr)
    if code:
        raise SystemExit(f"bench: `{' '.join(words)}` ended with {code}")


# --- the job ----------------------------------------------------------------------------------------------------------


def make_job(arguments: argparse.Namespace) -> Job:
    """Return everything that both sides must have in common, from the recipe's own config and rows."""
    from common.data.order import rows_of_step
    from common.train.plan import make_plan
    from tools.data.fetch import fetch_pinned
    from tools.launch.resolve import resolve
    from tools.recipes import find_recipe, load_dataset

    total = arguments.warmup + arguments.steps
    recipe = find_recipe(arguments.recipe)
    launch = resolve(recipe, hw="cpu", overrides=tuple(arguments.set), steps=total)
    fetch_pinned(launch.config, launch.recipe_dir, lambda text: print(f"bench: {text}"))
    plan = make_plan(launch, *load_dataset(recipe), lambda _: None, lambda text: print(f"bench: {text}"))
    config, rows = plan.config, plan.dataset.train
    if config.model.lora is None:
        raise SystemExit("bench: compares LoRA fine-tuning of a pretrained base only")
    order = [
        int(row)
        for step in range(1, total + 3)  # two steps more: packing may fill its bins better than one row after another
        for row in rows_of_step(step, config.training.seed, config.training.batch_size, len(rows))
    ]
    encoded = {row: rows.row(row) for row in sorted(set(order))}
    threads = config.device.threads or len(os.sched_getaffinity(0))
    return {
        "recipe": str(recipe),
        "set": list(arguments.set),
        "base": {"name": plan.base.name, "folder": str(plan.base.folder), "identity": plan.base.identity},
        "steps": total,
        "warmup": arguments.warmup,
        "threads": threads,
        "training": config.training.model_dump(mode="json"),
        "lora": config.model.lora.model_dump(mode="json"),
        "peer_attention": arguments.peer_attention,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "tokens_sha256": plan.dataset.tokens_sha256,
        "order": order,
        "rows": {
            row: {"ids": encoded[row].ids.tolist(), "mask": encoded[row].mask.tolist()} for row in sorted(encoded)
        },
    }


def measure(name: str, job: Path, peer: Path, folder: Path) -> Measured:
    """Run one side in a process of its own and read what it measured."""
    out = folder / f"{name}.json"
    threads = str(json.loads(job.read_text(encoding="utf-8"))["threads"])
    # By the environment, which is read before a library starts its threads; tokenizers' own would compete with them.
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT) if name == "ours" else ""}
    script: list[str | Path] = [sys.executable, BENCH / "ours.py"]
    if name != "ours":
        script = [peer, BENCH / "peer_trl.py", "--mode", name]
    # Of the last minute: what else the machine did, for whoever reads the results.
    before = os.getloadavg()[0]
    started = time.perf_counter()
    run([*script, "--job", job, "--out", out], env=env, log=folder / f"{name}.log")
    measured: Measured = json.loads(out.read_text(encoding="utf-8"))
    measured |= {"load_before": before, "process_seconds": time.perf_counter() - started}
    return measured


# --- the numbers ------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Measured], warmup: int) -> dict[str, float]:
    """Return the medians over the steps after warm-up, all rounds together.

    A step's rate is what it consumed over what it took, so that packed steps, whose rows differ in number, count right.
    """
    steps = [step for measured in runs for step in measured["steps"][warmup:]]
    if not steps:
        raise ValueError("no step is left after warm-up")
    return {
        "seconds_per_step": statistics.median(step["seconds"] for step in steps),
        "rows_per_second": statistics.median(step["rows"] / step["seconds"] for step in steps),
        "tokens_per_second": statistics.median(step["tokens"] / step["seconds"] for step in steps),
        "cpu_seconds_per_row": statistics.median(step["cpu_seconds"] / step["rows"] for step in steps),
        "rows_per_step": statistics.fmean(step["rows"] for step in steps),
        "slowest_step": max(step["seconds"] for step in steps),
        "fastest_step": min(step["seconds"] for step in steps),
        "peak_rss_mb": max(measured["peak_rss_mb"] for measured in runs),
        "steps_measured": len(steps),
    }


def verdict(sides: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the ratio of ours to the faster of the peer's modes, in rows per second."""
    rates = {name: side["rows_per_second"] for name, side in sides.items() if name != "ours"}
    best = max(rates, key=lambda name: rates[name])
    return {"peer": best, "ratio": sides["ours"]["rows_per_second"] / rates[best]}


def round_ratios(runs: Mapping[str, Sequence[Measured]], warmup: int, peer: str) -> list[float]:
    """Return the ratio of each round alone: how far they lie apart says how quiet the machine was."""
    pairs = zip(runs["ours"], runs[peer], strict=True)
    rates = [[summarise([side], warmup)["rows_per_second"] for side in pair] for pair in pairs]
    return [ours / theirs for ours, theirs in rates]


def floor(ours: Sequence[Measured], seconds_per_step: float) -> dict[str, float]:
    """Return the matrix products of our last step: 1e9 operations, their rate and seconds, and our step over these."""
    least = min(measured["floor"]["seconds"] for measured in ours)
    work = ours[0]["floor"]["gflop"]
    return {"gflop": work, "gflops": work / least, "seconds": least, "step_over_floor": seconds_per_step / least}


COLUMNS = (
    ("rows/s", "rows_per_second", "9.2f"),
    ("tokens/s", "tokens_per_second", "10.0f"),
    ("s/step", "seconds_per_step", "9.3f"),
    ("fastest", "fastest_step", "9.3f"),
    ("slowest", "slowest_step", "9.3f"),
    ("rows/step", "rows_per_step", "11.2f"),
    ("CPU s/row", "cpu_seconds_per_row", "11.3f"),
    ("peak MB", "peak_rss_mb", "9.0f"),
)


def table(sides: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the medians as text: a head and one line a side."""
    lines = [" " * 14 + "".join(f"{title:>{form.split('.')[0]}}" for title, _, form in COLUMNS)]
    for name, side in sides.items():
        label = "ours" if name == "ours" else f"trl, {name}"
        lines.append(f"{label:<14}" + "".join(f"{side[key]:>{form}}" for _, key, form in COLUMNS))
    return lines


def machine() -> dict[str, Any]:
    """Return what the numbers were taken on; no name of the machine."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    flags = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(info.split()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    virtual = "hypervisor" in info.split()
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": flags,
        "memory_gib": round(memory, 1),
        "virtual": virtual,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def differing(ours: Mapping[str, str], peer: Mapping[str, str]) -> list[str]:
    """Return the packages both sides use, in versions that differ."""
    return [f"{name} {ours.get(name)} / {peer.get(name)}" for name in SAME_PACKAGES if ours.get(name) != peer.get(name)]


def report(job: Job, runs: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Return everything that goes into the results file."""
    sides = {name: summarise(measured, job["warmup"]) for name, measured in runs.items()}
    result = verdict(sides)
    what = {key: job[key] for key in ("set", "steps", "warmup", "threads", "lora", "gradient_checkpointing")}
    what |= {"base": job["base"]["name"], "identity": job["base"]["identity"], "tokens_sha256": job["tokens_sha256"]}
    training = ("batch_size", "micro_batch_size", "precision", "learning_rate", "max_grad_norm", "optimizer")
    what |= {key: job["training"][key] for key in training}
    return {
        "format": 1,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "job": what,
        "medians": sides,
        "verdict": result | {"by_round": round_ratios(runs, job["warmup"], result["peer"])},
        "versions": {name: measured[0]["versions"] for name, measured in runs.items()},
        "evidence": {name: measured[0]["evidence"] for name, measured in runs.items()},
        "floor": floor(runs["ours"], sides["ours"]["seconds_per_step"]),
        "runs": {name: list(measured) for name, measured in runs.items()},
    }


def show(result: Mapping[str, Any], peer_version: str) -> None:
    job, where, decision = result["job"], result["machine"], result["verdict"]
    print(f"\n{where['cpu']}, {where['cores']} cores ({', '.join(where['flags'])}), {where['memory_gib']} GiB")
    print(
        f"{job['base']}, LoRA rank {job['lora']['rank']}, {job['precision']}, batch {job['batch_size']}, "
        f"{job['threads']} threads; trl {peer_version}; {job['steps'] - job['warmup']} steps after {job['warmup']}\n"
    )
    print("\n".join(table(result["medians"])))
    rounds = ", ".join(f"{ratio:.2f}" for ratio in decision["by_round"])
    print(f"\nratio in rows/s, ours over trl with {decision['peer']}: {decision['ratio']:.2f} (by round: {rounds})")
    least = result["floor"]
    print(
        f"our step is {least['step_over_floor']:.2f} times its matrix products by themselves: "
        f"{least['seconds']:.2f} s, {least['gflop']:.0f} GFLOP at {least['gflops']:.0f} GFLOPS"
    )
    for name, evidence in result["evidence"].items():
        print(f"  {name}: {json.dumps(evidence)}")
    if odd := differing(result["versions"]["ours"], result["versions"][PEER_MODES[0]]):
        print(f"  versions differ: {'; '.join(odd)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tinyllama-finetune")
    parser.add_argument("--steps", type=int, default=12, help="steps measured in each run")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them that are not")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turns")
    parser.add_argument("--peer-attention", default="sdpa", choices=("sdpa", "eager"), help="its default is sdpa")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for recipe run")
    arguments = parser.parse_args()
    peer = peer_python(LOCK, PEER_VENV)
    job = make_job(arguments)
    runs: dict[str, list[Measured]] = {name: [] for name in ("ours", *PEER_MODES)}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        for number in range(1, arguments.rounds + 1):
            for side in runs:
                measured = measure(side, folder / "job.json", peer, folder)
                runs[side].append(measured)
                rate = summarise([measured], job["warmup"])["rows_per_second"]
                load = f"load before it {measured['load_before']:.1f}"
                print(f"bench: round {number}, {side:<8}{rate:>7.2f} rows/s  ({load})", flush=True)
    result = report(job, runs)
    path = BENCH / "results" / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, runs[PEER_MODES[0]][0]["versions"]["trl"])
    print(f"\nall of it: {path.relative_to(ROOT)}; Python {platform.python_version()}")


if __name__ == "__main__":
    main()
