"""Which negatives count: those that are not false ones, and of these the hardest.

In: rows of all processes, columns of this one, and who meets whom (`tiles`, where the legend is: R, X, K).
Out: a `Window` of scores for every row and every column, the same whatever the number of processes.
Local legend: c negatives that are chosen, Y lines (rows or columns) of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longclip import dist
from longclip.objectives.tiled import inside
from longclip.objectives.tiles import Pairs, Tiles, Window
from longclip.types import UserError


class Negatives(NamedTuple):
    """Which negatives a pair is contrasted with. By itself: all of them."""

    false_above: float | None = None  # those that beat the pair itself by more are taken for true
    hardest: int | None = None  # so many of the others, the highest scores


def checked(negatives: Negatives, label_smoothing: float) -> Negatives:
    """`negatives` itself; raises UserError where it makes no sense."""
    above, hardest = negatives
    if above is not None and above < 0:
        raise UserError(f"false_above is {above}, but must be at least 0, or null to keep all negatives.")
    if hardest is not None and hardest < 1:
        raise UserError(f"hardest is {hardest}, but must be at least 1, or null to keep all negatives.")
    if negatives != Negatives() and label_smoothing:
        raise UserError(
            f"label_smoothing={label_smoothing} holds a pair against all of the batch, of which false_above="
            f"{above} and hardest={hardest} leave out part; set label_smoothing to 0, or both to null."
        )
    return negatives


def window(
    row_RE: Tensor,
    column_XKE: Tensor,
    scale: Tensor,
    pairs: Pairs,
    negatives: Negatives,
    gather: Callable[[Tensor], Tensor] = dist.gather,
) -> Window | None:
    """The negatives of a row or column that score at most alpha, and of these the c highest.

        alpha = s (x . y+ + beta),   beta = `false_above`,   c = `hardest`

    UniME, Gu et al. 2025, its second stage: beta = 0.1, c = 8. y+ is what belongs to x. Fewer than c are all
    taken (the paper repeats some); what ties with the last is taken, too. No gradient: which negatives count
    is decided, not learned. Choosing the hardest takes a pass over all scores of its own. None: all count.
    """
    if negatives == Negatives():
        return None
    with torch.no_grad():
        slack = 8 * torch.finfo(scale.dtype).eps * scale  # products of other tiles are rounded otherwise
        high_XK = torch.full_like(column_XKE[..., 0], torch.inf)
        if negatives.false_above is not None:
            own_XE = row_RE[pairs.start : pairs.start + len(column_XKE)]
            own_XK = (own_XE[:, None] * column_XKE).sum(-1)
            high_XK = scale * (own_XK + negatives.false_above) + slack
        high_KR, none_KR = gather(high_XK).T, row_RE.new_full((high_XK.shape[1], len(row_RE)), -torch.inf)
        seen = Window(none_KR, high_KR, torch.full_like(high_XK, -torch.inf).T, high_XK.T)
        if negatives.hardest is None:
            return seen
        row_low_KX, column_low_KX = _lowest_of_hardest(
            Tiles(row_RE, column_XKE, scale, pairs, window=seen), negatives.hardest
        )
        row_low_KR = gather((row_low_KX - slack).T.contiguous()).T
        return seen._replace(row_low_KR=row_low_KR, column_low_KX=column_low_KX - slack)


def _lowest_of_hardest(tiles: Tiles, count: int) -> tuple[Tensor, Tensor]:
    """The score of the count-th hardest negative of this process's rows and of its columns, [K, X] each."""
    columns, slots = tiles.column_XKE.shape[:2]
    row_KRc = tiles.row_RE.new_full((slots, len(tiles.row_RE), count), -torch.inf)
    column_KXc = tiles.row_RE.new_full((slots, columns, count), -torch.inf)
    for at in tiles:
        k, z_RX = at.slot, tiles.scores(at)
        tiles.keep_negatives(z_RX, at)
        tiles.keep_present(z_RX, at)
        outside = tiles.outside(z_RX, at)
        row_KRc[k, at.rows] = _highest(row_KRc[k, at.rows], inside(z_RX, outside.row_RX))
        column_KXc[k, at.columns] = _highest(column_KXc[k, at.columns], inside(z_RX, outside.column_RX).T)
    parts_PKXc = dist.exchange(row_KRc.unflatten(1, (-1, columns)).movedim(1, 0))
    row_KXc = parts_PKXc.movedim(0, -2).flatten(-2).topk(count).values
    return row_KXc[..., -1], column_KXc[..., -1]


def _highest(best_Yc: Tensor, z_YX: Tensor) -> Tensor:
    """The best so far and those of one more tile."""
    return torch.cat((best_Yc, z_YX), 1).topk(best_Yc.shape[1]).values
