"""Does a GGUF file hold what the export holds? Asked of llama.cpp, beside our engine on the export itself.

Two questions: the ids of texts of the run's own data, which must be the same in every one; and greedy answers, which
must be the same token for token in f32. In f16 and q8_0 the weights are rounded: there two tokens that are nearly as
likely as each other may change places, and where they do is said.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.tokens import spread
from common.errors import MachineError, VerificationError
from common.train.generate import generate
from tools.export.gguf.vocabulary import vocabulary_of
from tools.export.readers.ask import ask
from tools.export.readers.compare import first_difference
from tools.export.readers.environment import Say
from tools.export.readers.table import LLAMA_CPP
from tools.generate.chat import Speaker, architecture_of, folder_speaker
from tools.runs.trained import TrainedRun

TEXTS = 200
PROMPTS = 8
TOKENS = 40  # of a greedy answer
# How much likelier, in nats, our engine may hold its own token than the reader's, where they part.
ALLOWED = {"f32": 0.0, "f16": 0.05, "q8_0": 0.5}


@dataclass
class Proof:
    """`verdict` is equal, parted (at near-ties, as far as the type may), failed, or not tried; `reason` says why."""

    verdict: str
    reason: str = ""
    reader: str = ""
    texts: int = 0
    prompts: int = 0
    tokens: int = 0
    parted: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        """Return the outcome in one line."""
        if self.verdict in ("failed", "not tried"):
            return f"{self.verdict}: {self.reason}"
        found = f"the ids of {self.texts} texts and {self.tokens} greedy tokens of {self.prompts} answers"
        how = "the same" if self.verdict == "equal" else f"the same but that {self.reason}"
        return f"{self.verdict}: {found} are {how} in {self.reader} ({self.seconds:.0f} s)"


@dataclass(frozen=True)
class Questions:
    """What both sides are asked: texts to make tokens of, and prompts to answer, as a user writes them."""

    texts: Sequence[str]
    prompts: Sequence[str] = ()
    system: str | None = None


def questions_of(run: TrainedRun) -> Questions:
    """Return texts of the run's own data, held-out rows and training rows, and its evaluation prompts."""
    dataset = run.dataset()
    rows = [
        run.tokenizer.decode(split.row(index).ids)
        for split in (dataset.held_out, dataset.train)
        for index in spread(len(split), TEXTS // 2).tolist()
    ]
    asked = [sample["prompt"] for record in run.evaluations[-1:] for sample in record["samples"]]
    return Questions(list(dict.fromkeys(parts_of(rows)))[:TEXTS], asked, run.config.data.system_prompt)


def parts_of(texts: Sequence[str]) -> Iterator[str]:
    """Yield the texts; then, should they be few, from their middles on, their quarters, and so on."""
    yield from texts
    for parts in (2, 4, 8, 16, 32):
        for part, text in itertools.product(range(1, parts, 2), texts):
            if rest := text[len(text) * part // parts :]:
                yield rest


def prove(path: Path, merged: Path, kind: str, questions: Questions, say: Say) -> Proof:
    """Read the GGUF file at `path` with llama.cpp and compare it with our engine on the folder `merged`."""
    started = time.perf_counter()
    tokens = min(TOKENS, context_of(merged) // 2)
    with folder_speaker(merged, {"eval.max_new_tokens": tokens}) as speaker:
        tokenizer, texts = speaker.tokenizer, questions.texts
        ids = [tokenizer.encode_text(text) for text in texts]
        prompts = prompts_of(questions, speaker, ids, speaker.context - tokens)
        context = max(map(len, prompts)) + tokens + 1
        opened = {"file": str(path), "context": context, "never": tokenizer.never_ids}
        asked: dict[str, list[list[Any]]] = {"ids": [[text] for text in texts]}
        asked["greedy"] = [[prompt, tokens] for prompt in prompts]
        version = LLAMA_CPP.version
        try:
            theirs = ask(LLAMA_CPP.lock, LLAMA_CPP.probe, opened, asked, say)
        except VerificationError as error:
            return Proof("failed", f"{version} {error.what}", version)
        except MachineError as error:
            return Proof("not tried", f"{version} {error.what}")
        proof = Proof("equal", "", version, len(texts), len(prompts))
        for answer in [*theirs["ids"], *theirs["greedy"]]:
            if isinstance(answer, dict):
                proof.verdict, proof.reason = "failed", f"{version} cannot read it: {answer['error']}"
                return proof
        for text, own, other in zip(texts, ids, theirs["ids"], strict=True):
            if own != other:
                at = first_difference(own, other)
                cut = tokenizer.decode(own[max(0, at - 4) : at + 4])
                proof.verdict = "failed"
                proof.reason = f"other tokens of a text, from token {at} on: {cut!r} of {text[:60]!r}"
                return proof
        ends = {*tokenizer.eos_ids, vocabulary_of(merged).end}
        compare_answers(proof, speaker, prompts, theirs["greedy"], ends, ALLOWED[kind])
    proof.seconds = time.perf_counter() - started
    return proof


def compare_answers(
    proof: Proof,
    speaker: Speaker,
    prompts: Sequence[list[int]],
    theirs: Sequence[list[int]],
    ends: set[int],
    allowed: float,
) -> None:
    """Put into `proof` how our greedy answers and the reader's compare; an end token is part of neither."""
    for number, (prompt, other) in enumerate(zip(prompts, theirs, strict=True)):
        own = greedy(speaker, prompt, ends)
        other = other[:-1] if other and other[-1] in ends else other
        proof.tokens += len(own)
        if own == other:
            continue
        at = first_difference(own, other)
        margin = lead(speaker, [*prompt, *own[:at]], own, other, ends)
        proof.parted.append({"prompt": number, "token": at + 1, "margin": margin})
    if not proof.parted:
        return
    worst = max(proof.parted, key=lambda found: float(found["margin"]))
    proof.verdict = "parted" if worst["margin"] <= allowed else "failed"
    proof.reason = (
        f"{len(proof.parted)} of {len(prompts)} answers part, answer {worst['prompt'] + 1} at its token "
        f"{worst['token']}, where ours is {worst['margin']:.3g} nats the likelier ({allowed:g} are allowed)"
    )


def greedy(speaker: Speaker, prompt: list[int], ends: set[int]) -> list[int]:
    tokenizer = speaker.tokenizer
    (answer,) = generate(
        speaker.backend,
        [prompt],
        speaker.config.eval,
        eos_ids=ends,
        vocab_size=tokenizer.vocab_size,
        never_ids=tokenizer.never_ids,
    )
    return answer


def lead(speaker: Speaker, before: list[int], own: Sequence[int], other: Sequence[int], ends: set[int]) -> float:
    """Return how many nats likelier our engine holds its token after `before` than the reader's, who may have ended."""
    logits, _ = speaker.backend.next_token_logits(np.array([before]), np.array([len(before)]))
    logits = logits[0].astype(np.float64)
    logits[list(speaker.tokenizer.never_ids)] = -np.inf
    at = first_difference(own, other)
    chosen = [max(logits[id] for id in ([ids[at]] if at < len(ids) else ends)) for ids in (own, other)]
    return float(chosen[0] - chosen[1])


def context_of(merged: Path) -> int:
    return int(architecture_of(merged)["max_position_embeddings"])


def prompts_of(questions: Questions, speaker: Speaker, ids: Sequence[list[int]], room: int) -> list[list[int]]:
    """Return ids to answer, at most `room` of each: the prompts, and the first halves of some texts."""
    asked = questions.prompts[: PROMPTS // 2]
    found = [speaker.tokenizer.prompt_ids(prompt, questions.system) for prompt in asked]
    found += [row[: max(1, min(len(row) // 2, room))] for row in ids[: PROMPTS - len(found)]]
    return [prompt for prompt in found if 0 < len(prompt) <= room]
