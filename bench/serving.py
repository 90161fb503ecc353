"""How soon and how fast `recipe serve` answers, beside our own `generate`, `transformers serve` and llama.cpp.

    .venv/bin/python -m bench.serving [--rounds 2]

What is compared, and what each figure is: README.md. The peers live in `.venv-serving`, made on first use from
`requirements-serving.txt`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.throughput import BENCH, ROOT, machine, peer_python

if TYPE_CHECKING:
    from tools.generate.chat import Speaker

LOCK = BENCH / "requirements-serving.txt"
VENV = ROOT / ".venv-serving"
README = BENCH / "README.md"
RESULT = BENCH / "results" / "serving.json"
BEGIN, END = "<!-- serving: written by bench/serving.py -->", "<!-- end -->"
PROMPT, TOKENS, STREAMS, SINGLES = 100, 48, 4, 6  # tokens of a prompt and of an answer; answers at once, and alone
ANSWERS = 20  # after which memory is looked at
PATIENCE = 180.0  # seconds that a server may take to be ready, or to say a word
WORDS = (
    "river garden window paper stone market letter winter music bridge table forest doctor engine silver village "
    "ocean kitchen teacher mountain candle history farmer island summer machine travel animal number science"
).split()
SIDES = {"generate": "our `generate`", "ours": "`recipe serve`", "transformers": "`transformers serve`"}
SIDES |= {"llama": "llama.cpp (xllamacpp)"}
Measured = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """An answer and when it came, in seconds since it was asked for."""

    text: str
    first: float
    last: float
    tokens: int


# --- the questions ----------------------------------------------------------------------------------------------------


def prompts_for(folder: Path, count: int) -> list[str]:
    """Return texts of PROMPT tokens each, no two of which begin alike: a server may keep what it has read."""
    from common.data.chat import ChatTokenizer

    tokenizer, made = ChatTokenizer.load(folder), []
    for seed in range(10 * count):
        draw = random.Random(seed)
        words = [WORDS[seed % len(WORDS)].title(), *(draw.choice(WORDS) for _ in range(2 * PROMPT))]
        text = tokenizer.decode(tokenizer.encode_text(" ".join(words))[:PROMPT])
        if len(tokenizer.encode_text(text)) == PROMPT:
            made.append(text)
        if len(made) == count:
            return made
    raise SystemExit(f"bench: {folder.name}'s tokenizer gives no {count} texts of {PROMPT} tokens")


def ask(port: int, model: str, prompt: str, tokens: int) -> Timed:
    """Return the greedy continuation of `prompt` by a server on this machine, as it streams it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"bench: {model} answers {answer.status}: {answer.read(500).decode(errors='replace')}")
    text, times, reason = "", [], None
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        (choice, *_) = json.loads(line[6:]).get("choices") or [{}]
        reason = choice.get("finish_reason") or reason
        if piece := choice.get("text"):
            text += piece
            times.append(time.perf_counter() - started)
    connection.close()
    if not times:
        raise SystemExit(f"bench: {model} says nothing to {prompt[:40]!r}...")
    # Pieces are tokens, but for those that a server holds back or joins; an answer that was cut off has them all.
    return Timed(text, times[0], times[-1], tokens if reason == "length" else len(times))


# --- the sides --------------------------------------------------------------------------------------------------------


def measure_servers(folder: Path, python: Path, prompts: Sequence[str], place: Path) -> dict[str, Measured]:
    """Start every server, put each question to all of them in turn, and return what was measured, by side.

    An idle server takes no time, and minutes of this machine differ by more than the servers do: beside each other,
    each question meets all of them within a second or two.
    """
    commands = commands_of(folder, python, place)
    warm, *singles = prompts[: 1 + SINGLES]
    at_once = prompts[1 + SINGLES : 1 + SINGLES + STREAMS]
    measured: dict[str, Measured] = {}
    with contextlib.ExitStack() as running:
        servers: dict[str, tuple[subprocess.Popen[bytes], int, str]] = {}
        for side, (model, port, command) in commands.items():
            load, env = os.getloadavg()[0], quiet(ROOT if side == "ours" else None)
            process, ready = running.enter_context(serving(command, port, place / f"{side}.log", env))
            servers[side] = process, port, model
            measured[side] = {"ready": ready, "load_before": load}
            ask(port, model, warm, TOKENS)
        alone: dict[str, list[Timed]] = {side: [] for side in servers}
        for at, prompt in enumerate(singles):
            for side in in_turn(servers, at):
                _, port, model = servers[side]
                alone[side].append(ask(port, model, prompt, TOKENS))
        for side, (process, port, model) in servers.items():
            began = time.perf_counter()
            with ThreadPoolExecutor(STREAMS) as pool:
                together = list(pool.map(functools.partial(ask, port, model, tokens=TOKENS), at_once))
            four = sum(answer.tokens for answer in together) / (time.perf_counter() - began)
            for at in range(ANSWERS - 1 - SINGLES - STREAMS):
                ask(port, model, prompts[at % len(prompts)], 4)
            resident, peak = memory_of(process.pid)
            measured[side] |= figures(alone[side]) | {
                "four": four,
                "texts": [answer.text for answer in (*alone[side], *together)],
                "resident_bytes": resident,
                "peak_bytes": peak,
            }
    said = (place / "ours.log").read_text(encoding="utf-8")
    (sizes,) = re.findall(r"weights ([\d.]+) GB; KV cache of \d+ slots at most ([\d.]+) GB", said)
    measured["ours"]["printed_bytes"] = [int(float(size) * 1e9) for size in sizes]
    return measured


