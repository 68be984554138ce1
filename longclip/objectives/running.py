"""Running averages that belong to a term: in checkpoints, and the same on every process.

In: a mean of the global batch, step by step. Out: its exponential average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longclip.types import UserError


class Running(nn.Module):
    """Exponential averages of some numbers, which start from the first batch that knows them.

        H_n = sum_i m^(n - i) x_i / sum_i m^(n - i)

    momentum: m. What is given must be the same on every process (sums that were gathered).
    """

    total: Tensor
    weight: Tensor

    def __init__(self, *shape: int, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise UserError(f"momentum is {momentum}, but must be at least 0 and below 1; ALIP's is 0.99.")
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(shape))
        self.register_buffer("weight", torch.zeros(shape))

    @torch.no_grad()
    def update(self, mean: Tensor, known: Tensor) -> None:
        """Numbers that this batch does not know stay as they are."""
        new = (1 - self.momentum) * known
        keep = 1 - new
        self.total.mul_(keep).add_(new * torch.where(known, mean, 0))
        self.weight.mul_(keep).add_(new)

    def mean(self, unknown: float) -> Tensor:
        """The averages; `unknown` where no batch has known one."""
        return torch.where(self.weight > 0, self.total / self.weight.clamp_min(1e-30), unknown)
