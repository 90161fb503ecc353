"""How fast this recipe trains beside trl.SFTTrainer: `make bench`. What is compared, and why it is fair: README.md.

    .venv/bin/python bench/throughput.py [--full] [--set training_config.precision=fp32] [--record]

One invocation measures both, in turns and each time in a process of its own, because a machine that is busy or warm
now may not be so in ten minutes. A few steps of each of the peer's ways, padding or packing with either attention, say
which is its fastest here; that one takes the turns with ours. `--full` trains all weights instead of adapters.
`--record` keeps the result in results/training.json and writes the README's table from it. The peer lives in
`.venv-trl`, made on first use from `requirements-trl.txt`.
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
PEER_WAYS = ("padding, sdpa", "padding, eager", "packing, sdpa", "packing, eager")  # what --mode and --attention get
PROBED = 4  # steps of each way, of which the first does not count
RESULT = BENCH / "results" / "training.json"
README = BENCH / "README.md"
BEGIN, END = "<!-- training: written by bench/throughput.py -->", "<!-- end -->"
# The sentence of the first page that quotes the ratio with adapters in bf16.
FRONT, QUOTE = ROOT / "README.md", re.compile(r"(?<=the fine-tuning recipe trains )[0-9.]+(?=\s+times as many rows)")
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
    overrides = [*arguments.set, *(["model_config.lora=null"] if arguments.full else [])]
    launch = resolve(recipe, hw="cpu", overrides=tuple(overrides), steps=total)
    fetch_pinned(launch.config, launch.recipe_dir, lambda text: print(f"bench: {text}"))
    plan = make_plan(launch, *load_dataset(recipe), lambda _: None, lambda text: print(f"bench: {text}"))
    config, rows = plan.config, plan.dataset.train
    if plan.base.initial is not None:
        raise SystemExit("bench: compares fine-tuning of a pretrained base only")
    order = [
        int(row)
        for step in range(1, total + 3)  # two steps more: packing may fill its bins better than one row after another
        for row in rows_of_step(step, config.training.seed, config.training.batch_size, len(rows))
    ]
    encoded = {row: rows.row(row) for row in sorted(set(order))}
    threads = config.device.threads or len(os.sched_getaffinity(0))
    return {
        "recipe": str(recipe),
        "set": overrides,
        "base": {"name": plan.base.name, "folder": str(plan.base.folder), "identity": plan.base.identity},
        "steps": total,
        "warmup": arguments.warmup,
        "threads": threads,
        "training": config.training.model_dump(mode="json"),
        "lora": config.model.lora.model_dump(mode="json") if config.model.lora else None,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "tokens_sha256": plan.dataset.tokens_sha256,
        "order": order,
        "rows": {
            row: {"ids": encoded[row].ids.tolist(), "mask": encoded[row].mask.tolist()} for row in sorted(encoded)
        },
    }


def measure(name: str, job: Path, peer: Path, folder: Path) -> Measured:
    """Run one side in a process of its own and read what it measured."""
    out = folder / f"{name.replace(', ', '-')}.json"
    threads = str(json.loads(job.read_text(encoding="utf-8"))["threads"])
    # By the environment, which is read before a library starts its threads; tokenizers' own would compete with them.
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT) if name == "ours" else ""}
    script: list[str | Path] = [sys.executable, BENCH / "ours.py"]
    if name != "ours":
        mode, attention = name.split(", ")
        script = [peer, BENCH / "peer_trl.py", "--mode", mode, "--attention", attention]
    # Of the last minute: what else the machine did, for whoever reads the results.
    before = os.getloadavg()[0]
    started = time.perf_counter()
    run([*script, "--job", job, "--out", out], env=env, log=out.with_suffix(".log"))
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


def fastest(sides: Mapping[str, Mapping[str, float]]) -> str:
    """Return the name of the side with most rows per second."""
    return max(sides, key=lambda name: sides[name]["rows_per_second"])


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
    lines = [" " * 20 + "".join(f"{title:>{form.split('.')[0]}}" for title, _, form in COLUMNS)]
    for name, side in sides.items():
        label = "ours" if name == "ours" else f"trl, {name}"
        lines.append(f"{label:<20}" + "".join(f"{side[key]:>{form}}" for _, key, form in COLUMNS))
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


def report(job: Job, probes: Mapping[str, Measured], runs: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Return everything that goes into the results file."""
    sides = {name: summarise(measured, job["warmup"]) for name, measured in runs.items()}
    (peer,) = (name for name in runs if name != "ours")
    what = {key: job[key] for key in ("set", "steps", "warmup", "threads", "lora", "gradient_checkpointing")}
    what |= {"base": job["base"]["name"], "identity": job["base"]["identity"], "tokens_sha256": job["tokens_sha256"]}
    training = ("batch_size", "micro_batch_size", "precision", "learning_rate", "max_grad_norm", "optimizer")
    what |= {key: job["training"][key] for key in training}
    return {
        "format": 2,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "job": what,
        "medians": sides,
        "probes": {name: summarise([measured], 1) for name, measured in probes.items()},
        "verdict": {
            "peer": peer,
            "ratio": sides["ours"]["rows_per_second"] / sides[peer]["rows_per_second"],
            "by_round": round_ratios(runs, job["warmup"], peer),
            "memory": sides["ours"]["peak_rss_mb"] / sides[peer]["peak_rss_mb"],
        },
        "versions": {name: measured[0]["versions"] for name, measured in runs.items()},
        "evidence": {name: measured[0]["evidence"] for name, measured in runs.items()},
        "floor": floor(runs["ours"], sides["ours"]["seconds_per_step"]),
        "runs": {name: list(measured) for name, measured in runs.items()},
    }


