"""SmartCLIP's masks: a caption says which dimensions of an image it is about, and is compared with those.

In: images, texts and words in the joint space. Out: softmax cross-entropy over masked scores, and a price on
open dimensions. The network that makes masks is trained and never exported.
Local legend: R images, X captions of this process in one slot, L words of the longest.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from longclip import dist
from longclip.objectives.contrastive import check_contrast
from longclip.objectives.imagewise import imagewise
from longclip.objectives.pooling import check_heads
from longclip.objectives.scored import Columns, info_nce
from longclip.objectives.term import Loss, Term
from longclip.objectives.wording import laid_out
from longclip.types import Embeddings, UserError

FLOOR = 1e-6
"""Squared length of what a mask leaves of an image, below which the image is all but gone."""

CPU_TILE = (256, 256)
"""Images and captions of one tile of scores; about six such tiles live while it is worked on."""

CUDA_TILE = (4096, 2048)
"""A GPU wants few, large kernels."""

CPU_WORDS, CUDA_WORDS = 2**11, 2**16
"""Words that the mask network reads at a time; each has about twenty vectors of width E while it does."""


def masked_cosine(image_RE: Tensor, mask_XE: Tensor, text_XE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of all images and captions, every image under every caption's mask: [R, X], for both directions.

        z_ij = s cos(v_i * m_j, t_j) = s (v_i . (m_j * t_j)) / |v_i * m_j|

    SmartCLIP, Xie et al. 2025, section 4. An image's negatives are itself under the masks of other captions,
    with their texts; a caption's negatives are other images under its own mask. So a mask alone tells nobody
    which pair belongs together, as it would if each image wore the mask of its own caption everywhere.
    image_RE, text_XE: L2-normalised. Two matrix products, since |v * m|^2 = v^2 . m^2.
    """
    length_RX = (image_RE.square() @ mask_XE.square().T).clamp_min(FLOOR).sqrt()
    score_RX = scale * (image_RE @ (mask_XE * text_XE).T) / length_RX
    return score_RX, score_RX


def binary(logits_XE: Tensor) -> Tensor:
    """1 where sigmoid(logit) > 1/2, else 0; backward as if it were the sigmoid (straight-through)."""
    soft_XE = logits_XE.sigmoid()
    return (logits_XE > 0).to(soft_XE) + (soft_XE - soft_XE.detach())


class MaskHead(nn.Module):
    """Words -> logits of a mask: a transformer block, attention pooling, a linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.ask, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.pool = nn.Linear(width, 1, bias=False)
        self.open = nn.Linear(width, width)
        nn.init.ones_(self.open.bias)  # nearly all is open at first: plain InfoNCE, from which to close

    def forward(self, words_XLE: Tensor, mask_XL: Tensor) -> Tensor:
        heads_XL3Hd = self.ask(self.before(words_XLE)).unflatten(-1, (3, self.heads, -1))
        q_XHLd, k_XHLd, v_XHLd = heads_XL3Hd.permute(2, 0, 3, 1, 4)
        found_XHLd = scaled_dot_product_attention(q_XHLd, k_XHLd, v_XHLd, mask_XL[:, None, None])
        x_XLE = words_XLE + self.mix(found_XHLd.transpose(1, 2).flatten(2))
        x_XLE = self.after(x_XLE + self.mlp(self.between(x_XLE)))
        weight_XL = self.pool(x_XLE).squeeze(-1).masked_fill(~mask_XL, -torch.inf).softmax(1)
        logits_XE: Tensor = self.open((weight_XL[:, None] @ x_XLE).squeeze(1))
        return logits_XE


def mask_logits(head: nn.Module, words_XLE: Tensor, mask_XL: Tensor, at_once: int) -> Tensor:
    """What the head says of every caption, some captions at a time, forward and backward."""
    names, weights = zip(*head.named_parameters(), strict=True)

    def tile(words_xLE: Tensor, mask_xL: Tensor, *weights: Tensor) -> tuple[Tensor]:
        own = dict(zip(names, weights, strict=True))
        return (functional_call(head, own, (words_xLE.to(weights[0].dtype), mask_xL)),)

    return imagewise(tile, (words_XLE, mask_XL), weights, max(1, at_once // max(1, mask_XL.shape[1])))[0]


class Masked(Term):
    """SmartCLIP's loss on one caption group, at the model's temperature.

        L = InfoNCE of masked scores + sparsity * mean share of open dimensions

    heads: of the mask network. sparsity: the price of a mask that is all open. Start and end token are words
    here. What is judged and exported is the plain dual encoder, without masks.
    Measures: `accuracy` of both directions in the batch, `open`, the share of dimensions that masks keep.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"words"})
    head: MaskHead

    def __init__(self, texts: str, weight: float = 1.0, heads: int = 8, sparsity: float = 0.1) -> None:
        super().__init__(texts, weight)
        if sparsity < 0:
            raise UserError(f"Masked has sparsity {sparsity}, but needs 0 or more; 0.1 is a start.")
        self.heads, self.sparsity = heads, sparsity

    def build(self, width: int) -> None:
        """Raises UserError where the heads do not divide the width."""
        check_heads(self.heads, width)
        self.head = MaskHead(width, self.heads)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, which has nothing to contrast."""
        image_GE, mask_GK = embeddings.all_images().float(), embeddings.all_mask(self.texts)
        check_contrast(len(image_GE))
        slots = embeddings.slots[self.texts]
        columns = [self._columns(embeddings, slot) for slot in range(slots.start, slots.stop)]
        size = CUDA_TILE if image_GE.is_cuda else CPU_TILE
        scale = embeddings.scale.float()
        value, accuracy = info_nce(masked_cosine, (image_GE,), columns, mask_GK, scale, size)
        opened = sum(slot.tensors[0].mean(1).sum() for slot in columns)
        opened = opened * dist.world() / mask_GK.sum().clamp_min(1)
        return Loss(value + self.sparsity * opened, {"accuracy": accuracy, "open": opened.detach()})

    def _columns(self, embeddings: Embeddings, slot: int) -> Columns:
        assert embeddings.words is not None, "the towers leave out words that this term needs"
        said = laid_out(embeddings.words, slot, ends=True)
        at_once = CUDA_WORDS if said.mask_XL.is_cuda else CPU_WORDS
        mask_XE = binary(mask_logits(self.head, said.words_XLE, said.mask_XL, at_once))
        image_X = torch.from_numpy(said.images_X).to(mask_XE.device)
        text_XE = embeddings.text_BKE[image_X, slot].float()
        return Columns((mask_XE, text_XE), image_X + dist.rows(len(embeddings.image_BE)).start)