def in_turn(sides: Iterable[str], at: int) -> list[str]:
    """Return the sides, another one first each time: who comes first may find other caches."""
    names = list(sides)
    return names[at % len(names) :] + names[: at % len(names)]


def commands_of(folder: Path, python: Path, place: Path) -> dict[str, tuple[str, int, list[str | Path]]]:
    """Return each server's name for the model, its port, and the command that starts it."""
    ours, peer, llama = (free_port() for _ in range(3))
    recipe, transformers = Path(sys.executable).parent / "recipe", python.parent / "transformers"
    return {
        "ours": (folder.name, ours, [recipe, "serve", folder, "--port", str(ours)]),
        "transformers": (
            str(folder),
            peer,
            [transformers, "serve", folder, "--host", "127.0.0.1", "--port", str(peer)],
        ),
        "llama": ("model", llama, [python, BENCH / "peer_llama.py", place / "model.gguf", str(llama), str(STREAMS)]),
    }


def figures(alone: Sequence[Timed]) -> Measured:
    """Return seconds to the first token, and tokens/s from the question to the last token, of each answer alone."""
    return {"first": [answer.first for answer in alone], "one": [answer.tokens / answer.last for answer in alone]}


def quiet(code: Path | None = None) -> dict[str, str]:
    """Return the environment of a side: nothing is downloaded, and nothing is set that its users would not set."""
    return {**os.environ, "PYTHONPATH": str(code or ""), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path], port: int, log: Path, env: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """Start a server in the folder of `log`; yield its process and the seconds until it was ready; then end it."""
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=log.parent, env=env)
    try:
        yield process, seconds_until_ready(process, port, started, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def seconds_until_ready(process: subprocess.Popen[bytes], port: int, started: float, log: Path) -> float:
    """Return the seconds from `started` until /health is 200."""
    while time.perf_counter() - started < PATIENCE and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return time.perf_counter() - started
        time.sleep(0.05)
    print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
    raise SystemExit(f"bench: the server of {log.stem} does not get ready")


def memory_of(pid: int | str) -> tuple[int, int]:
    """Return the resident bytes of a process now, and at most so far: VmRSS and VmHWM, libraries and all."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return kib["VmRSS"] * 1024, kib["VmHWM"] * 1024


def generate_alone(folder: Path, prompts: Sequence[str]) -> Measured:
    """Return the same of `generate` in this process, whose answers are what the servers' are compared with."""
    from tools.generate.chat import folder_speaker

    with folder_speaker(folder, {"eval.max_new_tokens": TOKENS}) as speaker:
        answers = [continued(speaker, prompt) for prompt in prompts[: 1 + SINGLES + STREAMS]]
    resident, peak = memory_of(os.getpid())
    texts = [answer.text for answer in answers[1:]]
    return figures(answers[1 : 1 + SINGLES]) | {"texts": texts, "resident_bytes": resident, "peak_bytes": peak}


def continued(speaker: Speaker, prompt: str) -> Timed:
    """Return the greedy continuation of `prompt` by `generate`, timed from its text to its tokens."""
    from common.train.generate import generate

    tokenizer, times = speaker.tokenizer, []
    started = time.perf_counter()
    (ids,) = generate(
        speaker.backend,
        [tokenizer.encode_text(prompt)],
        speaker.config.eval,
        eos_ids=tokenizer.eos_ids,
        vocab_size=tokenizer.vocab_size,
        never_ids=tokenizer.never_ids,
        on_token=lambda _row, _token: times.append(time.perf_counter() - started),
    )
    return Timed(tokenizer.decode(ids, skip_special=True), times[0], times[-1], len(ids))


def measure_generate(folder: Path, prompts: Sequence[str], place: Path) -> Measured:
    """Run `generate` in a process of its own and return what was measured."""
    load = os.getloadavg()[0]
    (place / "prompts.json").write_text(json.dumps(list(prompts)), encoding="utf-8")
    alone = [sys.executable, "-m", "bench.serving", "--generate", str(place), "--base", str(folder)]
    subprocess.run(alone, env=quiet(ROOT), cwd=ROOT, check=True)
    measured: Measured = json.loads((place / "generate.json").read_text(encoding="utf-8"))
    return measured | {"load_before": load}


# --- what they say ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def bytes_of_imports() -> int:
    """Return the resident bytes of a process that imports what the server imports, and does nothing."""
    code = (
        "import tools.serve.start, engines.cpu.slots; from bench.serving import memory_of; print(memory_of('self')[0])"
    )
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, env=quiet(ROOT), cwd=ROOT, check=True, capture_output=True).stdout)


