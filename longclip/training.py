"""LongClip, the LightningModule: embed, terms, total, log. Nothing else computes.

In: a Batch. Out: one loss for one backward pass. What a recipe is made of (captions, terms, weights)
arrives as arguments; this file knows no recipe by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import dist, memory
from .objectives.term import Loss, Term
from .optim import AdamW, clamp_temperatures
from .strategies import sharding
from .towers.chunks import check_chunkable
from .towers.clip import DualTower
from .types import Batch, Elsewhere, UserError

log = logging.getLogger(__name__)


class LongClip(lightning.LightningModule):
    """Trains a DualTower with a recipe's terms.

    Args:
        tower: batch -> embeddings.
        terms: name -> loss term; the total is the sum of `term.weight * loss`.
        slots: caption group -> its slots (`Groups.slots`).
        optim: builds the optimizer and gives the learning rate for a number of samples.
        seed: all randomness of a step is a function of (seed, samples seen, rank), so there is no
            random state to save.
        micro_batch: images that each process encodes at a time, the loss being that of the whole batch all
            the same (`towers.chunks`); None: all at once.

    Attributes:
        samples_seen: images of the global batch trained on so far; the data position, too.
        steps_done: optimizer steps before this start.
        doing: the part of a step that runs, for who has to say what failed.
        asked: the signal that asks to stop after this step, 0 for none; see `stopping`.
    """

    def __init__(
        self,
        tower: DualTower,
        terms: Mapping[str, Term],
        slots: dict[str, slice],
        optim: AdamW,
        seed: int,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.tower, self.terms = tower, nn.ModuleDict(terms)
        self.weights = {name: term.weight for name, term in terms.items()}
        self.slots, self.optim, self.seed, self.micro_batch = slots, optim, seed, micro_batch
        self.needs = frozenset[str]().union(*(term.needs for term in terms.values()))
        self.samples_seen = self.steps_done = self.asked = 0
        self.doing = "encoding"
        self._signature: dict[str, object] | None = None  # of the order in which the samples were seen
        _check_groups(terms, slots)
        recalled = (term.groups for term in terms.values() if "start" in term.needs)
        tower.check_needs(self.needs, frozenset[str]().union(*recalled))
        for term in terms.values():
            term.build(tower.model_cfg["embed_dim"])
        check_chunkable(tower, micro_batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.doing = "encoding"
        embeddings = self.tower(batch, self.slots, self.needs, self.micro_batch)
        self.doing = "the loss"
        with torch.autocast(self.device.type, enabled=False):  # losses are float32
            losses: dict[str, Loss] = {name: term(embeddings) for name, term in self.terms.items()}
            # A temperature has an axis here (strategies.sharding), and so have some of the losses.
            values = [self.weights[name] * loss.value.reshape(()) for name, loss in losses.items()]
            total = torch.stack(values).sum()
        bad = ~torch.isfinite(total) | (batch.fault is not None)
        failed, self.asked = dist.highest((bad, self.asked), self.device)  # all go on, or none does
        if failed and not bad:
            raise Elsewhere(
                f"another process stopped the run at step {self.global_step}; its message says why"
            )
        if failed:
            raise UserError(batch.fault or self._not_finite(total, losses, batch))
        if (self.global_step + 1) % self.log_every == 0:
            self.log_dict(_measures(total, losses, embeddings.scale), sync_dist=dist.world() > 1)
        return total

    def configure_model(self) -> None:
        sharding.prepare(self.tower, self.terms.values(), self.device_mesh)

    def configure_optimizers(self) -> Optimizer:
        return self.optim.build(self)

    def on_fit_start(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise UserError(
                "trainer.accumulate_grad_batches does not enlarge the contrastive batch: every part would "
                "only be contrasted with itself. Leave it at 1 and give batch_size the whole batch; "
                "micro_batch=32 encodes 32 images at a time, with exactly the gradients of all at once"
            )
        trainer: Any = self.trainer  # these attributes are set at run time
        # The run is counted in samples; a resumed one may have another batch size.
        left = trainer.datamodule.resume(self.samples_seen, self.steps_done, self._signature)
        trainer.fit_loop.epoch_loop.max_steps = self.steps_done + left
        self.log_every = trainer.log_every_n_steps

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lengths stay on the host, which cuts by them; so do pixels that are encoded chunk by chunk."""
        small = (batch.tokens_T, batch.columns, batch.boxes_BK4, batch.weights_BK)
        moved = super().transfer_batch_to_device(small, device, dataloader_idx)
        pixels_BCHW = batch.pixels_BCHW
        if self.micro_batch is None:
            pixels_BCHW = super().transfer_batch_to_device(pixels_BCHW, device, dataloader_idx)
        return batch._replace(
            pixels_BCHW=pixels_BCHW,
            tokens_T=moved[0],
            columns=moved[1],
            boxes_BK4=moved[2],
            weights_BK=moved[3],
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        _seed_all(hash((self.seed, self.samples_seen, dist.rank())) % 2**63, self.device)
        self._batch_size = len(batch.keys) * dist.world()
        for group in self.trainer.optimizers[0].param_groups:
            group.update(self.optim.settings(self.samples_seen, self._batch_size))

    def on_before_backward(self, loss: Tensor) -> None:
        self.doing = "the backward pass"

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.doing = "the update"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with memory.explained(self._load):  # forward and backward happen in here
            super().optimizer_step(*args, **kwargs)
        clamp_temperatures(self)
        self.samples_seen += self._batch_size

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What makes the file complete on its own: plain JSON types only, never a config object."""
        trainer: Any = self.trainer
        checkpoint["longclip"] = {
            "samples_seen": self.samples_seen,
            "order": trainer.datamodule.signature(),
            "model_cfg": self.tower.model_cfg,
            "preprocess_cfg": self.tower.preprocess_cfg,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.samples_seen, self.steps_done = checkpoint["longclip"]["samples_seen"], checkpoint["global_step"]
        self._signature = checkpoint["longclip"].get("order")

    def _load(self) -> memory.Load:
        plan = self.trainer.datamodule.plan  # type: ignore[attr-defined]
        return memory.Load(
            self.doing,
            plan.batch_size,
            dist.world(),
            self.micro_batch,
            self.tower.grad_checkpointing,
            plan.tokens,
        )

    def _not_finite(self, total: Tensor, losses: dict[str, Loss], batch: Batch) -> str:
        bad = [f"{name} = {loss.value.item()}" for name, loss in losses.items() if not loss.value.isfinite()]
        return (
            f"the loss is not finite at step {self.global_step} ({', '.join(bad) or 'total'}); "
            f"samples {', '.join(batch.keys[:8])}{', ...' if len(batch.keys) > 8 else ''}. "
            "The last checkpoint is intact: look at these samples, lower optim.lr, or use "
            "trainer.precision=32-true"
        )


def _measures(total: Tensor, losses: dict[str, Loss], scale: Tensor) -> dict[str, Tensor]:
    """What a step logs: the total, every term, what the terms measured, the temperature."""
    values = {"train/loss": total.detach(), "scale": scale.detach()}
    for name, loss in losses.items():
        values[f"train/{name}"] = loss.value.detach()
        values |= {f"train/{name}/{measure}": value for measure, value in loss.measures.items()}
    return values


def _seed_all(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which takes a millisecond: it writes down the stack for every kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _check_groups(terms: Mapping[str, Term], slots: dict[str, slice]) -> None:
    for group in sorted(set(slots).difference(*(term.groups for term in terms.values()))):
        log.warning("no term reads the caption group %r: ~recipe.captions.%s saves its tokens", group, group)
    for name, term in terms.items():
        for group in term.groups:
            if group not in slots:
                raise UserError(
                    f"term {name!r} reads the caption group {group!r}, which this recipe does not have; "
                    f"its groups are {', '.join(sorted(slots))} (recipe.terms.{name}.texts=...)"
                )
