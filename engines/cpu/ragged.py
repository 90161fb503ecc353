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
# Queries of one product at most: what is masked for all of them is not computed.
QUERIES = 256
# Queries and keys of a product are filled up to multiples of so many: oneDNN compiles a bf16 kernel for each pair of
# numbers, half a MB and half a ms, and MKL's fp32 products of 96 queries by 112 keys take no longer than of 85 by 108.
PRODUCTS_OF = 16
# Blocks that have at most so many times the queries and keys of the first of their group, the one with fewest queries,
# are filled up and multiplied together: one product of many is sooner done than many of one, and all cores have work.
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
class QueryBlock:
    """`count` queries of one piece from the query `first` on, and the m tokens that they attend to: the spans `keys`.

    `masked` bool [count, m] is true where a query must not attend to a token.
    """

    first: int
    count: int
    keys: tuple[tuple[int, int], ...]
    masked: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AttentionGroup:
    """P blocks of queries of like size, multiplied in one batch: n queries and m keys of each, filled up.

    queries int64 [P n] are places among the queries, keys int64 [P m] among the tokens; bias float32 [P, n, 1, m] is
    added to the scores: -inf where a query must not attend to a key, else 0. (Adding takes a tenth of what filling by a
    mask of booleans does.) `spans` are (block, first key, first token, end of tokens): which tokens the keys of a block
    are.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor
    spans: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class AttentionLayout:
    """Who attends to whom. The outputs of all groups, one after another, hold that of query i at place[i].

    `place` is int64, of as many queries as there are: tokens, or the needed ones in the last block.
    """

    groups: tuple[AttentionGroup, ...]
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
    attending: AttentionLayout
    needed: Tensor
    attending_last: AttentionLayout  # in the last block, where the needed tokens are the only queries
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
        attending=grouped(list(query_blocks(pieces, spans, np.arange(tokens))), filled),
        needed=torch.from_numpy(np.pad(needed, (0, queries - len(needed)), constant_values=filled - 1)),
        attending_last=grouped(list(query_blocks(pieces, spans, needed)), queries),
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


def query_blocks(pieces: list[Piece], spans: list[tuple[int, int]], queries: Ints) -> Iterator[QueryBlock]:
    """Yield the `queries` of each piece, ascending places among all tokens, in blocks of QUERIES at most."""
    for piece, (start, end) in zip(pieces, spans, strict=True):
        first, last = (int(place) for place in np.searchsorted(queries, (start, end)))
        for at in range(first, last, QUERIES):
            mine = queries[at : min(at + QUERIES, last)]
            seen = int(mine[-1]) + 1
            # Of the tokens before `start`, those of earlier pieces, none is masked.
            masked = np.arange(start - piece.start, seen) > mine[:, None]
            yield QueryBlock(at, len(mine), (*(spans[earlier] for earlier in piece.before), (start, seen)), masked)


def grouped(blocks: list[QueryBlock], queries: int) -> AttentionLayout:
    """Return the blocks in groups of like size; `queries` are all of theirs and at least one more, which only fills."""
    groups: list[list[QueryBlock]] = []
    for block in sorted(blocks, key=lambda block: block.masked.shape):
        n, m = block.masked.shape
        if groups and n <= ALIKE * groups[-1][0].masked.shape[0] and m <= ALIKE * groups[-1][0].masked.shape[1]:
            groups[-1].append(block)
        else:
            groups.append([block])
    # The first group's blocks have room for one query more than its longest: queries that only fill have their output
    # there. What it is does not matter: nothing attends to it and no loss needs it, so its gradient is zero.
    place, begin = np.full(queries, max(block.count for block in groups[0])), 0
    made: list[AttentionGroup] = []
    for group in groups:
        longest = [max(block.masked.shape[axis] for block in group) for axis in (0, 1)]
        n, m = (-(-count // PRODUCTS_OF) * PRODUCTS_OF for count in (longest[0] + (not made), longest[1]))
        at, keys = np.full((len(group), n), queries - 1), np.zeros((len(group), m), np.int64)
        bias = np.full((len(group), n, 1, m), -np.inf, np.float32)
        bias[:, :, :, 0] = 0  # what only fills attends to one key: a softmax over none is no number
        spans = []
        for index, block in enumerate(group):
            at[index, : block.count] = np.arange(block.first, block.first + block.count)
            place[at[index]] = begin + index * n + np.arange(n)
            bias[index, : block.count, 0, : block.masked.shape[1]] = np.where(block.masked, -np.inf, 0)
            first = 0
            for start, end in block.keys:
                keys[index, first : first + end - start] = np.arange(start, end)
                spans.append((index, first, start, end))
                first += end - start
        begin += at.size
        tensors = (torch.from_numpy(array) for array in (at.ravel(), keys.ravel(), bias))
        made.append(AttentionGroup(next(tensors), next(tensors), next(tensors), tuple(spans)))
    return AttentionLayout(tuple(made), torch.from_numpy(place))
