"""How well features retrieve and how well weights point: pure functions on tensors, no model.

In: features of a whole evaluation set, or weights over a patch grid and boxes. Out: plain numbers.

The tie rule, everywhere: what scores the same as the right answer counts against the model. So
constant features score 0 %, not 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from longclip.types import UserError

CUTOFFS = (1, 5, 10)

Score = Callable[[slice | Tensor, slice | Tensor], Tensor]
"""Numbers of C queries and X items -> [C, X] float32; equal queries and items score the same anywhere."""


class Places(NamedTuple):
    """How each query fared, [N] int64."""

    rank_N: Tensor  # the place of the best right item, 1 = first
    rival_N: Tensor  # the wrong item with the highest score; -1 where there is none


def places(
    query_NE: Tensor,
    item_ME: Tensor,
    query_owner_N: Tensor,
    item_owner_M: Tensor,
    chunk: int = 256,
    across: int = 4096,
) -> Places:
    """The place of the best right item among all items for every query, and the strongest wrong one.

    Scores are dot products in float64, rounded to float32, so that equal features tie wherever they stand;
    the rest is as in `placed`.

    Raises UserError on features that are not finite; every query must have a right item.

    >>> item = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> places(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), item, torch.tensor([0, 7]), torch.tensor([0, 7, 7]))
    Places(rank_N=tensor([1, 2]), rival_N=tensor([1, 0]))
    """
    return placed(by_cosine(query_NE, item_ME), query_owner_N, item_owner_M, chunk, across)


def placed(
    score: Score,
    query_owner_N: Tensor,
    item_owner_M: Tensor,
    chunk: int = 256,
    across: int = 4096,
    first: int = 0,
) -> Places:
    """The same by any score, of the queries from number `first` on.

    An item is right where its owner equals the query's. Place = 1 + wrong items that score at least
    as high as the best right one; other right items never stand in the way. At most `chunk` queries by
    `across` items are scored at a time; every query must have a right item.
    """
    assert torch.isin(query_owner_N, item_owner_M).all(), "a query without a right item has no rank"
    starts = range(0, len(query_owner_N), chunk)
    found = [
        _places(score, slice(first + start, first + start + len(owner_C)), owner_C, item_owner_M, across)
        for start, owner_C in zip(starts, query_owner_N.split(chunk), strict=True)
    ]
    return Places(torch.cat([part.rank_N for part in found]), torch.cat([part.rival_N for part in found]))


def by_cosine(query_NE: Tensor, item_ME: Tensor) -> Score:
    """Scores of features; raises UserError where one is not finite."""
    check_finite(query_NE, "query")
    check_finite(item_ME, "item")
    return lambda queries, items: cosine(query_NE[queries], item_ME[items])


def _places(score: Score, queries: slice, owner_C: Tensor, item_owner_M: Tensor, across: int) -> Places:
    right_W = torch.isin(item_owner_M, owner_C).nonzero()[:, 0]
    best_C = torch.full(owner_C.shape, -torch.inf, device=owner_C.device)
    for item_X in right_W.split(across):
        wrong_CX = owner_C[:, None] != item_owner_M[item_X]
        score_CX = score(queries, item_X).masked_fill_(wrong_CX, -torch.inf)
        best_C = torch.maximum(best_C, score_CX.amax(1))
    above_C = torch.zeros_like(owner_C)
    rival_C, highest_C = torch.full_like(owner_C, -1), torch.full_like(best_C, -torch.inf)
    for start in range(0, len(item_owner_M), across):
        items = slice(start, min(start + across, len(item_owner_M)))
        right_CX = owner_C[:, None] == item_owner_M[items]
        score_CX = score(queries, items).masked_fill_(right_CX, -torch.inf)
        above_C += (score_CX >= best_C[:, None]).sum(1)
        high_C, where_C = score_CX.max(1)
        rival_C = torch.where(high_C > highest_C, start + where_C, rival_C)
        highest_C = torch.maximum(high_C, highest_C)
    return Places(1 + above_C, rival_C)


def cosine(left_NE: Tensor, right_ME: Tensor) -> Tensor:
    """[N, M] float32 of L2-normalised features.

    Computed in float64, so that equal features score the same wherever they stand.
    """
    return (left_NE.double() @ right_ME.double().T).float()


def recall(ranks_N: Tensor, k: int) -> float:
    """Share of queries with a right item among the first k, in percent.

    >>> recall(torch.tensor([1, 2, 7, 1]), 1)
    50.0
    """
    return 100 * float((ranks_N <= k).double().mean())


def median_rank(ranks_N: Tensor) -> float:
    """The middle rank, the mean of the middle two for an even number.

    >>> median_rank(torch.tensor([1, 2, 7, 1]))
    1.5
    """
    ordered_N = ranks_N.double().sort().values
    return float((ordered_N[(len(ordered_N) - 1) // 2] + ordered_N[len(ordered_N) // 2]) / 2)


def retrieval(image_NE: Tensor, text_ME: Tensor, owner_M: Tensor) -> dict[str, float]:
    """Retrieval both ways, image to text (i2t) and text to image (t2i), any number of texts an image.

    image_NE, text_ME: L2-normalised. owner_M: the image each text describes, 0 to N - 1.
    Returns what `summary` says of {i2t,t2i}. An image that no text describes asks nothing (so i2t_queries
    may be below N) but stays in the way of every text.

    Raises UserError on an empty set and on features that are not finite.

    >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> scores = retrieval(image, text, torch.tensor([0, 0, 1]))
    >>> scores["i2t_r1"], round(scores["t2i_r1"], 1)
    (100.0, 66.7)
    """
    ways = directions(image_NE, text_ME, owner_M)
    return summary({way: places(*asked).rank_N for way, asked in ways.items()})


def directions(
    image_NE: Tensor, text_ME: Tensor, owner_M: Tensor
) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What `places` is asked in each direction; the i2t queries are the images of `owner_M.unique()`.

    Raises UserError on an empty set.
    """
    if len(image_NE) == 0 or len(text_ME) == 0:
        raise UserError(
            f"Retrieval over {len(image_NE)} images and {len(text_ME)} texts: there is nothing to judge. "
            "Check the benchmark's path and split."
        )
    assert int(owner_M.min()) >= 0, "an owner below 0"
    assert int(owner_M.max()) < len(image_NE), "an owner beyond the images"
    asked_Q = owner_M.unique()
    every_N = torch.arange(len(image_NE), device=owner_M.device)
    return {
        "i2t": (image_NE[asked_Q], text_ME, asked_Q, owner_M),
        "t2i": (text_ME, image_NE, owner_M, every_N),
    }


