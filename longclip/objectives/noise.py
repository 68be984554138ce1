"""Noisy pairs are learned less exactly: label smoothing by how likely it is that a caption is wrong.

In: images and a caption group; a side-car's column of noise probabilities, or nothing, and then they are
estimated from the losses as they come. Out: InfoNCE with a smoothing of its own for every caption.
Local legend: 2 the clean and the noisy, 3 powers of a loss: 0, 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longclip import dist
from longclip.objectives.contrastive import check_contrast, symmetric_cross_entropy
from longclip.objectives.running import Running
from longclip.objectives.smoothing import mean_score
from longclip.objectives.term import Loss, Term
from longclip.objectives.tiles import Pairs
from longclip.types import Embeddings, UserError


class Mixture(nn.Module):
    """Losses as a mixture of two normal distributions: how likely is it that one is of the higher?

        pi_c = mean(r_c),  mu_c = mean(r_c x) / pi_c,  sigma_c^2 = mean(r_c x^2) / pi_c - mu_c^2
        r_c  = pi_c N(x; mu_c, sigma_c) / sum over both

    Noisy pairs are learned last, so that for a while their losses lie above the others': DivideMix, Li et al.
    2020; NLIP, Huang et al. 2023, and NEVLP, Tao et al. 2024, fit it to the losses of all samples at once.
    Here one step of EM goes with every batch, and means are running ones. No gradient.
    """

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.moments = Running(3, 2, momentum=momentum)

    @torch.no_grad()
    def forward(self, x_KB: Tensor, x_GK: Tensor, mask_GK: Tensor) -> Tensor:
        """The probability of noise of this process's losses; learns from those of all while training."""
        if self.training:
            x_GK = torch.where(mask_GK, x_GK, 0)
            lowest, highest = x_GK.masked_fill(~mask_GK, torch.inf).amin(), x_GK.amax()
            guess_GK = (x_GK > (lowest + highest) / 2).to(x_GK)
            r_GK = torch.where(self.known > 0, self.higher(x_GK), guess_GK)
            r_GK2 = torch.stack((1 - r_GK, r_GK), -1) * mask_GK[..., None]
            moments_32 = torch.stack([(r_GK2 * x_GK[..., None] ** power).sum((0, 1)) for power in range(3)])
            captions = mask_GK.sum()
            self.moments.update(moments_32 / captions.clamp_min(1), (captions > 0).expand(3, 2))
        return self.higher(x_KB)

    @property
    def known(self) -> Tensor:
        """How much has been seen: 0 at first, 1 in the end."""
        return self.moments.weight[0, 0]

    def higher(self, x: Tensor) -> Tensor:
        """The probability that x comes from the distribution with the higher mean."""
        share_2, first_2, second_2 = self.moments.mean(0.0)
        share_2 = share_2.clamp_min(1e-6)
        mean_2 = first_2 / share_2
        all_spread = second_2.sum() - first_2.sum() ** 2
        # A distribution as narrow as one loss would explain nothing else.
        spread_2 = (second_2 / share_2 - mean_2**2).clamp_min(1e-2 * all_spread + 1e-8)
        # Beyond both means the wider one wins whatever the side, and a small loss would be noise.
        x = torch.minimum(torch.maximum(x, mean_2.amin()), mean_2.amax())
        likely_2 = share_2.log() - spread_2.log() / 2 - (x[..., None] - mean_2) ** 2 / spread_2 / 2
        return likely_2.softmax(-1).take_along_dim(mean_2.argmax().expand(*x.shape, 1), -1)[..., 0]


class NoiseAdaptive(Term):
    """InfoNCE that believes a caption as far as it is likely to be right.

        L = 1/n sum over present (b, k) of 1/2 [H(q_bk, p over texts) + H(q_bk, p over images)]
        q_bk = 1 - omega at the caption's own image, omega spread evenly over all;  omega = strength e_bk

    NEVLP, Tao et al. 2024, after NLIP, Huang et al. 2023, as their abstracts tell it. e is the probability
    that the pair is noise: `column` names a side-car's column with one an image (unknown: 0), or is null, and
    `Mixture` estimates it by and by: omega grows from 0 as the running means fill. strength: lambda, in
    [0, 1). momentum: of those means.
    Measures: `accuracy`; `noise`, the mean of e.
    """

    def __init__(
        self,
        texts: str,
        weight: float = 1.0,
        column: str | None = None,
        strength: float = 0.5,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(texts, weight)
        if not 0 <= strength < 1:
            raise UserError(f"strength is {strength}, but must be at least 0 and below 1.")
        self.column, self.strength = column, strength
        self.mixture = None if column else Mixture(momentum)

    @property
    def columns(self) -> dict[str, int | None]:
        return {self.column: 0} if self.column else {}

    def forward(self, embeddings: Embeddings) -> Loss:
        """Raises UserError on a global batch of one image, and where the column is missing or no number."""
        image_GE, text_BKE = embeddings.all_images().float(), embeddings.text(self.texts).float()
        check_contrast(len(image_GE))
        mask_GK, scale = embeddings.all_mask(self.texts), embeddings.scale.float()
        own = dist.rows(len(text_BKE))
        mask_BK = mask_GK[own]
        found = symmetric_cross_entropy(image_GE, text_BKE, scale, Pairs(mask_BK, own.start))
        mean_KB = scale * mean_score(image_GE, text_BKE * mask_BK[..., None], mask_GK.sum(0))
        noise_KB, trust = self._noise(embeddings, found.loss_KX.detach(), mask_GK)
        loss_KB = found.loss_KX + self.strength * trust * noise_KB * (found.own_KX - mean_KB)
        share = dist.world() / mask_GK.sum().clamp_min(1)
        sums = (x.masked_fill(~mask_BK.T, 0).sum() * share for x in (loss_KB, found.right_KX, noise_KB))
        value, accuracy, noise = sums
        return Loss(value, {"accuracy": accuracy, "noise": noise})

    def _noise(
        self, embeddings: Embeddings, loss_KB: Tensor, mask_GK: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The probability of noise of each caption, and how far to trust that."""
        if self.column:
            noise_B = embeddings.column(self.column).float()
            if noise_B.ndim != 1:
                raise UserError(
                    f"the column {self.column!r} holds {list(noise_B.shape[1:])} numbers an image, not one "
                    f"probability of noise; name another (recipe.terms.NAME.column=...)"
                )
            return noise_B.nan_to_num(0).clamp(0, 1).expand_as(loss_KB), 1.0
        assert self.mixture is not None, "made where there is no column"
        loss_GK = embeddings.gather(loss_KB.T.contiguous())
        return self.mixture(loss_KB, loss_GK, mask_GK), self.mixture.known
