"""What goes wrong in a soak: a seeded list of faults, and how each is done to a run of two processes.

In: a seed, a count, the length of the run. Out: `Fault`s in the order in which they come.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from longclip import runs

ONE, ALL, TERM, AGAIN = "SIGKILL of one", "SIGKILL of all", "SIGTERM to one", "SIGUSR1 to one"
TORN, FULL = "torn checkpoint", "full disk"

SURVIVED = {
    ONE: "the other ends; on from the newest checkpoint",
    ALL: "on from the newest checkpoint",
    TERM: "both save after the same step, leave with 143",
    AGAIN: "both save after the same step, leave with 85",
    TORN: "all killed; passed over, on from an older one",
    FULL: "both end with a sentence; older ones are intact",
}
"""Kind -> what the run does about it."""

MUST = (ONE, AGAIN, TORN, ALL, FULL, TERM)
"""The order in which kinds are taken into a short soak."""

EARLY = 0.1
"""Share of the kills and signals that come while the processes still start."""


class Fault(NamedTuple):
    """What happens when process 0 has taken `step` steps, or `early` seconds after a start."""

    kind: str
    step: int
    rank: int  # which process, where it is done to one
    early: float | None = None


def schedule(seed: int, count: int, steps: int, start: float, first: int) -> list[Fault]:
    """So many faults spread over a run of so many steps whose start takes `start` seconds.

    None comes before step `first`: there should be a checkpoint to tear.
    """
    chance = random.Random(seed)
    kinds = [MUST[number % len(MUST)] for number in range(count)]
    chance.shuffle(kinds)
    at = sorted(chance.sample(range(first, steps), count))
    found = []
    for kind, step in zip(kinds, at, strict=True):
        early = chance.uniform(0, start) if chance.random() < EARLY and kind not in (TORN, FULL) else None
        found.append(Fault(kind, step, chance.randrange(2), early if count > len(MUST) else None))
    return found


def strike(fault: Fault, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Do to running processes what the fault says; a full disk is made by a `Disk`."""
    signum = {TERM: signal.SIGTERM, AGAIN: signal.SIGUSR1}.get(fault.kind, signal.SIGKILL)
    struck = processes if fault.kind in (ALL, TORN) else [processes[fault.rank]]
    for process in struck:
        process.send_signal(signum)


def tear(run: Path, chance: random.Random) -> Path | None:
    """Damage a file of the newest whole checkpoint: cut short, lost, or with another beginning."""
    newest = runs.newest_checkpoint(run)
    if newest is None:
        return None
    path = chance.choice(sorted(newest.glob("*.safetensors")))
    how = chance.choice(["cut", "lost", "beginning"])
    if how == "cut":
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif how == "lost":
        path.unlink()
    else:
        with open(path, "r+b") as file:
            file.write(chance.randbytes(64))
    return newest


class Disk(Protocol):
    """Where the run directory lies."""

    what: str

    def fill(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Leave these processes no room for a checkpoint."""

    def free(self) -> None:
        """Make room again."""

    def close(self) -> None:
        """Leave nothing behind."""


class SmallDisk:
    """A file system in memory, of a fixed size; needs the right to mount one.

    Raises OSError where that right is missing.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self.what = f"a tmpfs of {room / 2**20:.0f} MiB, filled to the last byte"
        self.folder, self.ballast = folder, folder / "ballast"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise PermissionError(f"no file system can be mounted on {folder}")

    def fill(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        with open(self.ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                return

    def free(self) -> None:
        self.ballast.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False)


class SmallFiles:
    """Any folder; "full" means that a process may write no file above 1 MiB (RLIMIT_FSIZE)."""

    what = "a limit on the size of a file: this user may not mount a small disk"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    def fill(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))

    def free(self) -> None:
        """The limit ends with the processes."""

    def close(self) -> None:
        """Nothing is left behind."""


def disk(folder: Path, room: int) -> Disk:
    """The fullest kind of full disk that this user can have."""
    try:
        return SmallDisk(folder, room)
    except OSError:
        return SmallFiles(folder)
