"""Tiles of a score matrix: rows against columns, cut so that two tiles are all there is at one time.

In: rows of this process, columns of all processes, and who meets whom. Out: tiles of scores, masked;
and what a derivative by scores means for rows, columns and scale, summed tile by tile.

Local legend: R rows of this process, X columns of all processes, K slots, each an R x X problem of its
own over the same rows. In every slot row r owns column `start + r`: the pair that belongs together.

A tile is made of torch's own matrix products: they are four fifths of the time on a processor, where a
tile never leaves the cache. Every product writes into a given tensor (`out=`, in place), which autocast
leaves alone: scores have the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_TILE = (512, 1024)
"""Rows and columns of a tile. Two of 2 MiB in float32 stay in the cache, and are large enough for
matrix products at full speed (python -m benchmarks --only losses)."""

CUDA_TILE = (4096, 8192)
"""A GPU wants few, large kernels; 128 MiB in float32."""


class Pairs(NamedTuple):
    """Who meets whom, as data. A pair that is left out counts in neither direction."""

    mask_XK: Tensor  # bool: the column exists
    start: int = 0  # row r owns column start + r
    row_mask_RK: Tensor | None = None  # bool: the row exists; None: all do
    label_X: Tensor | None = None  # int: columns with the label of a row's own one are not its negatives


class Tile(NamedTuple):
    slot: int
    rows: slice
    columns: slice
    own: slice  # the rows' own columns
    diagonal: int  # on which diagonal of the tile own pairs lie; it may lie outside

    def own_rows(self, found: int) -> slice:
        """Whose the `found` own pairs of this tile are."""
        first = self.rows.start + max(0, -self.diagonal)
        return slice(first, first + found)


class Tiles:
    """The tiles of a problem, and the buffers that they share: three where there is a margin, else two."""

    def __init__(
        self,
        row_RE: Tensor,
        column_XKE: Tensor,
        scale: Tensor,
        pairs: Pairs,
        margin: float,
        tile: tuple[int, int] | None,
    ) -> None:
        self.row_RE, self.column_XKE, self.scale = row_RE, column_XKE, scale
        self.pairs, self.margin = pairs, margin
        sizes = tile or (CUDA_TILE if row_RE.is_cuda else CPU_TILE)
        self._step_R, self._step_X = min(sizes[0], len(row_RE)), min(sizes[1], len(column_XKE))
        self._buffers = [row_RE.new_empty(self._step_R * self._step_X) for _ in range(3 if margin else 2)]
        self._absent_XK = row_RE.new_zeros(pairs.mask_XK.shape).masked_fill_(~pairs.mask_XK, -torch.inf)

    def __iter__(self) -> Iterator[Tile]:
        """Slot by slot, and there row by row."""
        rows, columns = len(self.row_RE), len(self.column_XKE)
        start = self.pairs.start
        for slot in range(self.column_XKE.shape[1]):
            for top in range(0, rows, self._step_R):
                below = min(top + self._step_R, rows)
                for left in range(0, columns, self._step_X):
                    across = slice(left, min(left + self._step_X, columns))
                    own = slice(start + top, start + below)
                    yield Tile(slot, slice(top, below), across, own, start + top - left)

    def buffer(self, at: Tile, which: int) -> Tensor:
        """Memory for a tile."""
        shape = at.rows.stop - at.rows.start, at.columns.stop - at.columns.start
        return self._buffers[which][: shape[0] * shape[1]].view(shape)

    def scaled(self, at: Tile) -> Tensor:
        """scale * row."""
        return self.row_RE[at.rows] * self.scale

    def column(self, at: Tile) -> Tensor:
        return self.column_XKE[at.columns, at.slot]

    def scores(self, at: Tile) -> Tensor:
        """scale * row . column of all pairs, in buffer 0."""
        return torch.mm(self.scaled(at), self.column(at).T, out=self.buffer(at, 0))

    def keep_negatives(self, z_RX: Tensor, at: Tile) -> None:
        """-inf to own pairs, and to those of their label."""
        z_RX.diagonal(at.diagonal).fill_(-torch.inf)
        if self.pairs.label_X is not None:
            label_X = self.pairs.label_X
            z_RX.masked_fill_(label_X[at.own, None] == label_X[at.columns], -torch.inf)

    def keep_present(self, z_RX: Tensor, at: Tile) -> None:
        """-inf to rows and columns that do not exist."""
        z_RX.add_(self._absent_XK[at.columns, at.slot])
        if self.pairs.row_mask_RK is not None:
            z_RX.masked_fill_(~self.pairs.row_mask_RK[at.rows, at.slot, None], -torch.inf)

    def add_margin(self, z_RX: Tensor, at: Tile) -> None:
        """scale * margin * own column of the row . column, which stays in buffer 2 without scale."""
        if self.margin:
            own_RE = self.column_XKE[at.own, at.slot] * self.pairs.mask_XK[at.own, at.slot, None]
            like_RX = torch.mm(own_RE.mul_(self.margin), self.column(at).T, out=self.buffer(at, 2))
            like_RX.diagonal(at.diagonal).zero_()
            z_RX.addcmul_(like_RX, self.scale)


class Gradients:
    """Sums over tiles of what a derivative by scores means for rows, columns and scale."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.row_RE, self.column_XKE = torch.zeros_like(tiles.row_RE), torch.zeros_like(tiles.column_XKE)
        self.scale = torch.zeros_like(tiles.scale)

    def add(self, d_RX: Tensor, at: Tile) -> None:
        """Buffer 0 is free by now."""
        tiles = self.tiles
        self.row_RE[at.rows].addmm_(d_RX, tiles.column(at))
        self.column_XKE[at.columns, at.slot].addmm_(d_RX.T, tiles.scaled(at))
        if tiles.margin:
            self.scale += torch.mul(d_RX, tiles.buffer(at, 2), out=tiles.buffer(at, 0)).sum()

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """By rows, columns and scale. Rows were summed without their factor `scale`, which gives its own."""
        self.scale += self.row_RE.flatten().dot(self.tiles.row_RE.flatten())
        return self.row_RE.mul_(self.tiles.scale), self.column_XKE, self.scale
