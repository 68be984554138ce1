"""Contrast by tiles: what rows and columns see of each other, never all of it at once.

In: rows of all processes, columns of this one, and who meets whom. Out: for every row and every column
the log-sum-exp over its negatives, both directions from one pass over the scores, from which a softmax
loss is arithmetic on vectors; or the sum of a logistic loss. Beyond inputs, gradients and such vectors
there are two tiles, whatever the batch (`tiles`, where the legend is: R, X, K).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from longclip.objectives.tiles import Gradients, Pairs, Tiles, Window


class Contrast(NamedTuple):
    """What rows and columns see. Where there is no negative: the lowest number of the dtype, not -inf."""

    own_KX: Tensor  # scale * own row . column; means nothing where the column does not exist
    row_negatives_KR: Tensor  # log-sum-exp over a row's negatives among this process's columns
    column_negatives_KX: Tensor  # log-sum-exp over a column's negatives
    row_best_KR: Tensor  # the highest negative, without kinship; no gradient
    column_best_KX: Tensor


def contrast(
    row_RE: Tensor,
    column_XKE: Tensor,
    scale: Tensor,
    pairs: Pairs,
    kin_RKE: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    window: Window | None = None,
) -> Contrast:
    """Log-sum-exp over the negatives of every row and of every column, slot by slot.

        row r:     log sum_j exp z_rj,    column j:  log sum_r exp z_rj,    both without own pairs
        z_rj = s (x_r . y_j + stopgrad(w_r . y_j))

    s is `scale`; w is `kin_RKE`, which may raise negatives (HN-CLIP's margin). Softmax cross-entropy is
    then -log sigmoid(own - negatives), and several processes join what a row sees of each of them by
    another log-sum-exp. tile: rows and columns of one. window: negatives outside it do not count in the
    log-sum-exps (`choosing`). Gradient, once, to rows, columns and scale.
    """
    return Contrast(*_Contrast.apply(row_RE, column_XKE, scale, pairs, kin_RKE, tile, window))


def logistic(
    row_RE: Tensor,
    column_XKE: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Sum over all pairs of -log sigmoid(z) for a column and its own row, -log sigmoid(-z) for others.

        z_rj = s x_r . y_j + c

    s is `scale`, c is `bias`. Gradient, once, to all four tensors.
    """
    total: Tensor = _Logistic.apply(row_RE, column_XKE, scale, bias, pairs, tile)
    return total


class _Contrast(torch.autograd.Function):
    """Forward keeps the log-sum-exps only; backward makes P = exp(z - log-sum-exp) again, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        row_RE: Tensor,
        column_XKE: Tensor,
        scale: Tensor,
        pairs: Pairs,
        kin_RKE: Tensor | None,
        tile: tuple[int, int] | None,
        window: Window | None,
    ) -> tuple[Tensor, ...]:
        tiles = Tiles(row_RE, column_XKE, scale, pairs, kin_RKE, tile, window)
        slots, lowest = column_XKE.shape[1], torch.finfo(row_RE.dtype).min
        row_KR, row_best_KR = (row_RE.new_full((slots, len(row_RE)), lowest) for _ in range(2))
        own_KX, column_KX, column_best_KX = (
            row_RE.new_full((slots, len(column_XKE)), lowest) for _ in range(3)
        )
        for at in tiles:
            k, rows, columns = at.slot, at.rows, at.columns
            z_RX = tiles.scores(at)
            own = z_RX.diagonal(at.diagonal)
            own_KX[k, at.own_columns(len(own))] = own
            tiles.keep_negatives(z_RX, at)
            tiles.keep_present(z_RX, at)
            row_best_KR[k, rows].clamp_min_(z_RX.amax(1))
            column_best_KX[k, columns].clamp_min_(z_RX.amax(0))
            outside = tiles.outside(z_RX, at)
            tiles.add_kinship(z_RX, at)
            _log_add_exp(row_KR[k, rows], inside(z_RX, outside.row_RX), 1, tiles.buffer(at, 1))
            _log_add_exp(column_KX[k, columns], inside(z_RX, outside.column_RX), 0, tiles.buffer(at, 1))
        ctx.save_for_backward(row_RE, column_XKE, scale, row_KR, column_KX)
        ctx.given = pairs, kin_RKE, tile, window
        ctx.mark_non_differentiable(row_best_KR, column_best_KX)
        return own_KX, row_KR, column_KX, row_best_KR, column_best_KX

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dz = a_r exp(z - lse_r) + b_j exp(z - lse_j) for negatives, that of own scores for own pairs."""
        row_RE, column_XKE, scale, row_KR, column_KX = ctx.saved_tensors
        d_own_KX, d_row_KR, d_column_KX, *_ = grads
        tiles = Tiles(row_RE, column_XKE, scale, *ctx.given)
        total = Gradients(tiles)
        for at in tiles:
            k, rows, columns = at.slot, at.rows, at.columns
            z_RX = tiles.scores(at)
            tiles.keep_negatives(z_RX, at)
            tiles.keep_present(z_RX, at)
            outside = tiles.outside(z_RX, at)
            tiles.add_kinship(z_RX, at)
            d_RX = torch.sub(z_RX, column_KX[k, columns], out=tiles.buffer(at, 1)).exp_()
            _forget(d_RX, outside.column_RX)
            d_RX.mul_(d_column_KX[k, columns])
            _forget(z_RX.sub_(row_KR[k, rows, None]).exp_(), outside.row_RX)
            d_RX.addcmul_(z_RX, d_row_KR[k, rows, None])
            own = d_RX.diagonal(at.diagonal)
            own.copy_(d_own_KX[k, at.own_columns(len(own))])
            total.add(d_RX, at)
        return *total.finish(), None, None, None, None


class _Logistic(torch.autograd.Function):
    """Its derivative needs nothing that only the last tile tells: forward makes it, backward hands it out."""

    @staticmethod
    def forward(
        ctx: Any,
        row_RE: Tensor,
        column_XKE: Tensor,
        scale: Tensor,
        bias: Tensor,
        pairs: Pairs,
        tile: tuple[int, int] | None,
    ) -> Tensor:
        tiles = Tiles(row_RE, column_XKE, scale, pairs, tile=tile)
        total, loss, d_bias = Gradients(tiles), torch.zeros_like(bias), torch.zeros_like(bias)
        for at in tiles:
            z_RX = tiles.scores(at).add_(bias)
            own = z_RX.diagonal(at.diagonal).neg()
            tiles.keep_negatives(z_RX, at)
            z_RX.diagonal(at.diagonal).copy_(own)
            tiles.keep_present(z_RX, at)
            loss += softplus(z_RX, threshold=40).sum()
            d_RX = torch.sigmoid(z_RX, out=tiles.buffer(at, 1))
            d_RX.diagonal(at.diagonal).neg_()
            d_bias += d_RX.sum()
            total.add(d_RX, at)
        ctx.save_for_backward(*total.finish(), d_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *(d_loss * gradient for gradient in ctx.saved_tensors), None, None


def inside(z_RX: Tensor, outside_RX: Tensor | None) -> Tensor:
    """-inf to what is outside: a tile of its own, since rows and columns leave out different pairs."""
    return z_RX if outside_RX is None else z_RX.masked_fill(outside_RX, -torch.inf)


def _forget(p_RX: Tensor, outside_RX: Tensor | None) -> None:
    """0 to what is outside, in place, before anything multiplies it: it may be infinite."""
    if outside_RX is not None:
        p_RX.masked_fill_(outside_RX, 0)


def _log_add_exp(total: Tensor, z_RX: Tensor, axis: int, buffer: Tensor) -> None:
    """total = log(exp(total) + sum exp(z) along the axis), stable, in place."""
    # Not below the lowest number: -inf - -inf would be NaN where a line has no negative.
    top = z_RX.amax(axis, keepdim=True).clamp_min_(torch.finfo(z_RX.dtype).min)
    sums = torch.sub(z_RX, top, out=buffer).exp_().sum(axis)
    torch.logaddexp(total, sums.log_().add_(top.squeeze(axis)), out=total)
