"""Rows of different lengths laid end to end, and what they begin with laid down once: which tokens a step computes.

Rows of conversations begin alike, with a template's head or a system prompt. A causal model has the same hidden states
for the same beginning, so it is computed once here, forward and backward, and each row's own tokens attend to it.
Padding is not computed at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.tokens import Batch

# Shapes: B rows, T positions of a padded row, S tokens that are computed, N supervised positions of all rows, U <= N
# tokens whose hidden states these need, n queries of one product.

# Rows share their beginnings in multiples of so many tokens: each piece costs some twenty small products a layer, which
# is less than eight tokens cost, and more than one does.
SHARE_BY = 8
# Tokens, and queries of the last block: oneDNN compiles its bf16 kernels for each number of rows anew and keeps them,
# some 50 MB more with each step where every batch has numbers of its own. Filling costs 16 tokens of 600.
FILL_TO = 32
# Queries of one product at most: what lies in the future of all of them is not computed.
QUERIES = 256
# Pieces whose queries and keys are at most so many times as many as the fewest are filled up and multiplied together:
# one product of many is sooner done than many of one, and all cores have work.
ALIKE = 1.5
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Tokens start..end of the rows `rows`, which agree up to `end`; `before` are the pieces that they begin with."""

    rows: list[int]
    start: int
    end: int
    before: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Queries first..last (`first` and on, `count` of them) of one piece, and the spans of tokens that they attend to.

    `future` bool [count, m] is true where a query must not see one of all m tokens.
    """

    first: int
    count: int
    keys: tuple[tuple[int, int], ...]
    future: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Together:
    """P parts of like size, whose attention is one product each way: n queries and m keys of each, filled up.

    queries int64 [P n] and keys int64 [P m] are places among queries and tokens, hidden bool [P, n, 1, m] is true where
    a query must not see a key; spans are (part, first key, token, token's end) of all tokens that are keys.
    """

    queries: Tensor
    keys: Tensor
    hidden: Tensor
    spans: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Attending:
    """Who attends to whom; place int64 [U] is where each query stands among those of all groups in a row."""

    groups: tuple[Together, ...]
    place: Tensor


@dataclass(frozen=True)
class Layout:
    """What a batch's supervised positions need: the tokens to compute, and who attends to whom.

    ids, positions int64 [S], with at least one token at the end that only fills and that nobody attends to; needed
    int64 [U], ascending, filled up with the last token; labels, place int64 [N]: supervised position i has the hidden
    state of token needed[place[i]].
    """

    ids: Tensor
    positions: Tensor
    attending: Attending
    needed: Tensor
    attending_last: Attending  # in the last block, where the needed tokens are the only queries
    labels: Tensor
    place: Tensor


def lay_out(batch: Batch, share: bool = True) -> Layout:
    """Return the layout of `batch`, a function of its ids and mask alone; without `share` each row by itself.

    A row ends with its last supervised token: attention is causal, so nothing right of it has an effect.
    """
    pieces = list(pieces_of(batch, share))
    ends = np.cumsum([piece.end - piece.start for piece in pieces])
    spans = [(int(end) - piece.end + piece.start, int(end)) for end, piece in zip(ends, pieces, strict=True)]
    token_of = np.zeros(batch.loss_mask.shape, np.int64)  # [B, T]: the token that is computed for a row's position
    for piece, span in zip(pieces, spans, strict=True):
        token_of[piece.rows, piece.start : piece.end] = np.arange(*span)
    supervised = batch.loss_mask > 0  # [B, T]; as an index it takes the positions row by row
    needed, place = np.unique(token_of[supervised], return_inverse=True)
    ids = [batch.input_ids[piece.rows[0], piece.start : piece.end] for piece in pieces]
    # Each row counts from 0: rotary embeddings see it as if it were alone.
    positions = [np.arange(piece.start, piece.end) for piece in pieces]
    tokens = int(ends[-1])
    filled, queries = (count + FILL_TO - count % FILL_TO for count in (tokens, len(needed)))  # one more at least
    return Layout(
        ids=torch.from_numpy(np.pad(np.concatenate(ids).astype(np.int64), (0, filled - tokens))),
        positions=torch.from_numpy(np.pad(np.concatenate(positions), (0, filled - tokens))),
        attending=together(list(parts(pieces, spans, np.arange(tokens))), filled),
        needed=torch.from_numpy(np.pad(needed, (0, queries - len(needed)), constant_values=filled - 1)),
        attending_last=together(list(parts(pieces, spans, needed)), queries),
        labels=torch.from_numpy(batch.labels[supervised].astype(np.int64)),
        place=torch.from_numpy(place.reshape(-1)),
    )


def pieces_of(batch: Batch, share: bool) -> Iterator[Piece]:
    """Yield the pieces that the rows of `batch` consist of, each after those that it follows in its rows."""
    lengths = batch.lengths()
    # Rows that agree up to `start`, and the pieces until there; grows while it is read.
    waiting: list[tuple[list[int], int, tuple[int, ...]]] = [(np.flatnonzero(lengths).tolist(), 0, ())]
    count = 0
    for rows, start, before in waiting:
        groups: dict[bytes | int, list[int]] = {}
        for row in rows:
            sharing = share and lengths[row] >= start + SHARE_BY
            groups.setdefault(batch.input_ids[row, start : start + SHARE_BY].tobytes() if sharing else row, []).append(
                row
            )
        for group in groups.values():
            end = int(lengths[group].min())
            if len(group) > 1:
                same = (batch.input_ids[group, :end] == batch.input_ids[group[0], :end]).all(axis=0)
                end = int(np.append(same, False).argmin()) // SHARE_BY * SHARE_BY
                waiting.append((group, end, (*before, count)))
            if end > start:  # a row may end where what it shares ends
                yield Piece(group, start, end, before)
                count += 1


def parts(pieces: list[Piece], spans: list[tuple[int, int]], queries: Ints) -> Iterator[Part]:
    """Yield what each piece's `queries`, ascending places among all tokens, attend to."""
    for piece, (start, end) in zip(pieces, spans, strict=True):
        first, last = (int(place) for place in np.searchsorted(queries, (start, end)))
        for at in range(first, last, QUERIES):
            mine = queries[at : min(at + QUERIES, last)]
            seen = int(mine[-1]) + 1
            future = np.arange(start - piece.start, seen) > mine[:, None]  # what it begins with is past
            yield Part(at, len(mine), (*(spans[earlier] for earlier in piece.before), (start, seen)), future)


def together(found: list[Part], queries: int) -> Attending:
    """Return all parts in groups of like size; `queries` are theirs and at least one more, which only fills."""
    groups: list[list[Part]] = []
    for part in sorted(found, key=lambda part: part.future.shape):
        n, m = part.future.shape
        if groups and n <= ALIKE * groups[-1][0].future.shape[0] and m <= ALIKE * groups[-1][0].future.shape[1]:
            groups[-1].append(part)
        else:
            groups.append([part])
    # What only fills stands where the first part's queries have ended.
    place, begin, made = np.full(queries, max(part.count for part in groups[0])), 0, []
    for group in groups:
        # One query more than the longest has: its output is zero wherever what only fills is needed.
        n, m = (max(part.future.shape[axis] for part in group) for axis in (0, 1))
        n += 1
        at, keys = np.full((len(group), n), queries - 1), np.zeros((len(group), m), np.int64)
        hidden = np.ones((len(group), n, 1, m), np.bool_)
        hidden[:, :, :, 0] = False  # whoever fills sees one key, as a softmax over none is no number
        spans = []
        for index, part in enumerate(group):
            at[index, : part.count] = np.arange(part.first, part.first + part.count)
            place[at[index]] = begin + index * n + np.arange(n)
            hidden[index, : part.count, 0, : part.future.shape[1]] = part.future
            first = 0
            for start, end in part.keys:
                keys[index, first : first + end - start] = np.arange(start, end)
                spans.append((index, first, start, end))
                first += end - start
        begin += at.size
        tensors = (torch.from_numpy(array) for array in (at.ravel(), keys.ravel(), hidden))
        made.append(Together(next(tensors), next(tensors), next(tensors), tuple(spans)))
    return Attending(tuple(made), torch.from_numpy(place))