def summary(ranks: Mapping[str, Tensor]) -> dict[str, float]:
    """By direction: _r1, _r5, _r10 in percent, _median rank and number of _queries."""
    return {f"{way}_{name}": value for way, rank_N in ranks.items() for name, value in _of(rank_N).items()}


def _of(rank_N: Tensor) -> dict[str, float]:
    scores = {f"r{k}": recall(rank_N, k) for k in CUTOFFS}
    return {**scores, "median": median_rank(rank_N), "queries": float(len(rank_N))}


def pointing(
    weights_SP: Tensor, box_S4: Tensor, grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Whether the heaviest patch of each sentence has its centre inside the sentence's box.

    weights_SP: grouping weights or similarities over patches, row by row. box_S4: left, top, right,
    bottom as fractions; borders belong to the box. grid: patches down and across, a square where None.
    Returns hit_S, bool, and chance_S, how often a patch picked at random would hit: the share of
    centres inside. A patch outside that is as heavy as the heaviest inside makes it a miss, and so
    does a box between all centres.

    >>> weights = torch.tensor([[0.1, 0.7, 0.1, 0.1]])
    >>> pointing(weights, torch.tensor([[0.5, 0.0, 1.0, 0.5]]))
    (tensor([True]), tensor([0.2500]))
    """
    check_finite(weights_SP, "weight")
    side = math.isqrt(weights_SP.shape[1])
    inside_SP = centres_inside(box_S4, grid or (side, side))
    assert weights_SP.shape == inside_SP.shape, f"weights {tuple(weights_SP.shape)}, grid {grid or side}"
    inside_S = weights_SP.masked_fill(~inside_SP, -torch.inf).amax(1)
    outside_S = weights_SP.masked_fill(inside_SP, -torch.inf).amax(1)
    return inside_S > outside_S, inside_SP.float().mean(1)


def centres_inside(box_S4: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which patch centres of a grid (down, across) lie inside each box, [S, P] bool, row by row."""
    down, across = grid
    y_P = ((torch.arange(down, device=box_S4.device) + 0.5) / down).repeat_interleave(across)
    x_P = ((torch.arange(across, device=box_S4.device) + 0.5) / across).repeat(down)
    left, top, right, bottom = box_S4[:, :, None].unbind(1)
    return (left <= x_P) & (x_P <= right) & (top <= y_P) & (y_P <= bottom)


def check_finite(feature_NE: Tensor, kind: str) -> None:
    """Raise UserError on features, along any further axes, that are not finite."""
    bad = int((~feature_NE.isfinite().flatten(1).all(1)).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(feature_NE)} {kind} features are not finite, so there is nothing to rank. "
            "The model has diverged or overflowed: judge an earlier checkpoint, or run in float32."
        )
