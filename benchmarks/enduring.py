"""A run of two processes that is started again and again until it is finished, whatever is done to it.

In: a tiny model and shards, faults. Out: the run directory, what its processes were trained on (`witness`),
and how each of its starts ended.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
from safetensors.torch import save_file

from longclip.data import scenes
from longclip.data.tars import shards

from .faults import FULL, TORN, Disk, Fault, strike, tear
from .witness import read

ROOT = Path(__file__).resolve().parents[1]
WORLD, SAMPLES, BATCH, EVERY = 2, 240, 16, 10
"""Processes; samples of an epoch; images a step; steps between two checkpoints."""

EPOCH = SAMPLES // BATCH  # steps
SIZE = 24  # pixels
LIMIT = 30  # seconds that a collective waits
PATIENCE = 100  # seconds in which processes must have ended after a fault, else they hang

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 12},
    "text_cfg": {"context_length": 248, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

WAYS = [
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    f"trainer.strategy.timeout_minutes={LIMIT / 60}",
    *("data=shards", "data.judge=[]", "data.workers=1", "data.storage.deadline=10", "benchmark=none"),
    *(f"batch_size={BATCH}", "recipe=long", "optim.warmup=64", "export=null", "resume=auto"),
    *(f"checkpoints.every_steps={EVERY}", "checkpoints.every_minutes=0"),
    "judge._target_=benchmarks.witness.Witness",
]


class Ended(NamedTuple):
    """How a start ended, and the fault that ended it; None: it ended of itself."""

    number: int
    fault: Fault | None
    codes: list[int]
    struck: float  # when the fault came, else when the start ended
    seconds: float  # from the fault to the end of the last process
    torn: str | None = None  # the checkpoint that was damaged afterwards

    @property
    def done(self) -> bool:
        return not any(self.codes)


class Run:
    """One run and what its starts have left.

    Args:
        home: where the witnesses and the output of every start go.
        runs: where the run directory goes; faults may fill this disk.
        steps: of the whole run.
        source: URL of the shards.
        model: folder of the tiny model.
    """

    def __init__(self, home: Path, runs: Path, steps: int, source: str, model: Path) -> None:
        self.home, self.steps, self.number = home, steps, 0
        self.folder, self.witnesses = runs / home.name, home / "witness"
        home.mkdir()
        own = [f"runs={runs}", f"name={home.name}", f"samples={steps * BATCH}", f"data.root={source}"]
        own += [f"model.backbone.architecture=local-dir:{model}", f"+judge.folder={self.witnesses}"]
        self.command = [sys.executable, "train.py", *WAYS, *own]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Begin, or go on, with both processes."""
        self.number, self.begun = self.number + 1, time.time()
        port = _free_port()
        both = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_PORT": str(port)}
        both |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        both |= {"LONGCLIP_TARGETS": "benchmarks"}
        command = [*self.command, f"+judge.number={self.number}"]
        self.processes = []
        for rank in map(str, range(WORLD)):
            env = os.environ | both | {"RANK": rank, "LOCAL_RANK": rank}
            with open(self.output(int(rank)), "wb") as out:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
                )

    def output(self, rank: int) -> Path:
        """What a process of the newest start prints."""
        return self.home / f"start-{self.number:04d}-{rank}.txt"

    def step(self) -> int:
        """The last step that process 0 of the newest start has told of, 0 before its first."""
        lines = read(self.witnesses / f"{self.number:04d}-0.jsonl")
        return lines[-1].step if lines else 0

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def codes(self) -> list[int]:
        """How the processes ended; waits for them, and kills those that outlive `PATIENCE`."""
        deadline = time.monotonic() + PATIENCE
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()
        return [process.wait() for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()

    def finish(self) -> float:
        """Run to the end in one start; returns the seconds it took.

        Raises RuntimeError where it fails.
        """
        try:
            self.start()
            while self.running():
                time.sleep(0.05)
        finally:
            self.kill()
        if any(self.codes()):
            raise RuntimeError(f"the calm run failed: {self.output(0).read_text()[-2000:]}")
        return time.time() - self.begun


def endure(run: Run, faults: Sequence[Fault], disk: Disk, chance: random.Random) -> Iterator[Ended]:
    """Start the run until it is finished; do one fault after the other to it, each when its step has come.

    Raises RuntimeError where it cannot go on: three starts in a row that end of themselves.
    """
    waiting, alone = list(faults), 0
    while alone < 3:
        run.start()
        due = _wait(run, waiting[0] if waiting else None)
        if due is None:
            ended = Ended(run.number, None, run.codes(), time.time(), 0.0)
        else:
            ended = _struck(run, waiting.pop(0), disk, chance)
        alone = 0 if ended.fault else alone + 1
        yield ended
        if ended.done:
            return
    raise RuntimeError(f"three starts in a row failed: {run.output(0).read_text()[-2000:]}")


def _wait(run: Run, fault: Fault | None) -> Fault | None:
    """The fault when its time has come, None if the start has ended before."""
    while run.running():
        early = fault is not None and fault.early is not None and time.time() - run.begun >= fault.early
        if fault is not None and (early or run.step() >= fault.step):
            return fault
        time.sleep(0.02)
    return None


def _struck(run: Run, fault: Fault, disk: Disk, chance: random.Random) -> Ended:
    """Do it, wait for the end, and mend what a person would have to."""
    at, torn = time.time(), None
    if fault.kind == FULL:
        disk.fill(run.processes)
    else:
        strike(fault, run.processes)
    codes = run.codes()
    seconds = time.time() - at
    disk.free()
    if fault.kind == TORN:
        torn = tear(run.folder, chance)
    return Ended(run.number, fault, codes, at, seconds, torn.name if torn else None)


def prepare(folder: Path, seed: int) -> list[str]:
    """Write `data/train` (shards of scenes) and `model` (random weights); returns the keys of the samples."""
    tokenizer = scenes.default_tokenizer()
    records = list(scenes.records("train", range(SAMPLES), seed, SIZE, tokenizer))
    shards.write(records, folder / "data" / "train", SAMPLES // 3, tokenizer.name_hash)
    (folder / "model").mkdir()
    model = open_clip.CLIP(**TINY)
    save_file(model.state_dict(), folder / "model" / "open_clip_model.safetensors")
    (folder / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    return [record.key for record in records]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
