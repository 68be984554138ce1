"""What a run says before its first step: data, batch, captions, truncation, parameters, where it resumes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from .callbacks import token_counts
from .data.module import SourceReport
from .data.plans.plan import Plan
from .strategies.gradients import part
from .types import UserError


class Banner(Callback):
    """Says before the first step what will happen, so that a wrong number is seen now and not tomorrow.

    Args:
        name: the run's name.
        checkpoint: where it resumes from, if it does.
    """

    def __init__(self, name: str, checkpoint: Path | None) -> None:
        self.name, self.checkpoint = name, checkpoint

    def setup(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        self.parameters = parameter_table(module)  # before a strategy takes them apart

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            console = Console(width=None if sys.stdout.isatty() else 110)
            console.print(self._plan(trainer, module))
            console.print(source_table(trainer.datamodule.report()))  # type: ignore[attr-defined]
            console.print(self.parameters)

    def _plan(self, trainer: lightning.Trainer, module: Any) -> Table:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        plan, total = data.plan, module.optim.samples
        table = Table("", "", title=f"longclip: {self.name}", show_header=False, title_justify="left")
        table.add_row("data", _data_line(data, total))
        table.add_row("steps", f"{trainer.max_steps:,} of {_size(plan)} images ({total:,} samples)")
        table.add_row(
            "batch",
            f"{plan.batch_size:,} global = {trainer.world_size} process(es) x "
            f"{plan.batch_size // trainer.world_size:,}{_chunks(module, trainer)}, composed: {plan.batches}",
        )
        table.add_row("captions", ", ".join(f"{g} x {s.stop - s.start}" for g, s in module.slots.items()))
        table.add_row("terms", ", ".join(f"{n} (weight {t.weight:g})" for n, t in module.terms.items()))
        table.add_row("text", _text_line(module, data))
        if stages := data.curriculum.describe():
            table.add_row("curriculum", stages)
        if module.optim.ema:
            table.add_row("average", f"of the weights, with a half-life of {module.optim.ema:,} samples")
        table.add_row("precision", f"{trainer.precision} on {trainer.strategy.root_device}")
        if self.checkpoint:
            where = f"step {module.steps_done:,}, {module.samples_seen:,} samples, epoch "
            where += f"{module.samples_seen / data.epoch_size:.2f}: data position restored"
            table.add_row("resumes", f"{self.checkpoint.name} at {where}")
        return table


def source_table(reports: Sequence[SourceReport]) -> Table:
    """What a run makes of each of its sources."""
    stores = list(dict.fromkeys(store for report in reports for store in report.joined))
    joined = (f"in {store}" for store in stores)
    table = Table("sources", "samples", "kept", "weight", "an epoch", "passes", *joined, title_justify="left")
    for report in reports:
        row = (
            report.name,
            f"{report.samples:,}",
            f"{report.kept:,}",
            f"{report.weight:g}",
            f"{report.epoch:,}",
        )
        known = (f"{100 * report.joined[store]:.1f} %" if store in report.joined else "-" for store in stores)
        table.add_row(*row, f"{report.passes:.2f}", *known)
    return table


def _data_line(data: Any, total: int) -> str:
    epochs = f"{data.epoch_size:,} samples an epoch; {total / data.epoch_size:.1f} epochs"
    return f"{data.describe()}; {epochs}"


def _size(plan: Plan) -> str:
    return f"{plan.batch_size:,}" if plan.tokens is None else f"up to {plan.batch_size:,}"


def _chunks(module: Any, trainer: Any) -> str:
    """How a process encodes its images, where it does not do so at once."""
    local, size = trainer.datamodule.plan.batch_size // trainer.world_size, module.micro_batch
    if size is None or size >= local:
        return ""
    return f" images in {-(-local // size)} chunks of {size}"


def _text_line(module: Any, data: Any, probe: int = 256) -> str:
    """Tokens and truncation of the first images' captions, as the recipe shows them."""
    try:
        batch = data.probe(min(probe, data.epoch_size))
    except UserError as error:  # the first batch stops all processes together, this would stop one alone
        return f"context {module.tower.context_length}; nothing could be read: {error}"
    counts = token_counts(batch)
    how = f"padded ({module.tower.padded_because})" if module.tower.padded_because else "packed"
    return (
        f"context {module.tower.context_length}, {how}; {counts['tokens_per_sample']:.0f} tokens an image, "
        f"{100 * counts['truncated_captions']:.1f} % of captions cut (losing "
        f"{100 * counts['truncated_tokens']:.1f} % of tokens), seen on {len(batch.keys)} images"
    )


def parameter_table(module: Any) -> Table:
    """Trainable and frozen parameters by part."""
    table = Table("parameters", "trainable", "frozen", title_justify="left")
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        part = _part(name)
        counts.setdefault(part, [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    for part, (trainable, frozen) in counts.items():
        table.add_row(part, f"{trainable:,}", f"{frozen:,}")
    sums = [sum(column) for column in zip(*counts.values(), strict=True)]
    table.add_row("total", *(f"{value:,}" for value in sums), style="bold")
    return table


def _part(name: str) -> str:
    labels = {"image": "image tower", "text": "text tower", "scale": "temperature"}
    return labels.get(part(name)) or f"term {name.split('.')[1]} (not exported)"
