"""FILIP's late interaction: an image and a caption agree as far as their patches and words find each other.

In: patches and words in the joint space. Out: softmax cross-entropy over the scores of all pairs. Patches of
all images travel, once, in the precision of the towers; words stay where they are. The likeness of patches
and words is made for a tile of pairs at a time, forward and backward.
Local legend: R images, X captions of this process in one slot, L words of the longest.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives.contrastive import check_contrast
from longclip.objectives.imagewise import imagewise
from longclip.objectives.scored import Columns, info_nce
from longclip.objectives.term import Loss, Term
from longclip.objectives.wording import Wording, laid_out, worded
from longclip.types import Embeddings, Words

CPU_TILE = 2**24
"""Pairs of a patch and a word in one tile; about four numbers each live while it is worked on. Smaller tiles
were no faster on a processor, and a planner walks through as many tiles as there are."""

CUDA_TILE = 2**25
"""A GPU wants few, large kernels; 512 MiB in float32."""

CAPTIONS = 8
"""Captions in one tile: a matrix product wants both sides broad, and captions of a tile alike in length."""


def interaction(patches_RPE: Tensor, words_XLE: Tensor, mask_XL: Tensor) -> tuple[Tensor, Tensor]:
    """How well images and captions agree, patch by patch and word by word, [R, X] each.

        s_I = 1/P sum_p max_l p . w_l,    s_T = 1/n sum_l max_p p . w_l,    n words of the caption

    FILIP, Yao et al. 2021, equations 3 and 4. Vectors are L2-normalised, every caption has a word. Likeness
    has the precision of the patches, sums have that of float32 at least.
    """
    shape = len(patches_RPE), -1, *mask_XL.shape
    like_RPXL = (patches_RPE.flatten(0, 1) @ words_XLE.flatten(0, 1).T).view(shape)
    exact = torch.promote_types(like_RPXL.dtype, torch.float32)
    below = -2  # any cosine
    patch_RPX = like_RPXL.masked_fill(~mask_XL, below).max(3).values
    word_RXL = like_RPXL.max(1).values.masked_fill(~mask_XL, 0)
    return patch_RPX.mean(1, dtype=exact), word_RXL.sum(2, dtype=exact) / mask_XL.sum(1)


def scaled(patches_RPE: Tensor, words_XLE: Tensor, mask_XL: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`interaction` times the temperature factor, in its dtype."""
    image_RX, text_RX = interaction(patches_RPE, words_XLE, mask_XL)
    return image_RX.to(scale.dtype) * scale, text_RX.to(scale.dtype) * scale


def unit(x_NE: Tensor) -> Tensor:
    """L2-normalised, in the dtype that came; some rows at a time, so that no float32 copy is made of all."""

    def tile(x_nE: Tensor) -> tuple[Tensor]:
        exact = torch.promote_types(x_nE.dtype, torch.float32)
        return (normalize(x_nE.to(exact), dim=-1).to(x_nE.dtype),)

    return imagewise(tile, (x_NE,), size=2**14)[0]


def tile_size(patches_RPE: Tensor, longest: int) -> tuple[int, int]:
    """How many images meet how many captions at a time."""
    most = CUDA_TILE if patches_RPE.is_cuda else CPU_TILE
    return max(1, most // (CAPTIONS * patches_RPE.shape[1] * max(1, longest))), CAPTIONS


class Late(Term):
    """FILIP's loss on one caption group, at a temperature of its own; every slot is a problem of its own.

    An image looks for its caption by s_I of `interaction`, a caption for its image by s_T. Start and end
    token are no words: the one is the same for all captions, the other is the caption's global feature. That
    and the image's are left untrained, so a recipe that is judged or exported as a dual encoder has a term
    for them, too. Measures: `accuracy` of both directions in the batch, `scale`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "words"})

    def __init__(self, texts: str, weight: float = 1.0) -> None:
        super().__init__(texts, weight)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, which has nothing to contrast."""
        patches_BPE, words = embeddings.patches_BPE, embeddings.words
        assert patches_BPE is not None, "the towers leave out patches that this term needs"
        assert words is not None, "the towers leave out words that this term needs"
        slots = embeddings.slots[self.texts]
        mask_GK = embeddings.gather(worded(words, slots))
        check_contrast(len(mask_GK))
        patches_GPE = embeddings.gather(unit(patches_BPE.flatten(0, 1)).view_as(patches_BPE))
        words = Words(unit(words.states_TE).to(patches_BPE.dtype), words.lengths_BK)
        start, scale = dist.rows(len(patches_BPE)).start, self.logit_scale.exp()
        columns = [_columns(laid_out(words, slot), start) for slot in range(slots.start, slots.stop)]
        size = tile_size(patches_GPE, int(words.lengths_BK[:, slots].max(initial=0)))
        value, accuracy = info_nce(scaled, (patches_GPE,), columns, mask_GK, scale, size)
        return Loss(value, {"accuracy": accuracy, "scale": scale.detach()})


def _columns(said: Wording, start: int) -> Columns:
    own_X = torch.from_numpy(start + said.images_X).to(said.mask_XL.device)
    return Columns((said.words_XLE, said.mask_XL), own_X, said.lengths_X)
