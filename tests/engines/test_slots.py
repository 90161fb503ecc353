"""Answers that share a batch: a row's logits are bit for bit those it gets alone, whoever comes and goes beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the CPU engine is torch")

from common.model.weights import Weights
from common.train.generate import choose, generate
from engines.cpu.engine import TorchCPU, open_cpu
from engines.cpu.slots import Slots
from tools.generate.chat import architecture_of, folder_config, folder_speaker
from tools.serve.target import cache_bytes
from tools.verify.tiny_base import write_tiny_base

COUNT, CONTEXT, VOCABULARY = 4, 96, 512
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"device.threads": 2},
    "fp32 with adapters": {"device.threads": 2, "model.lora": LORA},
    "mixed": {"device.threads": 1, "training.precision": "bf16-mixed"},
    "mixed with adapters": {"device.threads": 1, "training.precision": "bf16-mixed", "model.lora": LORA},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose query heads share keys, with an output head of its own."""
    folder = tmp_path_factory.mktemp("grouped") / "tiny"
    return write_tiny_base(folder, hidden=96, layers=3, heads=6, kv_heads=3, tied=False)


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, folder: Path) -> Iterator[TorchCPU]:
    with open_cpu(folder_config(folder).with_values(**KINDS[request.param])) as backend:
        backend.build(architecture_of(folder))
        backend.load(Weights([folder / "model.safetensors"]))
        for _, layer in backend.trained.items():  # adapters that do something: B is zero before training
            layer.data.normal_(0, 0.05)
        yield backend


def alone(slots: Slots, slot: int, ids: list[int], prompt: int) -> list[np.ndarray]:
    """The logits after the prompt, and after each token that follows it, with every other slot free."""
    logits = [slots.prefill(slot, ids[:prompt], len(ids))]
    logits += [slots.decode({slot: token})[slot] for token in ids[prompt:]]
    slots.free(slot)
    return logits


def test_a_row_has_the_same_bits_whoever_joins_and_leaves(backend):
    rng = random.Random(7)
    sizes = [(rng.randint(1, 40), rng.randint(1, 30)) for _ in range(10)]
    texts = [([rng.randrange(VOCABULARY) for _ in range(prompt + more)], prompt) for prompt, more in sizes]
    expected = [alone(Slots(backend, COUNT, CONTEXT), 0, *text) for text in texts]

    slots = Slots(backend, COUNT, CONTEXT)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    waiting = list(range(len(texts)))
    running: dict[int, int] = {}  # slot: text
    beside = set()
    while waiting or running:
        free = [slot for slot in range(COUNT) if slot not in running]
        if waiting and free and (not running or rng.random() < 0.5):
            slot = rng.choice(free)
            running[slot] = waiting.pop(0)
            ids, prompt = texts[running[slot]]
            found[running[slot]].append(slots.prefill(slot, ids[:prompt], len(ids)))
        stepping = {p: t for p, t in running.items() if rng.random() < 0.9 and len(found[t]) <= sizes[t][1]}
        beside.add(len(stepping))
        tokens = {p: texts[t][0][sizes[t][0] + len(found[t]) - 1] for p, t in stepping.items()}
        logits = slots.decode(tokens)
        for slot, text in stepping.items():
            found[text].append(logits[slot])
        for slot, text in list(running.items()):
            if len(found[text]) == sizes[text][1] + 1:
                slots.free(slot)
                del running[slot]

    assert beside >= {1, 2, 3, 4}, "the rows must have had all numbers of neighbors"
    for here, there in zip(found, expected, strict=True):
        assert len(here) == len(there)
        assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
    assert not slots.caches


