"""What a lot of data costs: rows/s to token files, seconds of a check, and memory, here and at an earlier commit.

    .venv/bin/python -m bench.data [--before COMMIT] [--rows 1000000]

The sides take turns, each measurement in a process of its own; results/data.json has every one, and README.md beside
this file what was asked, seen and met. The rows are made up: 100 tokens each, words drawn as languages have them (the
n-th most frequent one in proportion to 1/(n + 5)).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import serving
from bench.throughput import machine
from tools.data.fetch import base_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "data.json"
BEGIN = "<!-- data: written by bench/data.py -->"
BEFORE = "871dfab"  # the last commit that tokenized a row at a time
WORDS = 3_300
# What one process does: `work` is build (rows held out by their prompt, as a recipe does), warm (what a training does
# until its first batch, once tokens are there), check, or floor (the library's own encode_batch of the rows' texts, on
# all cores, and their ids as numbers). Written so that it runs in both trees.
CHILD = """
import json, sys, time
from pathlib import Path
work, rows_file, base, made = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
from common.config.schema import Data
from common.data import build, tokens
from common.data.chat import ChatTokenizer
from common.data.rows import groups_of, hold_out, read_rows
from tools.data import checks
try:
    from tools.data import workers
    faster = [lambda tokenizer, rows, options, name: workers.encode_rows(tokenizer, rows, options), made.parent]
except ImportError:
    faster = []
tokenizer, facts = ChatTokenizer.load(base), {}
start = time.perf_counter()
rows = read_rows(rows_file)
facts["read_seconds"] = time.perf_counter() - start
if work in ("build", "warm"):
    groups = groups_of(rows, None)
    held = hold_out(groups, 0.05)
    parts = {
        "train": [row for row, group in zip(rows, groups) if group not in held],
        "held_out": [row for row, group in zip(rows, groups) if group in held],
    }
    del groups
    for part in parts.values():
        build.rows_sha256(part)
if work == "check":
    facts["findings"] = len(checks.check({"train": rows}).findings)
elif work == "warm":
    train = tokens.TokenDataset.open(made).train
    train.batch(1, 0, 32)
elif work == "floor":
    texts = [tokenizer.render(row.messages) for row in rows]
    start = time.perf_counter()
    for at in range(0, len(texts), 1024):
        found = [one.ids for one in tokenizer.library.encode_batch(texts[at : at + 1024], add_special_tokens=False)]
else:
    splits, info = build.of_rows(Data(source="rows"), parts, tokenizer, *faster)
    done = tokens.write(made, splits, source_key="bench", info=info)
    facts |= {"tokens": done.train.tokens, "tokens_sha256": done.tokens_sha256}
facts["seconds"] = time.perf_counter() - start
facts["rows_per_second"] = len(rows) / facts["seconds"]
if work == "warm":
    start = time.perf_counter()
    for step in range(2, 102):
        train.batch(step, 0, 32)
    facts["batch_ms"] = (time.perf_counter() - start) * 10
print(json.dumps(facts))
"""


def write_rows(path: Path, count: int) -> None:
    """Write `count` rows as JSONL: the same ones every time."""
    draw = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randint(2, 8))) for _ in range(WORDS)]
    weights = list(itertools.accumulate(1 / (at + 5) for at in range(WORDS)))
    with path.open("w", encoding="utf-8") as file:
        for at in range(count):
            prompt, response = (" ".join(draw.choices(words, cum_weights=weights, k=size)) for size in (9, 13))
            file.write(json.dumps({"prompt": f"{prompt} {at}?", "response": f"{response}."}) + "\n")


def measured(tree: Path, work: str, rows: Path, base: Path, made: Path) -> dict[str, Any]:
    """Return what one process of the code in `tree` says of `work` on `rows`, and the memory that it took, in MiB.

    That is the most that it and its own processes held together, twice a second: `memory_mib` with what of files was
    mapped, `own_memory_mib` without.
    """
    command = [sys.executable, "-c", CHILD, work, str(rows), str(base), str(made)]
    most = {"memory_mib": 0.0, "own_memory_mib": 0.0}
    with subprocess.Popen(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True
    ) as child:
        while child.poll() is None:
            now = [memory(pid) for pid in (child.pid, *children(child.pid))]
            most = {key: max(most[key], sum(one[at] for one in now)) for at, key in enumerate(most)}
            time.sleep(0.5)
        assert child.stdout is not None
        found: dict[str, Any] = {**json.loads(child.stdout.read()), **most}
    return found


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that are still there."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def memory(pid: int) -> tuple[float, float]:
    """Return a process's share of the memory (PSS) in MiB: all of it, and what no file has."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0, 0.0
    found = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return int(found.get("Pss", 0)) / 1024, int(found.get("Pss_Anon", 0)) / 1024


