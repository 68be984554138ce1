"""A plan as a table on a terminal and as plain lines elsewhere, with the command to type.

In: `Costs`, the `Choice`, what the run is. Out: lines of text.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table

from ..hardware import gib
from .estimate import Choice, Costs


class Told(NamedTuple):
    """What the numbers of a plan belong to."""

    name: str  # of the run
    samples: int
    lengths: str  # where the lengths of captions come from
    memory: int  # bytes
    source: str  # where that number comes from
    micro_batch: int | None  # as the run has it now
    grad_checkpointing: bool


def table(costs: Costs, choice: Choice, told: Told) -> Table:
    """Memory and FLOPs by part, as the run is configured and as proposed."""
    ways = {"as configured": (told.micro_batch, told.grad_checkpointing), "proposed": choice[:2]}
    heads = [f"{name}\n{way(*how)}" for name, how in dict.fromkeys(ways.items())]
    found = Table("per process", *heads, title=f"plan of {told.name}", title_justify="left")
    memory, flops = ([part(*how) for how in ways.values()] for part in (costs.memory, costs.flops))
    for name in memory[0]:
        found.add_row(name, *(gib(column[name]) for column in memory))
    found.add_row("memory", *(gib(sum(column.values())) for column in memory), style="bold", end_section=True)
    for name in flops[0]:
        found.add_row(f"FLOPs a step, {name}", *(_flops(column[name]) for column in flops))
    found.add_row("FLOPs a step", *(_flops(sum(column.values())) for column in flops), style="bold")
    return found


def sentences(costs: Costs, choice: Choice, told: Told, command: str) -> list[str]:
    """What the table does not say: the job, what fits, the run as a whole, what to type."""
    job, steps = costs.job, told.samples // costs.job.batch_size
    whole = steps * job.world * sum(costs.flops(choice.micro_batch, choice.grad_checkpointing).values())
    lines = [
        f"{job.batch_size:,} images a step = {job.world} process(es) x {job.local:,}; "
        f"{costs.tokens:.0f} text tokens an image ({told.lengths}); {job.precision}",
        f"{steps:,} steps, {_flops(whole)}FLOPs in all on real tokens",
    ]
    room = f"{gib(told.memory)} ({told.source})"
    if not choice.fits:
        return [
            *lines,
            f"nothing fits into {room}: {way(choice.micro_batch, choice.grad_checkpointing)} still needs "
            f"{gib(choice.need)}; take a smaller model, more processes or batch_size={job.batch_size // 2}",
        ]
    blocks = "needed" if choice.grad_checkpointing and not told.grad_checkpointing else "not needed"
    fit = f"{way(choice.micro_batch, choice.grad_checkpointing)} fits into {room}"
    return [*lines, f"{fit}; more grad_checkpointing is {blocks}", f"next: {command}"]


def overrides(choice: Choice) -> list[str]:
    """What to add to the command line."""
    chunks = "null" if choice.micro_batch is None else choice.micro_batch
    return [f"micro_batch={chunks}", f"model.grad_checkpointing={str(choice.grad_checkpointing).lower()}"]


def way(micro_batch: int | None, grad_checkpointing: bool) -> str:
    """How a batch is encoded, in words."""
    chunks = "the whole batch at once" if micro_batch is None else f"chunks of {micro_batch:,}"
    return f"{chunks}, blocks checkpointed" if grad_checkpointing else chunks


def _flops(value: float) -> str:
    """FLOPs with a prefix.

    >>> [_flops(v) for v in (2.5e12, 1e18)]
    ['2.50 T', '1.00 E']
    """
    for prefix, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:,.2f} {prefix}"
    return f"{value:,.0f} "
