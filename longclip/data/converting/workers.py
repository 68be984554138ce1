"""A function applied to many items by several processes, results in the order of the items.

In: items, one by one. Out: (item, result), one by one. However long the stream is, few of them are in flight.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import Any, TypeVar

from ...types import UserError

Item = TypeVar("Item")
CHUNK = 8  # items that travel together: large enough for the pipe, small enough for images of megabytes


def ordered_map(
    job: Callable[[Item], Any], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Any]]:
    """(item, job(item)) in order; in this process if `workers` is 1.

    Raises:
        UserError: a worker died.
    """
    if workers <= 1:
        yield from ((item, job(item)) for item in items)
        return
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":  # torch is imported once, not by each worker
        context.set_forkserver_preload(["longclip.data.converting.prepare"])
    pool = ProcessPoolExecutor(workers, context, _equip, (job,))
    try:
        yield from _in_order(pool, iter(items), in_flight=2 * workers + 1)
    except BrokenProcessPool as error:
        raise UserError(
            f"one of the {workers} workers was killed, perhaps for want of memory; run the same command "
            f"again, if need be with --workers {workers // 2}: finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(pool: ProcessPoolExecutor, items: Iterator[Item], in_flight: int) -> Iterator[tuple[Item, Any]]:
    pending: deque[tuple[list[Item], Future[list[Any]]]] = deque()
    while True:
        while len(pending) < in_flight and (chunk := list(islice(items, CHUNK))):
            pending.append((chunk, pool.submit(_work, chunk)))
        if not pending:
            return
        chunk, future = pending.popleft()
        yield from zip(chunk, future.result(), strict=True)


_job: Callable[[Any], Any]  # set in every worker when it starts, so that the tokenizer travels once


def _equip(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _work(chunk: list[Any]) -> list[Any]:
    return [_job(item) for item in chunk]


def _end_with_parent() -> None:
    """Nobody tells the workers when the main process is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
