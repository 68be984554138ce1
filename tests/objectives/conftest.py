"""Random embeddings with ragged captions, on one process."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from longclip import dist
from longclip.types import Embeddings


@pytest.fixture
def embed() -> Callable[..., Embeddings]:
    def make(images: int = 6, slots: int = 3, width: int = 8, patches: int = 5, seed: int = 0) -> Embeddings:
        random = torch.Generator().manual_seed(seed)
        mask_BK = torch.rand(images, slots, generator=random) < 0.7
        mask_BK[0] = True
        text_BKE = normalize(torch.randn(images, slots, width, generator=random), dim=-1)
        return Embeddings(
            image_BE=normalize(torch.randn(images, width, generator=random), dim=-1),
            text_BKE=text_BKE * mask_BK[..., None],
            mask_BK=mask_BK,
            slots={"sub": slice(0, slots)},
            scale=torch.tensor(7.0),
            gather=dist.Gather(),
            patches_BPE=torch.randn(images, patches, width, generator=random),
        )

    return make


@pytest.fixture
def boxed(embed: Callable[..., Embeddings]) -> Callable[..., Embeddings]:
    """The same with patches on a grid, and boxes for most captions, absent ones too; both sides learn."""

    def make(dtype: torch.dtype = torch.float32, grid: tuple[int, int] = (2, 3), **sizes: int) -> Embeddings:
        e = embed(patches=grid[0] * grid[1], **sizes)
        random = torch.Generator().manual_seed(1)
        points = torch.rand(*e.mask_BK.shape, 2, 2, generator=random).sort(2).values.flatten(2)
        nowhere = torch.rand(e.mask_BK.shape, generator=random) < 0.3
        nowhere[0, 0], nowhere[0, -1] = False, True
        return dataclasses.replace(
            e,
            grid=grid,
            boxes_BK4=points.masked_fill(nowhere[..., None], torch.nan).to(dtype),
            text_BKE=e.text_BKE.to(dtype).requires_grad_(),
            patches_BPE=e.patches_BPE.to(dtype).requires_grad_(),
            scale=e.scale.to(dtype),
        )

    return make
