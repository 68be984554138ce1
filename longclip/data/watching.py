"""Batches as they arrive: counted, and brought to an end where they cannot go on, on all processes together.

In: what a torch loader yields. Out: the same. A process that cannot go on raises a `UserError` where it is
alone. One of several gets a last, blank batch with its `fault`, and the training step stops all of them at
once: if one left alone, the others would wait for it in their next collective. A worker that was killed
ends a run in the same way.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess

from .. import dist
from ..types import Batch, UserError
from .faults import Ledger


def watched(
    start: Callable[[], Iterator[Batch]],
    sizes: Iterable[int],
    stand_in: Callable[[int, str], Batch],
    workers: int,
    ledger: Ledger | None,
) -> Iterator[Batch]:
    """The batches of a loader.

    Args:
        start: makes the loader's own iterator.
        sizes: of the batches to come.
        stand_in: (size, fault) -> a blank batch.
        workers: of the loader.
        ledger: counts what was seen and left out.

    Raises:
        UserError: on a single process, what is wrong.
    """
    before = set(multiprocessing.active_children())
    arriving = _quietly(start)
    atexit.register(_end, set(multiprocessing.active_children()) - before)
    for size in sizes:
        try:
            batch = next(arriving)
        except (RuntimeError, EOFError, OSError) as error:
            if not workers:
                raise
            batch = stand_in(size, _killed(error))
        if batch.fault is not None and dist.world() == 1:
            raise UserError(batch.fault)
        if ledger is not None:
            ledger.add(len(batch.keys), batch.skips)
        yield batch
        if batch.fault is not None:
            return


def _quietly(start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Start workers without torch's signal handler, which raises wherever the main program happens to be.

    A dead worker is then found where its batch is fetched, a few seconds later, by torch as well.
    """
    if threading.current_thread() is not threading.main_thread():
        return start()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _end(workers: Iterable[BaseProcess]) -> None:
    """Let the program leave while an exception still holds its loader.

    At exit multiprocessing sends SIGTERM to those left, which workers ignore (`loading`), and waits for ever.
    """
    for worker in workers:
        worker.kill()


def _killed(error: Exception) -> str:
    """The sentence for a worker that died; any other error goes on.

    Depending on what it did when it died, torch finds it missing, or a pipe to it is broken.
    """
    text = str(error)
    if text.startswith("Caught ") or (isinstance(error, RuntimeError) and "DataLoader worker" not in text):
        raise error
    found = text.splitlines()[0] if text else type(error).__name__
    return (
        f"a process that loads data was killed ({found}), most often because memory or /dev/shm ran out (see "
        "dmesg); lower data.workers or give the job more memory, then go on with resume=auto"
    )