def unpacked(commit: str, folder: Path) -> Path:
    """Write the tree of a commit to `folder`; return it."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def checks_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was seen, each {what, value, limit, met}: medians over rounds; met is None where none is asked."""
    small, middle, rows, commit = result["small"], result["middle"], result["rows"], result["before"]

    def seen(side: str, work: str, count: int, key: str) -> list[Any]:
        return [run[key] for run in result["runs"] if (run["side"], run["work"], run["rows"]) == (side, work, count)]

    def median(*which: Any) -> float:
        return float(statistics.median(seen(*which)))

    built, then = (median(side, "build", small, "rows_per_second") for side in ("now", "before"))
    checked, check = (median("now", "check", count, "seconds") for count in (small, middle))
    hashes = {one for side in ("now", "before") for one in seen(side, "build", small, "tokens_sha256")}
    memory = max(seen("now", "build", rows, "own_memory_mib")) * 1.048576
    start, batch = median("now", "warm", rows, "seconds"), median("now", "warm", rows, "batch_ms")
    found: list[tuple[str, float, str, bool | None]] = [
        (f"rows/s to token files, {small:,} rows, commit {commit}", then, "", None),
        (f"rows/s to token files, {small:,} rows", built, "", None),
        (f"times commit {commit}'s", built / then, "at least 8", built / then >= 8),
        ("different token files of the two, over all rounds", len(hashes), "1", len(hashes) == 1),
        ("rows/s of the library's own `encode_batch`", median("now", "floor", small, "rows_per_second"), "", None),
        (f"rows/s to token files, {rows:,} rows", median("now", "build", rows, "rows_per_second"), "", None),
        (
            f"MB of memory for that, all processes, mapped files left out; {rows:,} rows",
            memory,
            "at most 500",
            memory <= 500,
        ),
        (f"seconds until a training has its first batch, {rows:,} rows", start, "at most 10", start <= 10),
        (f"ms of the loop for a batch of 32, {rows:,} rows", batch, "below 1", batch < 1),
        (f"seconds of a check, {small:,} rows, commit {commit}", median("before", "check", small, "seconds"), "", None),
        (f"seconds of a check, {small:,} rows", checked, "", None),
        (f"seconds of a check, {middle:,} rows", check, "at most 60", check <= 60),
        (f"times that of {small:,} rows", check / checked, "at most 12", check / checked <= 12),
    ]
    return [dict(zip(("what", "value", "limit", "met"), one, strict=True)) for one in found]


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    where, loads = result["machine"], [run["load"] for run in result["runs"]]
    on = f"{where['cores']} cores of an {where['cpu']}, the tokenizer of {result['base']}"
    lines = [
        f"{result['utc'][:10]}, {on}; the load behind a measurement was {min(loads):.1f} to {max(loads):.1f}.",
        "",
        "| | measured | asked | met |",
        "| --- | --- | --- | --- |",
    ]
    for check in result["checks"]:
        value, met = check["value"], {True: "yes", False: "**no**", None: ""}[check["met"]]
        lines.append(
            f"| {check['what']} | {f'{value:,.0f}' if value >= 100 else f'{value:.3g}'} | {check['limit']} | {met} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sides in turns; print each, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="what to compare with")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", type=int, default=20_000, help="rows that both sides take")
    parser.add_argument("--middle", type=int, default=200_000, help="rows that this side also checks")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows that this side builds alone")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(arguments)
    runs: list[dict[str, Any]] = []
    base = base_of(asked.base, print).folder
    sides = [("before", "build check"), ("now", "build check warm floor")]
    plan = [(side, asked.small, work) for _ in range(asked.rounds) for side, works in sides for work in works.split()]
    plan += [("now", asked.middle, "check"), ("now", asked.rows, "build"), ("now", asked.rows, "warm")]
    with tempfile.TemporaryDirectory() as scratch:
        before = unpacked(asked.before, Path(scratch) / "before")
        files = {count: Path(scratch) / f"{count}.jsonl" for count in {count for _, count, _ in plan}}
        for count, path in files.items():
            write_rows(path, count)
        for side, count, work in plan:
            tree, made = before if side == "before" else ROOT, Path(scratch) / f"{side}-{count}"
            if work == "build":
                shutil.rmtree(made, ignore_errors=True)
            found = measured(tree, work, files[count], base, made)
            runs.append({"side": side, "work": work, "rows": count, "load": os.getloadavg()[0], **found})
            print(json.dumps(runs[-1]), flush=True)
    sizes = {"small": asked.small, "middle": asked.middle, "rows": asked.rows}
    result = {
        "before": asked.before,
        "base": asked.base,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        **sizes,
        "runs": runs,
    }
    result["checks"] = checks_of(result)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(text := table(result))
    if asked.out == OUT:
        serving.write_table(text, BEGIN)


if __name__ == "__main__":
    main()