def key_of(job: Mapping[str, Any]) -> str:
    """Return the name of a comparison: what is trained, and in which precision."""
    return f"{'LoRA rank ' + str(job['lora']['rank']) if job['lora'] else 'all weights'}, {job['precision']}"


def sentence(result: Mapping[str, Any]) -> str:
    """Return where and how a comparison was measured, as one line of text."""
    job, where = result["job"], result["machine"]
    peer = result["versions"][result["verdict"]["peer"]]["trl"]
    return (
        f"{result['utc'][:10]}, {where['cores']} cores of an {where['cpu']} ({', '.join(where['flags'])}), "
        f"{job['base']}, {key_of(job)}, batch {job['batch_size']}, {job['threads']} threads, trl {peer}; "
        f"{job['steps'] - job['warmup']} steps after {job['warmup']}, in turns"
    )


def readme_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the README's text of all comparisons that are kept: a table of each, and what it says."""
    parts = []
    for key in sorted(results):
        result, decision = results[key], results[key]["verdict"]
        lines = [f"{sentence(result)}:", "", "| | rows/s | s/step | peak memory |", "| --- | --- | --- | --- |"]
        sides = [("this repository", result["medians"]["ours"])]
        sides.append((f"`trl.SFTTrainer`, {decision['peer']}", result["medians"][decision["peer"]]))
        probed = {name: side for name, side in result["probes"].items() if name != decision["peer"]}
        sides += [(f"`trl.SFTTrainer`, {name} (a few steps)", side) for name, side in probed.items()]
        for title, side in sides:
            rate, taken, peak = (side[name] for name in ("rows_per_second", "seconds_per_step", "peak_rss_mb"))
            lines.append(f"| {title} | {rate:.2f} | {taken:.2f} | {peak / 1000:.1f} GB |")
        rounds = ", ".join(f"{ratio:.2f}" for ratio in decision["by_round"])
        said = f"**{decision['ratio']:.2f} times** the rows/s (by round: {rounds})"
        said += f" in {decision['memory']:.2f} of the memory."
        if least := result.get("floor"):
            said += (
                f" Our step takes {least['step_over_floor']:.2f} times what its matrix products take by themselves: "
                f"{least['seconds']:.2f} s, {least['gflop']:.0f} GFLOP at {least['gflops']:.0f} GFLOPS."
            )
        parts.append("\n".join([*lines, "", said]))
    return "\n\n".join(parts)


