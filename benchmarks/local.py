"""Losses that read image patches, against the same losses written out plainly (P9).

    python -m benchmarks --only local

Grouping: the released reference form contrasts all captions of the batch with all groups in one matrix,
with an identity matrix as targets. Text-conditioned pooling: torch's own attention over all (image,
caption) pairs at once. Bytes beyond the gradients of what goes in, which every form has to hand back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from longclip import dist
from longclip.objectives import Grouping, TextConditioned
from longclip.objectives.conditioned import Captions, conditioned_sigmoid
from longclip.types import Embeddings

from .measures import Job, Row, fewer, flops, peak_bytes, seconds

SLOTS, PATCHES, WIDTH = 8, 196, 512  # ViT-B-16


def rows(quick: bool, folder: Path) -> list[Row]:
    return [*_grouping(16 if quick else 512), *_conditioned(8 if quick else 192)]


def _grouping(images: int) -> list[Row]:
    text_BKE, patches_BPE = inputs = _inputs(images)
    term = Grouping("sub")
    embeddings = Embeddings(
        image_BE=text_BKE[:, 0].detach(),
        text_BKE=text_BKE,
        mask_BK=torch.ones(images, SLOTS, dtype=torch.bool),
        slots={"sub": slice(0, SLOTS)},
        scale=torch.tensor(1.0),
        gather=dist.Gather(),
        patches_BPE=patches_BPE,
    )
    scale = term.logit_scale.exp().detach()
    ours = _both_passes(lambda: term(embeddings).value, inputs)
    plain = _both_passes(lambda: grouping_plainly(text_BKE, patches_BPE, scale), inputs)
    what = f"grouping, K={SLOTS}, B={images}, {PATCHES} patches:"
    peaks, gradients = (peak_bytes(ours), peak_bytes(plain)), sum(x.nbytes for x in inputs)
    beyond = [peak - gradients for peak in peaks]
    scores = f"{4 * images * SLOTS * PATCHES / 1e6:.1f} M of scores"
    times = seconds({"ours": ours, "plain": plain}, rounds=2)
    return [
        fewer("P9", f"{what} peak bytes beyond gradients of inputs", beyond[0], beyond[1], 20, scores),
        fewer("P9.all", f"{what} peak bytes, gradients too", *peaks, limit=f"{gradients / 1e6:.0f} M"),
        fewer("P9.time", f"{what} CPU seconds, both passes", times["ours"], times["plain"]),
    ]


def grouping_plainly(text_BKE: Tensor, patches_BPE: Tensor, scale: Tensor) -> Tensor:
    """DreamLIP's grouping loss for whole captions, in as many tensors as its release makes."""
    patch_BPE = normalize(patches_BPE, dim=-1)
    similarity_BKP = text_BKE @ patch_BPE.mT
    low_BK1, high_BK1 = similarity_BKP.amin(-1, keepdim=True), similarity_BKP.amax(-1, keepdim=True)
    scaled_BKP = (similarity_BKP - low_BK1) / (high_BK1 - low_BK1 + 1e-10)
    weights_BKP = torch.where(scaled_BKP < 1 / patches_BPE.shape[1], 0, scaled_BKP)
    weights_BKP = weights_BKP / weights_BKP.sum(-1, keepdim=True)
    grouped_XE = normalize(weights_BKP @ patch_BPE, dim=-1).flatten(0, 1)
    logits_XX = scale * text_BKE.flatten(0, 1) @ grouped_XE.T
    target_XX = torch.eye(len(logits_XX))
    return (cross_entropy(logits_XX, target_XX) + cross_entropy(logits_XX.T, target_XX)) / 2


def _conditioned(images: int) -> list[Row]:
    text_BKE, patches_BPE = inputs = _inputs(images)
    term = TextConditioned("sub")
    term.build(WIDTH)
    valid_BJ = torch.cat([torch.ones(images, SLOTS).bool(), ~torch.eye(images).bool()], 1)

    def tiled() -> Tensor:
        own, others = (Captions(term.head.queries(x), x) for x in (text_BKE, text_BKE[:, 0]))
        scale, head = term.logit_scale.exp(), term.head
        rest = (valid_BJ, scale, term.logit_bias, head.weights(), term.heads)
        return conditioned_sigmoid(patches_BPE, own, others, *rest).sum()

    ours = _both_passes(tiled, inputs)
    plain = _both_passes(lambda: conditioned_plainly(term, text_BKE, patches_BPE, valid_BJ), inputs)
    what = f"text-conditioned pooling, K={SLOTS}, B={images}:"
    beyond = [peak_bytes(job) - sum(x.nbytes for x in inputs) for job in (ours, plain)]
    times = seconds({"ours": ours, "plain": plain}, rounds=1)
    return [
        fewer("P9.conditioned", f"{what} peak bytes beyond gradients of inputs", beyond[0], beyond[1]),
        fewer("P9.conditioned.flops", f"{what} FLOPs, both passes", flops(ours), flops(plain)),
        fewer("P9.conditioned.time", f"{what} CPU seconds, both passes", times["ours"], times["plain"]),
    ]


def conditioned_plainly(
    term: TextConditioned, text_BKE: Tensor, patches_BPE: Tensor, valid_BJ: Tensor
) -> Tensor:
    """FLAIR's text-conditioned loss with torch's attention module, every pair at once."""
    head, slots = term.head, text_BKE.shape[1]
    text_BJE = torch.cat([text_BKE, text_BKE[:, 0].expand(len(text_BKE), -1, -1)], 1)
    query_BJE = head.query_norm(text_BJE * text_BJE.shape[-1] ** 0.5)
    key_BPE, value_BPE = head.key_norm(patches_BPE), head.value_norm(patches_BPE)
    found_BJE, _ = head.attention(query_BJE, key_BPE, value_BPE, need_weights=False)
    logits_BJ = (normalize(found_BJE, dim=-1) * text_BJE).sum(-1) * term.logit_scale.exp() + term.logit_bias
    sign_J = torch.cat([torch.ones(slots), -torch.ones(len(text_BKE))])
    return -(logsigmoid(sign_J * logits_BJ) * valid_BJ).sum()


def _inputs(images: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    text_BKE = normalize(torch.randn(images, SLOTS, WIDTH, generator=random), dim=-1)
    patches_BPE = torch.randn(images, PATCHES, WIDTH, generator=random)
    return text_BKE.requires_grad_(), patches_BPE.requires_grad_()


def _both_passes(loss: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Job:
    def job() -> None:
        for x in inputs:
            x.grad = None
        loss().backward()

    return job
