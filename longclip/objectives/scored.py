"""Contrast by scores that are no dot product of two vectors: a function of some rows and columns makes them.

In: that function, rows of all processes, columns of this one, the row that each column belongs to. Out: as in
`tiled`, for every row and every column the log-sum-exp over its negatives, and over them a softmax loss. The
scores of a tile are alive at a time, and what the function needs to make them; the backward pass makes each
tile again.

A row may see other scores than a column does (late interaction has a mean over patches one way and one over
words the other): the function returns both.
Local legend: R rows of all processes, X columns of this one in one slot, K slots, r and x some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from longclip import dist

Score = Callable[..., tuple[Tensor, Tensor]]
"""(*row tensors, *column tensors, scale) -> scores [r, x] as rows see them, and as columns see them."""


class Columns(NamedTuple):
    """The captions of one slot that exist on this process, in the order in which they are worked on."""

    tensors: Sequence[Tensor]  # [X, ...] each
    own_X: Tensor  # int64: the row that each belongs to
    lengths_X: NDArray[np.int64] | None = (
        None  # how far second axes are filled: tiles are cut to their longest
    )


class Seen(NamedTuple):
    """Where there is no negative: the lowest number of the dtype, not -inf. The best have no gradient."""

    own_2X: Tensor  # score with the own row, as the row and as the column sees it
    row_negatives_R: Tensor  # log-sum-exp over a row's negatives among this process's columns
    column_negatives_X: Tensor  # log-sum-exp over a column's negatives
    row_best_R: Tensor  # the highest negative
    column_best_X: Tensor


def contrast(
    score: Score, rows: Sequence[Tensor], columns: Columns, scale: Tensor, size: tuple[int, int]
) -> Seen:
    """Log-sum-exp over the negatives of every row and of every column of one slot.

        row r: log sum_j exp a_rj,    column j: log sum_r exp c_rj,    (a, c) = score(rows, columns, scale)

    both without own pairs. Scores have the dtype of `scale`. size: rows and columns of a tile. Gradient,
    once, to what the function is given, not to what it closes over.
    """
    plan = _Plan(score, len(rows), size, columns.own_X, columns.lengths_X)
    return Seen(*_Contrast.apply(plan, *rows, *columns.tensors, scale))


def info_nce(
    score: Score,
    rows: Sequence[Tensor],
    slots: Sequence[Columns],
    mask_GK: Tensor,
    scale: Tensor,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Symmetric softmax cross-entropy of every image and its captions, every slot a problem of its own.

        L = 1/n sum over present (b, k) of 1/2 [CE_j(a_bjk; j = b) + CE_i(c_ibk; i = b)]

    n is the number of present captions, as in `contrastive.info_nce`. rows: of all images. mask_GK: which
    captions exist; this process's are those of `slots`. Returns this process's share of the loss and, without
    gradient, of the top-1 accuracy of both directions, ties wrong.
    """
    seen = [contrast(score, rows, columns, scale, size) for columns in slots]
    local = len(mask_GK) // dist.world()
    start = dist.rows(local).start
    both_K2R = torch.stack([torch.stack((found.row_negatives_R, found.row_best_R)) for found in seen])
    parts_P2KB = dist.exchange(both_K2R.unflatten(2, (-1, local)).permute(2, 1, 0, 3))
    row_KB, row_best_KB = parts_P2KB[:, 0].logsumexp(0), parts_P2KB[:, 1].detach().amax(0)
    rounding = 8 * torch.finfo(scale.dtype).eps * scale.detach().abs()
    loss, right = scale * 0, scale.detach() * 0
    for k, (columns, found) in enumerate(zip(slots, seen, strict=True)):
        image_X = columns.own_X - start
        negatives_2X = torch.stack((row_KB[k, image_X], found.column_negatives_X))
        best_2X = torch.stack((row_best_KB[k, image_X], found.column_best_X))
        loss = loss - logsigmoid(found.own_2X - negatives_2X).sum() / 2
        right = right + (found.own_2X.detach() - rounding > best_2X).sum() / 2
    share = dist.world() / mask_GK.sum().clamp_min(1)
    return loss * share, right * share


class _Plan(NamedTuple):
    """What a contrast is, beside its tensors."""

    score: Score
    rows: int  # how many tensors have rows; the others have columns, and the last is the scale
    size: tuple[int, int]
    own_X: Tensor
    lengths_X: NDArray[np.int64] | None

    def tiles(self, given: Sequence[Tensor]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows and columns of each tile, and which of its pairs belong together."""
        row_R = torch.arange(len(given[0]), device=self.own_X.device)
        for left in range(0, len(self.own_X), self.size[1]):
            across = slice(left, left + self.size[1])
            for top in range(0, len(row_R), self.size[0]):
                down = slice(top, top + self.size[0])
                yield down, across, row_R[down, None] == self.own_X[across]

    def places(self, given: Sequence[Tensor], down: slice, across: slice) -> list[Any]:
        """Where in each tensor a tile lies."""
        cut = across if self.lengths_X is None else (across, slice(int(self.lengths_X[across].max())))
        return [down] * self.rows + [cut] * (len(given) - self.rows - 1) + [...]


class _Contrast(torch.autograd.Function):
    """Forward keeps the log-sum-exps only; backward makes exp(score - log-sum-exp) again, tile by tile."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *given: Tensor) -> tuple[Tensor, ...]:
        counts, scale = (len(given[0]), len(plan.own_X)), given[-1]
        lowest = torch.finfo(scale.dtype).min
        own_2X = scale.new_zeros(2, counts[1])
        sums, bests = ([scale.new_full((count,), lowest) for count in counts] for _ in range(2))
        for down, across, own_rx in plan.tiles(given):
            both = plan.score(*(x[at] for x, at in zip(given, plan.places(given, down, across), strict=True)))
            for way, (scores_rx, part) in enumerate(zip(both, (down, across), strict=True)):
                own_2X[way, across] += scores_rx.where(own_rx, 0).sum(0)
                negative_rx = scores_rx.masked_fill(own_rx, lowest)
                sums[way][part] = torch.logaddexp(sums[way][part], negative_rx.logsumexp(1 - way))
                bests[way][part] = torch.maximum(bests[way][part], negative_rx.amax(1 - way))
        ctx.save_for_backward(*given, *sums)
        ctx.plan = plan
        ctx.mark_non_differentiable(*bests)
        return own_2X, *sums, *bests

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, row_R, column_X = ctx.saved_tensors
        plan, wanted, (d_own_2X, d_row_R, d_column_X, *_) = ctx.plan, ctx.needs_input_grad[1:], grads
        totals = [torch.zeros_like(x) if needed else None for x, needed in zip(given, wanted, strict=True)]
        for down, across, own_rx in plan.tiles(given):
            places = plan.places(given, down, across)
            tile = [
                x[at].detach().requires_grad_(needed)
                for x, at, needed in zip(given, places, wanted, strict=True)
            ]
            with torch.enable_grad():
                a_rx, c_rx = plan.score(*tile)
            d_a_rx = (a_rx.detach() - row_R[down, None]).exp() * d_row_R[down, None]
            d_c_rx = (c_rx.detach() - column_X[across]).exp() * d_column_X[across]
            d_own_ax, d_own_cx = d_own_2X[:, None, across]
            d_both = d_own_ax.where(own_rx, d_a_rx), d_own_cx.where(own_rx, d_c_rx)
            found = iter(torch.autograd.grad((a_rx, c_rx), [x for x in tile if x.requires_grad], d_both))
            for total, at in zip(totals, places, strict=True):
                if total is not None:
                    total[at].add_(next(found))
        return (None, *totals)