def record(result: Mapping[str, Any]) -> None:
    """Keep a comparison in place of the last one of its kind, and write what the documents say from all of them."""
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    results[key_of(result["job"])] = result
    RESULT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{readme_table(results)}\n\n{END}{rest.partition(END)[2]}"
    README.write_text(text, encoding="utf-8")
    FRONT.write_text(QUOTE.sub(quoted(results), FRONT.read_text(encoding="utf-8")), encoding="utf-8")


def quoted(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the ratio that the first page quotes: with adapters in bf16, the default where there are units."""
    (ratio,) = (found["verdict"]["ratio"] for key, found in results.items() if re.match(r"LoRA.*bf16-mixed", key))
    return f"{ratio:.2f}"


def show(result: Mapping[str, Any]) -> None:
    decision, least = result["verdict"], result["floor"]
    print(f"\n{sentence(result)}\n")
    others = {name: side for name, side in result["probes"].items() if name != decision["peer"]}
    print("\n".join(table(result["medians"] | others)))
    rounds = ", ".join(f"{ratio:.2f}" for ratio in decision["by_round"])
    print(f"\nratio in rows/s, ours over trl with {decision['peer']}: {decision['ratio']:.2f} (by round: {rounds})")
    print(f"peak memory, ours over trl's: {decision['memory']:.2f}")
    print(
        f"our step is {least['step_over_floor']:.2f} times its matrix products by themselves: "
        f"{least['seconds']:.2f} s, {least['gflop']:.0f} GFLOP at {least['gflops']:.0f} GFLOPS"
    )
    for name, evidence in result["evidence"].items():
        print(f"  {name}: {json.dumps(evidence)}")
    if odd := differing(result["versions"]["ours"], result["versions"][decision["peer"]]):
        print(f"  versions differ: {'; '.join(odd)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tinyllama-finetune")
    parser.add_argument("--steps", type=int, default=8, help="steps measured in each run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that are not")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs, in turns")
    parser.add_argument("--full", action="store_true", help="train all weights instead of adapters")
    parser.add_argument("--record", action="store_true", help="keep the result, and write the README's table")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for recipe run")
    arguments = parser.parse_args()
    peer = peer_python(LOCK, PEER_VENV)
    job = make_job(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "probe.json").write_text(json.dumps(job | {"steps": PROBED}), encoding="utf-8")
        probes = {}
        for way in PEER_WAYS:
            probes[way] = measure(way, folder / "probe.json", peer, folder)
            rate = summarise([probes[way]], 1)["rows_per_second"]
            print(f"bench: trl, {way:<14}{rate:>7.2f} rows/s in {PROBED - 1} steps", flush=True)
        best = fastest({way: summarise([measured], 1) for way, measured in probes.items()})
        runs: dict[str, list[Measured]] = {"ours": [], best: []}
        for number in range(1, arguments.rounds + 1):
            for side in runs:
                measured = measure(side, folder / "job.json", peer, folder)
                runs[side].append(measured)
                rate = summarise([measured], job["warmup"])["rows_per_second"]
                load = f"load before it {measured['load_before']:.1f}"
                print(f"bench: round {number}, {side:<14}{rate:>7.2f} rows/s  ({load})", flush=True)
    result = report(job, probes, runs)
    path = BENCH / "results" / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    print(f"\nall of it: {path.relative_to(ROOT)}; Python {platform.python_version()}")
    if arguments.record:
        record(result)
        print(f"bench: {RESULT.relative_to(ROOT)} and the table in {README.relative_to(ROOT)} are written")


if __name__ == "__main__":
    main()
