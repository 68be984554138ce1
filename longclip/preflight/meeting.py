"""Where processes meet: a TCPStore that knows who has come, with one deadline over everything.

Every wait here ends: at the deadline with a sentence that names who is missing, and, should the main
thread hang inside a library, by `watch`, which ends the process from another thread.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from ..types import UserError

GRACE = 5.0
"""Seconds after the deadline in which rank 0 tells the others what it found; then they end on their own."""
SHOWN = 32
"""Ranks named in a sentence."""


class Meeting:
    """All processes of a job, for a few seconds; rank 0 judges and the others hear its verdict.

    Args:
        address, port: where rank 0 listens, or torchrun's agent in its stead.
        rank, world: this process, and how many are expected.
        name: this process's node, for the sentences.
        seconds: the deadline, counted from now.

    Raises:
        UserError: rank 0 could not be reached by the deadline.
    """

    def __init__(self, address: str, port: int, rank: int, world: int, name: str, seconds: float) -> None:
        self.address, self.port, self.rank, self.world, self.seconds = address, port, rank, world, seconds
        self.ends = time.monotonic() + seconds
        self.host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            if not self.host:
                self._knock()
            self.store = self._connect(self.host, seconds)
            self.store.set(f"name/{rank}", name)
        except (DistError, RuntimeError, OSError) as error:
            raise UserError(
                f"rank {rank} on {name} could not {'listen' if self.host else 'reach rank 0'} at "
                f"{address}:{port} within {seconds:g} s: is MASTER_ADDR right, the port free and open "
                f"between the nodes, and has rank 0 started? ({str(error).splitlines()[0][:200]})"
            ) from error

    def _knock(self) -> None:
        """Wait until somebody listens: TCPStore waits, too, but up to twice as long as it is told."""
        while True:
            try:
                socket.create_connection((self.address, self.port), self.left()).close()
                return
            except OSError:
                if time.monotonic() > self.ends:
                    raise
                time.sleep(0.2)

    def _connect(self, host: bool, seconds: float) -> Store:
        wait = timedelta(seconds=seconds)
        store = TCPStore(self.address, self.port, None, host, wait, wait_for_workers=False)
        # torchrun's store outlives a restart of the workers: what an earlier attempt said must not count.
        return PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def left(self) -> float:
        """Seconds to the deadline, never less than a little: zero means for ever to some libraries."""
        return max(self.ends - time.monotonic(), 0.1)

    def ask(self, stage: str, word: str, judge: Callable[[Sequence[str]], str]) -> None:
        """Say `word`; rank 0 makes a sentence of everybody's words, in rank order, "" where all is well.

        Raises:
            UserError: that sentence, on every process; or who had not come by the deadline.
        """
        self.store.set(f"{stage}/{self.rank}", word)
        if self.rank == 0:
            keys = [f"{stage}/{rank}" for rank in range(self.world)]
            came = self._wait(keys, self.left())
            said = judge([w.decode() for w in self.store.multi_get(keys)]) if came else self.absent(stage)
            self.store.set(f"told/{stage}", said)
        elif self._wait([f"told/{stage}"], self.left() + GRACE):
            said = self.store.get(f"told/{stage}").decode()
        else:
            said = self.absent(stage)
        if said:
            raise UserError(said)

    def _wait(self, keys: list[str], seconds: float) -> bool:
        try:
            self.store.wait(keys, timedelta(seconds=seconds))
        except (DistError, RuntimeError):
            return False
        return True

    def absent(self, stage: str, store: Store | None = None) -> str:
        """Who has not come to this stage, and who has, with the names they gave when they connected."""
        store = store or self.store
        try:
            came = [rank for rank in range(self.world) if store.check([f"{stage}/{rank}"])]
            known = [rank for rank in range(self.world) if store.check([f"name/{rank}"])]
            names = {rank: f"{rank} on {store.get(f'name/{rank}').decode()}" for rank in known}
        except (DistError, RuntimeError):
            return f"rank 0 at {self.address}:{self.port} is gone, and only it knows who came to {stage!r}"
        gone = [names.get(rank, str(rank)) for rank in range(self.world) if rank not in came]
        there = [names[rank] for rank in came] or ["nobody"]
        return (
            f"{len(came)} of {self.world} processes came to {stage!r} within {self.seconds:g} s; "
            f"missing: rank {', '.join(gone[:SHOWN]) or 'none'}; there: rank {', '.join(there[:SHOWN])}"
        )

    def watch(self, stage: str, hint: str) -> Callable[[], None]:
        """End this process soon after the deadline, whatever it hangs in; returns the all-clear."""
        timer = threading.Timer(self.left() + 2 * GRACE, self._end, (stage, hint))
        timer.daemon = True
        timer.start()
        return timer.cancel

    def _end(self, stage: str, hint: str) -> None:
        try:  # a connection of its own: the main thread may hold the first
            said = self.absent(stage, self._connect(False, GRACE))
        except (DistError, RuntimeError, OSError):
            said = "rank 0 is gone"
        print(f"preflight: rank {self.rank}: {hint}: {said}", file=sys.stderr, flush=True)
        os._exit(2)

    def leave(self) -> None:
        """The host stays until the others have gone, or they would miss its last word."""
        self.store.set(f"left/{self.rank}", "")
        if self.host:
            came = [rank for rank in range(self.world) if self.store.check([f"name/{rank}"])]
            self._wait([f"left/{rank}" for rank in came], GRACE)
