"""Random embeddings with ragged captions, on one process."""

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
