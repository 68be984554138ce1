"""open_clip's own training loop on several captions an image: its model, loss, loop and optimizer.

In: a model, a way to encode captions (`padded`), pixels. Out: `Turn`, a job that takes some steps with
`open_clip_train.train.train_one_epoch`. That loop knows one text an image, so `Slots` stands in for the model
and `SlotsLoss` for the loss; what they call is open_clip's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from .padded import Captions


class Slots(nn.Module):
    """open_clip's model on several captions an image, as its training loop calls it."""

    def __init__(self, model: Any, encode: Callable[[Any, Captions], Tensor], captions: Captions) -> None:
        super().__init__()
        self.module = model  # the name under which open_clip looks for logit_scale
        self.encode, self.captions = encode, captions

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        mask_BK = self.captions.lengths_BK > 0
        text_SE = F.normalize(self.encode(self.module, self.captions), dim=-1)
        return {
            "image_features": self.module.encode_image(images, normalize=True),
            "text_features": text_SE.new_zeros(*mask_BK.shape, text_SE.shape[1]).index_put(
                mask_BK.nonzero(as_tuple=True), text_SE
            ),
            "logit_scale": self.module.logit_scale.exp(),
        }


class SlotsLoss:
    """open_clip's loss between images and each slot: the long captions' and the mean of the others'."""

    def __init__(self) -> None:
        self.loss = ClipLoss(cache_labels=True)

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool
    ) -> dict[str, Tensor]:
        *subs, long = [self.loss(image_features, s, logit_scale) for s in text_features.unbind(1)]
        return {"long": long, **({"sub": torch.stack(subs).mean()} if subs else {})}


class Turn:
    """A turn of open_clip's own training loop."""

    def __init__(
        self, model: Slots, optimizer: torch.optim.Optimizer, pixels: Tensor, steps: int, clip: float
    ) -> None:
        from open_clip_train.train import train_one_epoch

        batch = (pixels, torch.zeros(len(pixels)))
        loader = _Loader([batch] * steps)
        self.data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        self.model, self.optimizer, self.run = model, optimizer, train_one_epoch
        self.args = SimpleNamespace(
            device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True,
            grad_clip_norm=clip, horovod=False, rank=0, local=False, log_every_n_steps=20,
            batch_size=len(pixels), world_size=1, wandb=False, distributed=False, log_local=False,
        )  # fmt: skip

    def __call__(self) -> None:
        self.run(self.model, self.data, SlotsLoss(), 0, self.optimizer, None, None, None, self.args)


class _Loader(list[Any]):
    """Batches, counted as open_clip's loop wants them counted."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return len(self) * len(self[0][0])


def optimizer(model: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """As `open_clip_train.main` makes it."""
    rest: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        alone = p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        (exempt if alone else rest).append(p)
    groups: list[dict[str, Any]] = [{"params": exempt, "weight_decay": 0.0}, {"params": rest}]
    return torch.optim.AdamW(groups, **settings)
