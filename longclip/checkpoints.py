"""When a run is saved, and how it goes on: any number of processes, any strategy, the same numbers.

In: a trainer, its module and a run directory. Out: folders as `stored` describes them, the newest few.

A save gathers one tensor after the other and each process copies its share to the host; writing happens
in the background while training goes on. A restore reads whole tensors and lets the engine of
this start take what it needs of them. Both are exact, whatever engine wrote and whatever engine reads.
"""

from __future__ import annotations

import errno
import logging
import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from . import dist, ema, runs
from .stored import Stored, owners, why_not_whole, write_share
from .strategies.states import WEIGHTS, State, split, state_of
from .types import Elsewhere, UserError

log = logging.getLogger(__name__)

CLOCK_STEPS = 20
"""How often the ranks compare clocks: a broadcast at every step would be felt."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints(Callback):
    """Go on from a checkpoint; save every so many steps or minutes and at the end; keep the newest few.

    The directory is the only state (Lightning's ModelCheckpoint remembers absolute paths, which a moved or
    requeued run does not have). All processes must see the same directory.

    Args:
        run: the run directory.
        every_steps, every_minutes: whichever comes first; 0 for never.
        keep: how many whole checkpoints stay.
        resume: the checkpoint to go on from.
    """

    def __init__(
        self, run: str | Path, every_steps: int, every_minutes: float, keep: int, resume: Path | None = None
    ) -> None:
        if keep < 1:
            raise UserError(f"checkpoints.keep is {keep}; at least 1 checkpoint must stay to resume from")
        self.run, self.every_steps, self.keep, self.resume = Path(run), every_steps, keep, resume
        self.every_seconds = every_minutes * 60
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        resume = trainer.strategy.broadcast(self.resume)
        if resume is not None:
            restore(Stored(resume), trainer, module)
            self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if self.every_steps and trainer.global_step % self.every_steps == 0:
            self.save(trainer, module)
        elif self.every_seconds and trainer.global_step % CLOCK_STEPS == 0:
            late = time.monotonic() - self.saved_at > self.every_seconds
            if trainer.strategy.broadcast(late):  # all ranks save or none: the clock of rank 0 decides
                self.save(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Save what is not saved yet, and wait until it is on the disk; may be called again."""
        if trainer.global_step != self.saved_step:
            self.save(trainer, module)
        self._finish(trainer)
        if trainer.is_global_zero:
            _prune(self.run, self.keep)

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        self.writer.shutdown(wait=True)  # what is being written may become whole yet

    def save(self, trainer: lightning.Trainer, module: Any) -> None:
        """All processes together: copy the state to the host, write it in the background."""
        self._finish(trainer)
        folder = self.run / "checkpoints" / runs.checkpoint_name(trainer.global_step)
        values = trainer.strategy.broadcast(_values(trainer, module))  # one stamp for all files of a save
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)  # what a run that was killed here has left
            _prune(self.run, self.keep)
        tensors = _own_share(state_of(trainer))
        trainer.strategy.barrier()
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step
        self.writing = self.writer.submit(write_share, folder, dist.rank(), dist.world(), tensors, values)

    def _finish(self, trainer: lightning.Trainer) -> None:
        """Wait for the last save; where one process could not write, all stop together."""
        writing, self.writing = self.writing, None
        error = writing.exception() if writing else None
        if not dist.anywhere(error is not None, trainer.strategy.root_device):
            return
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(
                f"no space left for the checkpoint of step {self.saved_step} ({error.strerror}); older "
                f"ones in {self.run / 'checkpoints'} are intact. Free some space, lower checkpoints.keep, or "
                "point runs= elsewhere, then go on with resume=auto"
            ) from error
        if error is not None:
            raise error
        raise Elsewhere("another process could not write its share of the checkpoint; its message says why")


