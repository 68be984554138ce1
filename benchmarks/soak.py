"""A run of two processes under faults that come at random, beside a calm one: do both end the same?

    python -m benchmarks.soak --minutes 45              # the first 15 or so are for the calm run
    python -m benchmarks.soak --minutes 2 --seed 7 --json soak.json
    python -m benchmarks.soak --minutes 0               # three faults, as soon as they can be done

Ranks are killed (one, all) or asked to stop (SIGTERM, SIGUSR1), in a long soak also while they start;
checkpoints are torn, the disk is full, the server of shards fails requests throughout. Each time the run
is started again with resume=auto. Exit code 1 where a verdict is not met. On the CPU, float32, gloo;
needs no network.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from .enduring import EPOCH, EVERY, Ended, Run, endure, prepare
from .faults import SURVIVED, disk, schedule
from .flaky import FlakyServer
from .verdicts import Loss, Verdict, judge, lost
from .witness import joined, read

GAP = 8.0  # seconds of steps between two faults, where there is time for them
ENDING = 3.0  # seconds from a fault to the end of both processes, about
FEWEST, SHORTEST = 3, 3  # faults (a rank killed, SIGUSR1, all killed and a checkpoint torn), epochs


class Pace(NamedTuple):
    """What a short calm run took."""

    start: float  # seconds until the first step, and from the last to the end
    step: float


class Report(NamedTuple):
    """What came of a soak."""

    seed: int
    steps: int
    calm: float  # seconds of the run without faults
    seconds: float  # of the run with faults
    starts: int
    replayed: int  # steps taken more than once
    disk: str
    server: dict[str, int]  # requests, and how many failed in which way
    losses: list[Loss]
    verdicts: list[Verdict]


def main() -> None:
    options = _options()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"soak: seed {seed}", flush=True)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no process and no mount behind
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        report = soak(Path(folder), options.minutes, seed)
    show(report)
    if options.json:
        plain = report._asdict() | {
            "losses": [loss._asdict() for loss in report.losses],
            "verdicts": [verdict._asdict() for verdict in report.verdicts],
        }
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    sys.exit(not all(verdict.met for verdict in report.verdicts))


def soak(folder: Path, minutes: float, seed: int) -> Report:
    """A calm run, and the same under faults; a short one before it tells what fits into so many minutes."""
    began, pace, (count, steps) = time.time(), Pace(0, 0), (FEWEST, SHORTEST * EPOCH)
    keys = prepare(folder, seed)
    with FlakyServer(folder / "data", seed) as server:
        if minutes:
            pace = _pace(Run(folder / "pace", folder, EPOCH, server.url, folder / "model"))
            count, steps = plan(60 * minutes - (time.time() - began), pace)
        print(f"soak: {steps} steps, {count} faults; {pace.start:.1f} s a start, {pace.step:.3f} s a step")
        calm = Run(folder / "calm", folder, steps, server.url, folder / "model")
        calm_seconds = calm.finish()
        faults = schedule(seed, count, steps, pace.start, 2 * EVERY)
        small = disk(folder / "disk", 4 * _room(calm) + 2**25)
        run = Run(folder / "struck", folder / "disk", steps, server.url, folder / "model")
        ends, since, server.faulty = [], time.time(), True
        try:
            for ended in endure(run, faults, small, random.Random(seed)):
                ends.append(ended)
                _tell(ended, run, since)
            seconds, history = time.time() - since, joined(run.witnesses)
            verdicts = judge(calm, run, keys, ends)
        finally:
            run.kill()
            small.close()
    losses = lost(ends, history, since + seconds)
    return Report(
        seed,
        steps,
        calm_seconds,
        seconds,
        len(ends),
        history.replayed,
        small.what,
        {"requests": server.requests, **server.failed},
        losses,
        verdicts,
    )


def plan(seconds: float, pace: Pace) -> tuple[int, int]:
    """How many faults and steps fill the time, the calm run included, which takes the steps once more."""
    fault = pace.start + ENDING + EVERY / 2 * pace.step  # and no new step
    left = seconds - 2 * pace.start
    count = max(int(left / (fault + 2 * GAP)), FEWEST)
    steps = (left - count * fault) / 2 / pace.step
    return count, max(round(steps / EPOCH), SHORTEST) * EPOCH


def _pace(run: Run) -> Pace:
    whole, lines = run.finish(), read(run.witnesses / "0001-0.jsonl")
    step = statistics.median(after.time - before.time for before, after in pairwise(lines))
    return Pace(whole - step * EPOCH, step)


def _room(run: Run) -> int:
    """Bytes of a checkpoint."""
    files = list(run.folder.rglob("*.safetensors"))
    return sum(path.stat().st_size for path in files) // len({path.parent for path in files})


def _tell(ended: Ended, run: Run, since: float) -> None:
    what = ended.fault.kind if ended.fault else "finished" if ended.done else "ended of itself"
    codes = ", ".join(map(str, ended.codes))
    step = f"step {run.step()}/{run.steps}"
    print(f"{time.time() - since:6.0f} s  start {ended.number}: {what} at {step}, codes {codes}", flush=True)


def show(report: Report) -> None:
    """Print the faults by kind, what they cost, and the verdicts."""
    title = f"soak, seed {report.seed}: {report.steps} steps of two processes, {report.starts} starts"
    columns = ("fault", "times", "survived", "codes", "ended in", "steps lost", "seconds lost")
    table = Table(*columns, title=title, caption="in pairs: mean, most")
    for kind in dict.fromkeys(loss.kind for loss in report.losses):
        of_kind = [loss for loss in report.losses if loss.kind == kind]
        codes = sorted({" ".join(map(str, sorted(loss.codes))) for loss in of_kind})
        costs = zip(*((loss.ending, loss.steps, loss.seconds) for loss in of_kind), strict=True)
        pairs = [f"{statistics.mean(cost):.1f}, {max(cost):.1f}" for cost in costs]
        table.add_row(kind, str(len(of_kind)), SURVIVED[kind], "; ".join(codes), *pairs)
    console = Console(width=150)
    console.print(table)
    failed = ", ".join(f"{count:,} {kind}" for kind, count in report.server.items())
    console.print(f"flaky server throughout: {failed}; asked again", highlight=False)
    console.print(f"full disk: {report.disk}", highlight=False)
    console.print(
        f"{len(report.losses)} faults, {report.replayed} steps taken again, {report.seconds:.0f} s beside "
        f"{report.calm:.0f} s of the calm run: {report.seconds - report.calm:.0f} s lost",
        highlight=False,
    )
    for verdict in report.verdicts:
        console.print(f"{'yes' if verdict.met else 'NO '}  {verdict.claim}: {verdict.seen}", highlight=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of everything, the calm run included; 0: as few as can be"
    )
    parser.add_argument("--seed", type=int, help="of the faults; by default another one each time")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
