"""The one sampler: batched, on any backend, from its next-token logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from common.config.schema import Evaluation
from common.engine import Backend

# Shapes: B prompts, T tokens of the longest, V rows of the vocabulary.

Array = np.ndarray[Any, Any]


def generate(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    sampling: Evaluation,
    *,
    eos_ids: Collection[int],
    vocab_size: int,
    never_ids: Sequence[int] = (),
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return for each prompt up to max_new_tokens further tokens; an end token ends a row and is not returned.

    Ids from `vocab_size` up are padding of the embedding and never chosen, nor are `never_ids`. `on_token(row, id)`
    sees each new token.
    """
    if not prompts:
        return []
    lengths = np.array([len(prompt) for prompt in prompts])  # [B]; 0 once a row has ended
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)  # [B, T], filled on the right; later [B, 1]
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    seen = [list(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    cache: Any = None
    for position in range(sampling.max_new_tokens):
        logits, cache = backend.next_token_logits(ids, lengths, cache)  # [B, V]
        logits[:, list(never_ids)] = -np.inf
        draws = uniforms(seed, position, len(prompts))  # [B]; by position: rows that have ended shift no other row's
        ids = np.zeros((len(prompts), 1), np.int64)  # of rows that have ended nothing is read
        for row in np.flatnonzero(lengths).tolist():
            token = choose(logits[row, :vocab_size], sampling, seen[row], draws[row])
            if token in eos_ids:
                lengths[row] = 0
                continue
            ids[row] = token
            answers[row].append(token)
            seen[row].append(token)
            if on_token:
                on_token(row, token)
        if not lengths.any():
            break
    return answers


def choose(logits: Array, sampling: Evaluation, seen: Sequence[int], draw: float) -> int:
    """Return one token id from `logits` [V]; `draw` in [0, 1) decides among what temperature, top_k, top_p leave."""
    logits = logits.astype(np.float64)  # so that every backend's logits are summed alike
    if sampling.repetition_penalty != 1.0 and seen:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")  # [V]; of equal logits the lower id first, as argmax has it
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = logits[order] / sampling.temperature
    probability = np.exp(scaled - scaled[0])  # order[0] is the largest: nothing overflows
    probability /= probability.sum()
    total = np.cumsum(probability)
    # top_p: the smallest set of likeliest tokens that holds this share (Holtzman et al., 2020)
    kept = int(np.searchsorted(total, min(sampling.top_p, 1.0 - 1e-12))) + 1
    total = total[:kept]
    # The draw is scaled by what is kept rather than the shares divided by it: the same token, one rounding less.
    return int(order[min(int(np.searchsorted(total, draw * total[-1], side="right")), len(total) - 1)])


def penalize(logits: Array, seen: Sequence[int], penalty: float) -> Array:
    """Return `logits` [V] with tokens already there less likely: positive ones divided, others multiplied.

    CTRL's repetition penalty (Keskar et al., 2019), as transformers has it.
    """
    logits = logits.copy()
    ids = np.unique(np.asarray(seen))
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def uniforms(seed: int, position: int, rows: int) -> Array:
    """Return `rows` float64 values in [0, 1), a pure function of the arguments.

    From the raw bits of a counter: the streams of numpy's Generator are not promised across its versions.
    """
    raw = np.random.Philox(key=seed, counter=[0, 0, 0, position]).random_raw(rows)
    return (np.asarray(raw) >> np.uint64(11)) * 2.0**-53  # the 53 bits of a float64's mantissa