def test_adapters_that_are_off_leave_the_base_and_its_bits(folder):
    """One engine answers tuned and untuned in turns, as a server does that shows both."""
    ids = list(range(40, 60))
    with open_cpu(folder_config(folder)) as bare:
        bare.build(architecture_of(folder))
        bare.load(Weights([folder / "model.safetensors"]))
        expected = alone(Slots(bare, COUNT, CONTEXT), 1, ids, 12)
    with open_cpu(folder_config(folder).with_values(**KINDS["fp32 with adapters"])) as both:
        both.build(architecture_of(folder))
        both.load(Weights([folder / "model.safetensors"]))
        for layer in both.trained.values():
            layer.data.normal_(0, 0.05)
        tuned, untuned = Slots(both, COUNT, CONTEXT), Slots(both, COUNT, CONTEXT)
        changed, found = [tuned.prefill(0, ids[:12], len(ids))], []
        with both.disable_adapter():
            found.append(untuned.prefill(1, ids[:12], len(ids)))
        for token in ids[12:]:
            changed.append(tuned.decode({0: token})[0])
            with both.disable_adapter():
                found.append(untuned.decode({1: token})[1])
        again = alone(Slots(both, COUNT, CONTEXT), 3, ids, 12)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(changed, again, strict=True))
    assert not np.allclose(changed[-1], found[-1], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_answers_are_those_of_generate(tmp_path, tied):
    base = write_tiny_base(tmp_path / "base", hidden=96, layers=3, heads=6, kv_heads=3, tied=tied)
    # With tied heads a random model says its last token again, whatever is wrong: the penalty lets it go on.
    with folder_speaker(base, {"eval.max_new_tokens": 24, "eval.repetition_penalty": 9.0}) as speaker:
        assert isinstance(speaker.backend, TorchCPU)
        rng = random.Random(11)
        prompts = [[rng.randrange(6, VOCABULARY) for _ in range(rng.randint(1, 40))] for _ in range(COUNT)]
        expected = [
            generate(speaker.backend, [prompt], speaker.config.eval, eos_ids=(), vocab_size=VOCABULARY)[0]
            for prompt in prompts
        ]

        slots = Slots(speaker.backend, COUNT, CONTEXT)
        found: list[list[int]] = [[] for _ in prompts]
        logits = {at: slots.prefill(at, prompt, CONTEXT) for at, prompt in enumerate(prompts)}
        while len(found[0]) < 24:
            for at, answer in enumerate(found):
                answer.append(choose(logits[at], speaker.config.eval, prompts[at] + answer, 0.0))
            logits = slots.decode({at: answer[-1] for at, answer in enumerate(found)})
    assert found == expected
    assert len({tuple(answer) for answer in found}) == COUNT, "four answers, not one four times"


def test_every_place_computes_the_same_bits(backend):
    ids = [3, 141, 59, 26, 5, 35, 89, 79]
    first, *others = [alone(Slots(backend, COUNT, CONTEXT), slot, ids, 3) for slot in range(COUNT)]
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_logits_are_those_of_generation(backend):
    """Kernels differ by the shape of a product: fp32 agrees to 1e-5, bf16 to a tenth of the spread of the logits."""
    ids = list(range(100, 120))
    found = alone(Slots(backend, COUNT, CONTEXT), 2, ids, 12)
    logits, cache = backend.next_token_logits(np.array([ids[:12]]), np.array([12]))
    expected = [logits[0]]
    for token in ids[12:]:
        logits, cache = backend.next_token_logits(np.array([[token]]), np.array([1]), cache)
        expected.append(logits[0])
    allowed = float(np.std(expected)) / 10 if backend.mixed else 1e-5
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=allowed)
    assert float(np.std(expected)) > 9 * allowed, "logits this small would agree whatever they were computed from"


def test_the_bound_is_what_full_places_hold(folder):
    with open_cpu(folder_config(folder)) as backend:
        backend.build(architecture_of(folder))
        backend.load(Weights([folder / "model.safetensors"]))
        slots = Slots(backend, COUNT, CONTEXT)
        for slot in range(COUNT):
            slots.prefill(slot, [1, 2, 3], CONTEXT)
        held = sum(tensor.nbytes for cache in slots.caches.values() for pair in cache.layers for tensor in pair)
        assert held == cache_bytes(architecture_of(folder), COUNT, CONTEXT)
