"""Tiles of a score matrix: rows against columns, cut so that two tiles are all there is at one time.

In: rows of all processes, columns of this one, and who meets whom. Out: tiles of scores, masked; and
what a derivative by scores means for rows, columns and scale, summed tile by tile.

Local legend: R rows of all processes, X columns of this process, K slots, each an R x X problem of its
own with the same rows. In every slot column j belongs to row `start + j`. Rows are what travels between
processes: make them images, of which there are fewer than captions.

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
"""Rows and columns of a tile; two of 2 MiB in float32. From 256 x 1024 to 1024 x 2048 nothing was faster."""

CUDA_TILE = (4096, 8192)
"""A GPU wants few, large kernels; 128 MiB in float32. Chosen on paper."""


class Pairs(NamedTuple):
    """Who meets whom, as data. A pair that is left out counts in neither direction."""

    mask_XK: Tensor  # bool: the column exists
    start: int = 0  # column j belongs to row start + j
    row_mask_RK: Tensor | None = None  # bool: the row exists; None: all do
    label_R: Tensor | None = None  # int: rows with the label of a column's own row are not its negatives


class Window(NamedTuple):
    """From which score to which a negative counts, line by line; scores with scale and without kinship."""

    row_low_KR: Tensor
    row_high_KR: Tensor
    column_low_KX: Tensor
    column_high_KX: Tensor


class Outside(NamedTuple):
    """Which pairs of a tile do not count for their row, and which not for their column; None: all count."""

    row_RX: Tensor | None = None
    column_RX: Tensor | None = None


class Tile(NamedTuple):
    """A part of a slot, and the diagonal of it on which own pairs lie; that may lie outside the tile."""

    slot: int
    rows: slice
    columns: slice
    diagonal: int

    def own_columns(self, found: int) -> slice:
        """Whose the `found` own pairs of this tile are."""
        first = self.columns.start + max(0, self.diagonal)
        return slice(first, first + found)


class Tiles:
    """The tiles of a problem, and the buffers that they share: three where rows have kin, else two."""

    def __init__(
        self,
        row_RE: Tensor,
        column_XKE: Tensor,
        scale: Tensor,
        pairs: Pairs,
        kin_RKE: Tensor | None = None,
        tile: tuple[int, int] | None = None,
        window: Window | None = None,
    ) -> None:
        self.row_RE, self.column_XKE, self.scale = row_RE, column_XKE, scale
        self.pairs, self.kin_RKE, self.window = pairs, kin_RKE, window
        sizes = tile or (CUDA_TILE if row_RE.is_cuda else CPU_TILE)
        self._step_R, self._step_X = min(sizes[0], len(row_RE)), min(sizes[1], len(column_XKE))
        count = 2 if kin_RKE is None else 3
        self._buffers = [row_RE.new_empty(self._step_R * self._step_X) for _ in range(count)]
        self._absent_XK = row_RE.new_zeros(pairs.mask_XK.shape).masked_fill_(~pairs.mask_XK, -torch.inf)

    def __iter__(self) -> Iterator[Tile]:
        """Slot by slot, and there row by row."""
        rows, columns = len(self.row_RE), len(self.column_XKE)
        for slot in range(self.column_XKE.shape[1]):
            for top in range(0, rows, self._step_R):
                for left in range(0, columns, self._step_X):
                    below, right = min(top + self._step_R, rows), min(left + self._step_X, columns)
                    diagonal = top - left - self.pairs.start
                    yield Tile(slot, slice(top, below), slice(left, right), diagonal)

    def buffer(self, at: Tile, which: int) -> Tensor:
        """Memory for a tile."""
        shape = at.rows.stop - at.rows.start, at.columns.stop - at.columns.start
        return self._buffers[which][: shape[0] * shape[1]].view(shape)

    def scaled(self, at: Tile) -> Tensor:
        """scale * row."""
        return self.row_RE[at.rows] * self.scale

    def column(self, at: Tile) -> Tensor:
        """The tile's columns."""
        return self.column_XKE[at.columns, at.slot]

    def scores(self, at: Tile) -> Tensor:
        """scale * row . column of all pairs, in buffer 0."""
        return torch.mm(self.scaled(at), self.column(at).T, out=self.buffer(at, 0))

    def keep_negatives(self, z_RX: Tensor, at: Tile) -> None:
        """-inf to own pairs, and to those of their label."""
        z_RX.diagonal(at.diagonal).fill_(-torch.inf)
        if self.pairs.label_R is not None:
            label_R, start = self.pairs.label_R, self.pairs.start
            label_X = label_R[start + at.columns.start : start + at.columns.stop]
            z_RX.masked_fill_(label_R[at.rows, None] == label_X, -torch.inf)

    def keep_present(self, z_RX: Tensor, at: Tile) -> None:
        """-inf to rows and columns that do not exist."""
        z_RX.add_(self._absent_XK[at.columns, at.slot])
        if self.pairs.row_mask_RK is not None:
            z_RX.masked_fill_(~self.pairs.row_mask_RK[at.rows, at.slot, None], -torch.inf)

    def outside(self, z_RX: Tensor, at: Tile) -> Outside:
        """What the window leaves out; two tiles of truth values where there is one."""
        if self.window is None:
            return Outside()
        low_KR, high_KR, low_KX, high_KX = self.window
        low_R1, high_R1 = low_KR[at.slot, at.rows, None], high_KR[at.slot, at.rows, None]
        low_X, high_X = low_KX[at.slot, at.columns], high_KX[at.slot, at.columns]
        return Outside((z_RX < low_R1).logical_or_(z_RX > high_R1), (z_RX < low_X).logical_or_(z_RX > high_X))

    def add_kinship(self, z_RX: Tensor, at: Tile) -> None:
        """scale * kin . column, which stays in buffer 2 without scale; 0 for own pairs."""
        if self.kin_RKE is not None:
            kin_RE = self.kin_RKE[at.rows, at.slot]
            like_RX = torch.mm(kin_RE, self.column(at).T, out=self.buffer(at, 2))
            like_RX.diagonal(at.diagonal).zero_()
            z_RX.addcmul_(like_RX, self.scale)


class Gradients:
    """Sums over tiles of what a derivative by scores means for rows, columns and scale."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.row_RE, self.column_XKE = torch.zeros_like(tiles.row_RE), torch.zeros_like(tiles.column_XKE)
        self.scale = torch.zeros_like(tiles.scale)

    def add(self, d_RX: Tensor, at: Tile) -> None:
        """d_RX must not lie in buffer 0, which is free by now."""
        tiles = self.tiles
        self.row_RE[at.rows].addmm_(d_RX, tiles.column(at))
        self.column_XKE[at.columns, at.slot].addmm_(d_RX.T, tiles.scaled(at))
        if tiles.kin_RKE is not None:
            self.scale += torch.mul(d_RX, tiles.buffer(at, 2), out=tiles.buffer(at, 0)).sum()

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """By rows, columns and scale. Rows were summed without their factor `scale`, which gives its own."""
        self.scale += self.row_RE.flatten().dot(self.tiles.row_RE.flatten())
        return self.row_RE.mul_(self.tiles.scale), self.column_XKE, self.scale
