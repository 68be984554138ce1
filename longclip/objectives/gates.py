"""ALIP's gates: a caption counts less the less it agrees with its image's other captions and with its image.

In: captions of several sources and their images. Out: InfoNCE in which every caption has a weight of at most
1, judged against what is usual by running averages. Local legend: k slots of all groups together, M groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longclip import dist
from longclip.objectives.contrastive import check_contrast, info_nce
from longclip.objectives.running import Running
from longclip.objectives.term import Loss, Term
from longclip.objectives.units import Units, names, units
from longclip.types import Embeddings, UserError


class Gates(nn.Module):
    """How much captions count, by what the model itself thinks of them; no gradient.

        w = gate(a_bk - H) gate(v_b . t_bk - H'),   gate(x) = min(1, exp(gamma x))
        a_bk = mean over the image's other captions l of t_bk . t_bl

    ALIP, Yang et al. 2023, for two captions an image, where a is the same for both; with
    more, the odd one out is told from the rest. H, H' are running means over a group's captions: a group is
    a source, and its slots are alike. Each gate is capped by itself (in the released code those of pairs
    open with the other gate, and then exceed 1). A caption that is alone agrees.

    groups: how many. momentum: of the running means, 0.99 in the paper. sharpness: gamma, 2 there.
    """

    def __init__(self, groups: int, momentum: float = 0.99, sharpness: float = 2.0) -> None:
        super().__init__()
        if sharpness <= 0:
            raise UserError(f"sharpness is {sharpness}, but must be above 0; ALIP's is 2.")
        self.sharpness = sharpness
        self.agreement, self.fit = (Running(groups, momentum=momentum) for _ in range(2))

    @torch.no_grad()
    def forward(self, embeddings: Embeddings, groups: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Of this process's captions, the gate by other captions and the gate by the image, [B, k] each."""
        text_BkE, mask_Gk, _ = units(embeddings, groups)
        mask_Bk = mask_Gk[dist.rows(len(text_BkE))]
        others_B1 = mask_Bk.sum(1, keepdim=True) - 1
        others_BkE = text_BkE.sum(1, keepdim=True) - text_BkE
        agreement_Bk = (text_BkE * others_BkE).sum(-1) / others_B1.clamp_min(1)
        fit_Bk = (text_BkE * embeddings.image_BE[:, None].float()).sum(-1)
        sources = [n for n, group in enumerate(groups) for _ in range(embeddings.mask(group).shape[1])]
        source_k = torch.tensor(sources, device=text_BkE.device)
        return (
            self._gate(self.agreement, agreement_Bk, mask_Bk & (others_B1 > 0), source_k, embeddings),
            self._gate(self.fit, fit_Bk, mask_Bk, source_k, embeddings),
        )

    def _gate(
        self, usual: Running, x_Bk: Tensor, known_Bk: Tensor, source_k: Tensor, embeddings: Embeddings
    ) -> Tensor:
        if self.training:
            local_2k = torch.stack(((x_Bk * known_Bk).sum(0), known_Bk.sum(0).to(x_Bk)))
            sums_2M = local_2k.new_zeros(2, len(usual.total)).index_add(1, source_k, local_2k)
            sum_M, count_M = embeddings.gather(sums_2M[None]).sum(0)
            usual.update(sum_M / count_M.clamp_min(1), count_M > 0)
        above_Bk = x_Bk - usual.mean(-torch.inf)[source_k]
        return torch.where(known_Bk, (self.sharpness * above_Bk).clamp_max(0).exp(), 1.0)


class Gated(Term):
    """InfoNCE over captions of one or more sources, each with its gates for a weight (times `Text.weight`).

        L = 1/n sum over present captions of w_bk 1/2 [CE_j(s v_b . t_jk) + CE_j(s v_j . t_bk)]

    ALIP, Yang et al. 2023, which adds the means of its two sources: this is the mean over all captions.
    texts: a caption group for each source. momentum, sharpness: see `Gates`.
    Measures: `accuracy`; `agreement` and `fit`, the mean gate of each kind.
    """

    def __init__(
        self,
        texts: str | Sequence[str],
        weight: float = 1.0,
        momentum: float = 0.99,
        sharpness: float = 2.0,
    ) -> None:
        super().__init__(", ".join(names(texts)), weight)
        self.groups = names(texts)
        self.gates = Gates(len(self.groups), momentum, sharpness)

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image."""
        image_GE = embeddings.all_images().float()
        check_contrast(len(image_GE))
        found = units(embeddings, self.groups)
        agreement_Bk, fit_Bk = self.gates(embeddings, self.groups)
        value, accuracy = info_nce(
            image_GE,
            found.text_BkE,
            found.mask_Gk,
            embeddings.scale.float(),
            gather=embeddings.gather,
            weights_BK=agreement_Bk * fit_Bk * found.weights_Bk,
        )
        measures = {"agreement": mean(agreement_Bk, found), "fit": mean(fit_Bk, found)}
        return Loss(value, {"accuracy": accuracy, **measures})


def mean(x_Bk: Tensor, captions: Units) -> Tensor:
    """This process's share of the mean over all present captions."""
    mask_Bk = captions.mask_Gk[dist.rows(len(x_Bk))]
    return (x_Bk * mask_Bk).sum() * dist.world() / captions.mask_Gk.sum().clamp_min(1)
