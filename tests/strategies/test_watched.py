"""What is observed of two processes: norms of whole gradients, the slow one, the one that hangs."""

import logging
import os
import time
from functools import partial

import lightning
import pytest
import torch
from engines import Job, fit, in_group
from processes import spawn, start
from torch import distributed

from longclip import observing
from longclip.observing import Observe
from longclip.stopping import AGAIN
from longclip.watchdog import Watchdog

STEPS = 4  # log_every_n_steps is 2


class Kept(Observe):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(slow=1.5, patience=1)
        self.logged = []

    def _values(self, found):
        self.logged.append(super()._values(found))
        return self.logged[-1]

    def norms(self, engine):
        """grad_norm/* of every logging step, as one tensor each."""
        names = [name for name in self.logged[0] if name.startswith("grad_norm/")]
        return {f"{engine}:{n}": torch.tensor([values[n] for values in self.logged]) for n in names}


class Clock:
    """Stands for the module `time`; only goes on where process 1 is delayed: no test depends on load."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def delay(self, *_):
        self.now += float(distributed.get_rank())


class Delay(lightning.Callback):
    """Process 1 is slow by a second: where it waits for data, or while it encodes."""

    def __init__(self, where, clock):
        self.where, self.clock = where, clock

    def on_train_start(self, trainer, module):
        if self.where == "computing":
            module.tower.register_forward_pre_hook(self.clock.delay)

    def on_train_batch_start(self, *_):
        if self.where == "waiting for data":
            self.clock.delay()


REASONS = ["waiting for data", "computing"]


def observed(engines, job):
    """The norms under every engine."""
    in_group()
    found = {}
    for engine in engines:
        kept = Kept()
        fit(engine, job, [kept])
        found |= kept.norms(engine)
    return found


def delayed(job):
    """The norms; per reason rank/slowest of every logging step; the lines that were logged."""
    in_group()
    found, lines, clock = {}, [], Clock()
    observing.time = clock
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    observing.log.addHandler(handler)
    for where in REASONS:
        kept, delay = Kept(), Delay(where, clock)
        fit(
            "ddp", job, [kept, delay] if where == "computing" else [delay, kept]
        )  # who hooks first runs first
        found |= kept.norms("ddp")
        found[where] = torch.tensor([values["rank/slowest"] for values in kept.logged])
    return found | {"said": torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)}


def same_norms(found, engines, job):
    kept = Kept()
    fit("one", job._replace(micro_batch=None), [kept])
    alone = kept.norms("")
    assert {":grad_norm/image", ":grad_norm/text"} < alone.keys()
    for engine in engines:
        for name, value in alone.items():
            torch.testing.assert_close(found[engine + name], value, rtol=1e-4, atol=1e-6, msg=engine + name)


@pytest.fixture(scope="module")
def two(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    job = Job("siglip", STEPS, str(folder), str(scenes))
    return job, spawn(partial(delayed, job), 2, folder)


def test_gradient_norms_are_those_of_one_process(two):
    job, (first, _) = two
    same_norms(first, ["ddp"], job)


@pytest.mark.long
def test_gradient_norms_are_those_of_one_process_where_gradients_are_split(scenes, tmp_path):
    job = Job("dreamlip", 2, str(tmp_path), str(scenes), micro_batch=3)
    engines = ["fsdp2", "zero1", "zero2", "zero3"]
    same_norms(spawn(partial(observed, engines, job), 2, tmp_path)[0], engines, job)


def test_a_slow_process_is_named_once_with_the_reason(two):
    _, (first, second) = two
    said = bytes(first["said"].tolist()).decode().splitlines()
    assert len(said) == len(REASONS), said
    for where, line in zip(REASONS, said, strict=True):
        assert first[where].tolist() == [1, 1]
        assert line == (
            f"process 1 on {os.uname().nodename} holds the others up by {where}: it takes 1.000 s before it "
            "meets them, they take 0.000 s (for 1 logging intervals now)"
        )
    assert len(second["said"]) == 0, "one process says it"


class Hang(lightning.Callback):
    """Process 1 hangs after the second step; a start may take longer than the deadline of a second."""

    def __init__(self, dog):
        self.dog = dog

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            self.dog.seconds = 1
            if trainer.global_rank == 1:
                the_disk_does_not_answer()


def the_disk_does_not_answer():
    while True:
        time.sleep(0.1)


def hanging(job):
    in_group()
    os.dup2(os.open(f"{job.run}/said-{distributed.get_rank()}.txt", os.O_CREAT | os.O_WRONLY), 2)
    dog = Watchdog(job.run, 20 / 60, end=True)
    fit("ddp", job, [dog, Hang(dog)])


def test_where_one_process_hangs_both_say_where_they_are_and_end(scenes, tmp_path):
    job = Job("siglip", STEPS, str(tmp_path), str(scenes))
    processes = start(partial(hanging, job), 2, tmp_path)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [AGAIN, AGAIN]
    waits, hangs = ((tmp_path / f"stacks-rank{rank}.txt").read_text() for rank in range(2))
    assert "the_disk_does_not_answer" in hangs
    assert "the_disk_does_not_answer" not in waits
    assert "distributed_c10d.py" in waits.split("thread MainThread")[1], "it waits in a collective"
    assert "process 1 on" in hangs
    assert "2 steps done" in hangs
    assert "nothing has happened for 0:00:01 since a step ended" in hangs
    said = (tmp_path / "said-1.txt").read_text()
    assert hangs in said, "stderr gets the same: the run's disk may be what hangs"
