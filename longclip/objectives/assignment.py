"""The assignment problem for many small matrices at once, where they lie: nothing waits for the host.

In: the costs of giving row k of matrix b the column n. Out: for every row a column of its own, at the least
total cost of each matrix. Values decide nothing about which operations run, so that this works on any
device and on tensors that only pretend to hold numbers; it takes K (K + 1) / 2 small steps for K rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _State(NamedTuple):
    """Prices, and who has whom so far; -1: nobody."""

    price_BK: Tensor
    price_BN: Tensor
    column_BK: Tensor
    owner_BN: Tensor  # a column's row


class _Paths(NamedTuple):
    """Shortest paths from a new row to the columns that were reached on the way to a free one."""

    reached_BN: Tensor  # bool
    distance_BN: Tensor
    before_BN: Tensor  # the row from which a column was reached
    free_B1: Tensor  # the free column
    far_B1: Tensor  # its distance


@torch.no_grad()
def assign(cost_BKN: Tensor) -> Tensor:
    """For each row a column of its own, such that each matrix's costs sum to the least possible, [B, K].

    Jonker and Volgenant 1987: rows enter one by one, each along the shortest path to a free column in costs
    reduced by prices, which keep those of owned columns at 0. Costs are finite, and K <= N. A row that
    costs the same everywhere is in nobody's way.
    """
    images, rows, columns = cost_BKN.shape
    assert rows <= columns, f"{rows} rows cannot have a column of their own among {columns}"
    nobody = torch.full((images, rows + columns), -1, device=cost_BKN.device)
    state = _State(
        cost_BKN.new_zeros(images, rows),
        cost_BKN.new_zeros(images, columns),
        *nobody.split((rows, columns), 1),
    )
    for row in range(rows):
        paths = _search(cost_BKN, state, row)
        state = _enter(_priced(state, paths, row), paths, row)
    return state.column_BK


def _search(cost_BKN: Tensor, state: _State, row: int) -> _Paths:
    """Dijkstra's: reach the nearest column again and again until it is free, at most row + 1 times."""
    distance_BN = torch.full_like(state.price_BN, torch.inf)
    before_BN, reached_BN = (
        torch.zeros_like(state.owner_BN),
        torch.zeros_like(state.owner_BN, dtype=torch.bool),
    )
    here_B1 = torch.full_like(state.owner_BN[:, :1], row)
    free_B1, far_B1 = torch.full_like(here_B1, -1), torch.zeros_like(distance_BN[:, :1])
    number_N = torch.arange(distance_BN.shape[1], device=distance_BN.device)
    for _ in range(row + 1):
        going_B1 = free_B1 < 0
        cost_BN = cost_BKN.take_along_dim(here_B1[..., None], 1)[:, 0]
        through_BN = far_B1 + cost_BN - state.price_BK.gather(1, here_B1) - state.price_BN
        nearer_BN = going_B1 & ~reached_BN & (through_BN < distance_BN)
        distance_BN = torch.where(nearer_BN, through_BN, distance_BN)
        before_BN = torch.where(nearer_BN, here_B1, before_BN)
        next_B1 = distance_BN.masked_fill(reached_BN, torch.inf).argmin(1, keepdim=True)
        reached_BN = reached_BN | (going_B1 & (number_N == next_B1))
        far_B1 = torch.where(going_B1, distance_BN.gather(1, next_B1), far_B1)
        owner_B1 = state.owner_BN.gather(1, next_B1)
        free_B1 = torch.where(going_B1 & (owner_B1 < 0), next_B1, free_B1)
        here_B1 = torch.where(going_B1 & (owner_B1 >= 0), owner_B1, here_B1)
    return _Paths(reached_BN, distance_BN, before_BN, free_B1, far_B1)


def _priced(state: _State, paths: _Paths, row: int) -> _State:
    """Prices by which every edge of the shortest paths costs 0, and no edge less."""
    gap_BN = torch.where(paths.reached_BN, paths.far_B1 - paths.distance_BN, 0)
    owned_BN = gap_BN.masked_fill(state.owner_BN < 0, 0)
    price_BK = state.price_BK.scatter_add(1, state.owner_BN.clamp_min(0), owned_BN)
    price_BK[:, row] += paths.far_B1[:, 0]
    return state._replace(price_BK=price_BK, price_BN=state.price_BN - gap_BN)


def _enter(state: _State, paths: _Paths, row: int) -> _State:
    """Everybody on the path from the free column back to the new row takes the column that it reached."""
    column_BK, owner_BN = state.column_BK, state.owner_BN
    number_K, number_N = (torch.arange(x.shape[1], device=x.device) for x in (column_BK, owner_BN))
    at_B1, going_B1 = paths.free_B1, torch.ones_like(paths.free_B1, dtype=torch.bool)
    for _ in range(row + 1):
        taker_B1 = paths.before_BN.gather(1, at_B1)
        left_B1 = column_BK.gather(1, taker_B1)
        owner_BN = torch.where(going_B1 & (number_N == at_B1), taker_B1, owner_BN)
        column_BK = torch.where(going_B1 & (number_K == taker_B1), at_B1, column_BK)
        going_B1 = going_B1 & (taker_B1 != row)
        at_B1 = torch.where(going_B1, left_B1, at_B1)
    return state._replace(column_BK=column_BK, owner_BN=owner_BN)