def medians(runs: Sequence[Measured]) -> dict[str, float]:
    """Return the median of each figure, over all answers of all rounds."""
    found: dict[str, float] = {}
    for name in ("first", "one", "four", "ready", "resident_bytes", "peak_bytes"):
        of_runs = [run[name] for run in runs if name in run]
        if of_runs:
            lists = (value if isinstance(value, list) else [value] for value in of_runs)
            found[name] = statistics.median(itertools.chain(*lists))
    return found


def checks(sides: Mapping[str, Mapping[str, float]], printed: Sequence[int], imports: int) -> list[Measured]:
    """Return what is asked of serving: what, its value, the limit, and whether it is met (None: none is asked)."""
    generate, ours, peer, llama = (sides[name] for name in SIDES)
    weights, cache = printed
    limit = (1.3 * weights + cache) / 1e6

    def at_most(what: str, value: float, limit: float) -> Measured:
        return {"what": what, "value": value, "limit": f"at most {limit:g}", "met": value <= limit}

    def at_least(what: str, value: float, limit: float) -> Measured:
        return {"what": what, "value": value, "limit": f"at least {limit:g}", "met": value >= limit}

    def told(what: str, value: float) -> Measured:
        return {"what": what, "value": value, "limit": "", "met": None}

    return [
        at_most("first token, over `generate`'s", ours["first"] / generate["first"], 1.2),
        at_least("one stream, over `generate`'s", ours["one"] / generate["one"], 0.9),
        at_least("four streams, over one", ours["four"] / ours["one"], 2.0),
        at_least("first token: `transformers serve`'s over ours", peer["first"] / ours["first"], 1.0),
        at_least("one stream: ours over `transformers serve`'s", ours["one"] / peer["one"], 1.0),
        at_least("four streams: ours over `transformers serve`'s", ours["four"] / peer["four"], 1.0),
        told("first token: llama.cpp's over ours", llama["first"] / ours["first"]),
        told("one stream: ours over llama.cpp's", ours["one"] / llama["one"]),
        told("four streams: ours over llama.cpp's", ours["four"] / llama["four"]),
        at_most("seconds from the command until /health is 200", ours["ready"], 5.0),
        at_most(
            "MB resident after 20 answers; 1.3 x the weights + the printed cache", ours["resident_bytes"] / 1e6, limit
        ),
        told("the same without what the imports take, over the weights", (ours["resident_bytes"] - imports) / weights),
    ]


def agreement(runs: Mapping[str, Sequence[Measured]]) -> dict[str, str]:
    """Return of each server how many of its answers are `generate`'s, character for character."""
    expected = [text for run in runs["generate"] for text in run["texts"]]
    return {
        name: f"{sum(a.strip() == b.strip() for a, b in zip(expected, found, strict=True))} of {len(expected)}"
        for name in runs
        if name != "generate" and (found := [text for run in runs[name] for text in run["texts"]])
    }


def by_round(runs: Mapping[str, Sequence[Measured]]) -> list[dict[str, float]]:
    """Return the first three ratios of each round alone: how far they lie apart says how quiet the machine was."""
    rounds = []
    for pair in zip(runs["generate"], runs["ours"], strict=True):
        generate, ours = (medians([run]) for run in pair)
        ratios = (ours["first"] / generate["first"], ours["one"] / generate["one"], ours["four"] / ours["one"])
        rounds.append(dict(zip(("first", "one", "four"), ratios, strict=True)))
    return rounds


