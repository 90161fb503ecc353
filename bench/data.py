"""What a lot of data costs: rows/s to token files, seconds of a check, and memory, here and at an earlier commit.

    .venv/bin/python bench/data.py [--before COMMIT] [--rows 1000000]

The sides take turns, each measurement in a process of its own; results/data.json has every one. The rows are made up:
100 tokens each, words drawn as languages have them (the n-th most frequent one in proportion to 1/(n + 5)).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.data.fetch import base_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "results" / "data.json"
BEFORE = "871dfab"  # the last commit that tokenized a row at a time
WORDS = 3_300
# What one process does: `work` is build or check. Written so that it runs in both trees.
CHILD = """
import json, resource, sys, tempfile, time
from pathlib import Path
work, rows_file, base = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
from common.config.schema import Data
from common.data import build, tokens
from common.data.chat import ChatTokenizer
from common.data.rows import read_rows
from tools.data import checks
try:
    from tools.data import workers
    spill = Path(tempfile.mkdtemp(dir=rows_file.parent))
    faster = [lambda tokenizer, rows, options, name: workers.encode_rows(tokenizer, rows, options), spill]
except ImportError:
    faster = []
tokenizer, facts = ChatTokenizer.load(base), {}
start = time.perf_counter()
rows = read_rows(rows_file)
facts["read_seconds"] = time.perf_counter() - start
start = time.perf_counter()
if work == "check":
    facts["findings"] = len(checks.check({"train": rows}).findings)
else:
    splits, info = build.of_rows(Data(source="rows"), {"train": rows, "held_out": []}, tokenizer, *faster)
    made = tokens.write(Path(tempfile.mkdtemp(dir=rows_file.parent)) / "made", splits, source_key="bench", info=info)
    facts |= {"tokens": made.train.tokens, "tokens_sha256": made.tokens_sha256}
facts["seconds"] = time.perf_counter() - start
facts["rows_per_second"] = len(rows) / (facts["seconds"] + facts["read_seconds"])
facts["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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


def measured(tree: Path, work: str, rows: Path, base: Path) -> dict[str, Any]:
    """Return what one process of the code in `tree` says of `work` on `rows`."""
    command = [sys.executable, "-c", CHILD, work, str(rows), str(base)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def unpacked(commit: str, folder: Path) -> Path:
    """Write the tree of a commit to `folder`; return it."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sides in turns; print each, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="what to compare with")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", type=int, default=20_000, help="rows that both sides take")
    parser.add_argument(
        "--rows", type=int, default=200_000, help="rows that this side takes alone; 1000000 for the long run"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args(arguments)
    runs, base = [], base_of(asked.base, print).folder
    with tempfile.TemporaryDirectory() as scratch:
        before = unpacked(asked.before, Path(scratch) / "before")
        files = {count: Path(scratch) / f"{count}.jsonl" for count in (asked.small, asked.rows)}
        for count, path in files.items():
            write_rows(path, count)
        plan = [(name, asked.small) for _ in range(asked.rounds) for name in ("before", "now")] + [("now", asked.rows)]
        for (side, count), work in itertools.product(plan, ("build", "check")):
            found = measured(before if side == "before" else ROOT, work, files[count], base)
            runs.append({"side": side, "work": work, "rows": count, "load": os.getloadavg()[0], **found})
            print(json.dumps(runs[-1]), flush=True)
    asked.out.write_text(json.dumps({"before": asked.before, "cores": os.cpu_count(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