def _prune(run: Path, keep: int) -> None:
    """Remove what is older than the newest whole ones; what is newer may be in the making."""
    found = runs.checkpoints(run)
    whole = [path for path in found if why_not_whole(path) is None][-keep:]
    for old in found[: found.index(whole[0])] if len(whole) == keep else []:
        shutil.rmtree(old, ignore_errors=True)


def restore(stored: Stored, trainer: lightning.Trainer, module: Any) -> None:
    """Weights, moments, running averages, progress and data position into a trainer that is set up.

    Says in one line what was carried over. Raises UserError where the model is another one.
    """
    state, values = state_of(trainer), stored.values
    here, there = state.shapes(), stored.shapes
    _check_same_shapes(_weights(there), _weights(here), stored.folder)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    left_out = (WEIGHTS,) if ema.kept_by(trainer.optimizers[0]) else (WEIGHTS, ema.KIND)
    moments = [name for name in there if split(name)[0] not in left_out and split(name)[1] in trained]
    state.make_room(moments)
    for name in (*(f"{WEIGHTS}/{name}" for name in _weights(here)), *moments):
        state.set(name, stored.read(name))
    module.on_load_checkpoint(values)
    trainer.fit_loop.load_state_dict(values["loops"])
    if values["precision"]:  # float16's loss scale
        trainer.precision_plugin.load_state_dict(values["precision"])
    if trainer.is_global_zero:
        log.info("%s", _what_happened(stored, trainer, trained - {split(name)[1] for name in moments}))


def _values(trainer: lightning.Trainer, module: Any) -> dict[str, Any]:
    """Everything but tensors, as plain JSON values."""
    values: dict[str, Any] = {
        "stamp": secrets.token_hex(8),
        "strategy": _kind(trainer),
        "global_step": trainer.global_step,
        "loops": trainer.fit_loop.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
    }
    module.on_save_checkpoint(values)
    return values


def _own_share(state: State) -> dict[str, torch.Tensor]:
    shapes = state.shapes()
    own, rank = owners(shapes, dist.world()), dist.rank()
    share = {}
    for name in shapes:
        tensor = state.get(name)
        if own[name] == rank:
            share[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return share


def _kind(trainer: lightning.Trainer) -> str:
    return type(trainer.strategy).__name__.removesuffix("Strategy")


def _weights(shapes: dict[str, torch.Size]) -> dict[str, torch.Size]:
    return {split(name)[1]: shape for name, shape in shapes.items() if split(name)[0] == WEIGHTS}


def _what_happened(stored: Stored, trainer: lightning.Trainer, fresh: set[str]) -> str:
    saved = f"{stored.values['strategy']} x {stored.world}"
    now = f"{_kind(trainer)} x {dist.world()}"
    how = f"saved by {saved}" if saved == now else f"saved by {saved}, taken apart anew for {now}"
    left = f"; {len(fresh)} parameters have no moments in it, first {min(fresh)}" if fresh else ""
    carried = "weights, moments, schedule and data position carried over exactly"
    return f"{stored.folder.name}: {how}; {carried}{left}{_average(stored, trainer)}"


def _average(stored: Stored, trainer: lightning.Trainer) -> str:
    there = any(split(name)[0] == ema.KIND for name in stored.shapes)
    here = ema.kept_by(trainer.optimizers[0])
    if there == here:
        return "; the running average of the weights, too" if here else ""
    return "; a running average of the weights begins here" if here else "; its running average ends here"


def _check_same_shapes(saved: dict[str, torch.Size], own: dict[str, torch.Size], folder: Path) -> None:
    odd = sorted(saved.keys() ^ own.keys()) or [
        f"{name} {tuple(saved[name])} (here {tuple(shape)})"
        for name, shape in own.items()
        if saved[name] != shape
    ]
    if odd:
        raise UserError(
            f"{folder} is of another architecture or recipe: {len(odd)} tensors do not fit, first "
            f"{', '.join(odd[:3])}; resume with the model and recipe of its config.yaml, "
            "or give this run another name"
        )