def table(result: Mapping[str, Any]) -> str:
    """Return the result as Markdown: a row a side, then what is asked."""
    where, sides = result["machine"], result["medians"]
    loads = [run["load_before"] for runs in result["runs"].values() for run in runs]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    on = f"{result['base']} in fp32, {where['cores']} cores of an {where['cpu']}, {versions}"
    heads = (
        "first token, s",
        "one stream, tokens/s",
        "four, tokens/s",
        "ready, s",
        "resident (most), MB",
        "as `generate`",
    )
    lines = [
        f"{result['utc'][:10]}, {on}; the machine's load before a side was {min(loads):.1f} to {max(loads):.1f}.",
        "",
        f"| | {' | '.join(heads)} |",
        "| --- " * (len(heads) + 1) + "|",
    ]
    for name, title in SIDES.items():
        side = sides[name]
        four, ready = (f"{side[key]:.1f}" if key in side else "" for key in ("four", "ready"))
        memory = f"{side['resident_bytes'] / 1e6:.0f} ({side['peak_bytes'] / 1e6:.0f})"
        cells = [f"{side['first']:.3f}", f"{side['one']:.1f}", four, ready, memory, result["agreement"].get(name, "")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| | measured | asked | met |", "| --- | --- | --- | --- |"]
    for check in result["checks"]:
        met = {True: "yes", False: "**no**", None: ""}[check["met"]]
        lines.append(f"| {check['what']} | {check['value']:.4g} | {check['limit']} | {met} |")
    return "\n".join(lines)


def write_table(text: str, begin: str = BEGIN) -> None:
    """Put a table between its marks in the README, of which `begin` is the first."""
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(begin)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}", encoding="utf-8")


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with llama.cpp's copy of the model, in fp32."""
    from tools.export.gguf.file import write_gguf

    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        write_gguf(Path(name) / "model.gguf", folder, "f32", "model")
        yield Path(name)


def pinned(package: str) -> str:
    """Return a package's version in the peers' lock."""
    return str(re.findall(rf"^{package}==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)[0])


def base_folder() -> Path:
    """Return the folder of the fine-tuning recipe's base for the CPU, which is fetched where it is missing."""
    from common.model import bases
    from tools.data.fetch import fetch_pinned
    from tools.launch.resolve import resolve
    from tools.recipes import find_recipe

    recipe = find_recipe("tinyllama-finetune")
    launch = resolve(recipe, hw="cpu")
    assert launch.config.model.base is not None, "it tunes a base"
    fetch_pinned(launch.config, recipe, lambda text: print(f"bench: {text}"))
    return bases.resolve(launch.config.model.base).folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often all of it is done")
    parser.add_argument(
        "--base", type=Path, help="a Llama's folder; without: the fine-tuning recipe's base for the CPU"
    )
    parser.add_argument("--no-write", action="store_true", help="leave results/serving.json and the table as they are")
    parser.add_argument(
        "--generate", type=Path, help=argparse.SUPPRESS
    )  # a side of its own: the folder with its prompts
    given = parser.parse_args()
    if given.generate is not None:
        prompts = json.loads((given.generate / "prompts.json").read_text(encoding="utf-8"))
        out = json.dumps(generate_alone(given.base, prompts))
        (given.generate / "generate.json").write_text(out, encoding="utf-8")
        return
    python = peer_python(LOCK, VENV)
    folder = (given.base or base_folder()).resolve()
    prompts = prompts_for(folder, 1 + SINGLES + STREAMS)
    runs: dict[str, list[Measured]] = {name: [] for name in SIDES}
    with prepared(folder) as place:
        for number in range(1, given.rounds + 1):
            generate = measure_generate(folder, prompts, place)
            sides_of_round = {"generate": generate} | measure_servers(folder, python, prompts, place)
            for side, measured in sides_of_round.items():
                runs[side].append(measured)
                middle = medians([measured])
                said = ", ".join(
                    f"{key} {middle[key]:.3g}" for key in ("first", "one", "four", "ready") if key in middle
                )
                print(f"bench: round {number}, {side}: {said} (load before {measured['load_before']:.1f})", flush=True)
    sides, imports = {name: medians(measured) for name, measured in runs.items()}, bytes_of_imports()
    result = {
        "format": 1,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "base": folder.name,
        "asked": {"prompt": PROMPT, "answer": TOKENS, "streams": STREAMS, "alone": SINGLES, "rounds": given.rounds},
        "versions": {package: pinned(package) for package in ("torch", "transformers", "xllamacpp")},
        "medians": sides,
        "imports_bytes": imports,
        "checks": checks(sides, runs["ours"][0]["printed_bytes"], imports),
        "agreement": agreement(runs),
        "by_round": by_round(runs),
        "runs": runs,
    }
    print(table(result))
    print(f"by round: {json.dumps(result['by_round'])}")
    if not given.no_write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_table(table(result))
        print(f"bench: {RESULT.relative_to(ROOT)} and the table in {README.relative_to(ROOT)} are written")


if __name__ == "__main__":
    main()
