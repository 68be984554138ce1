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

STEPS = 4


class Kept(Observe):
    """Keeps what is logged, and counts the collectives."""

    def __init__(self):
        super().__init__(slow=2, patience=1)
        self.logged, self.tables = [], []

    def _everyone(self, device):
        self.tables.append(super()._everyone(device))
        return self.tables[-1]

    def _values(self, found):
        self.logged.append(super()._values(found))
        return self.logged[-1]


def norms(engine, job):
    """grad_norm/* of every logging step, as one tensor each."""
    kept = Kept()
    fit(engine, job, [kept])
    assert len(kept.logged) == job.steps // 2, "log_every_n_steps is 2"
    names = [name for name in kept.logged[0] if name.startswith("grad_norm/")]
    return {f"{engine}:{name}": torch.tensor([values[name] for values in kept.logged]) for name in names}


def norms_of(engines, job):
    in_group()
    found = {}
    for engine in engines:
        found |= norms(engine, job)
    return found


@pytest.mark.parametrize(
    "engines", [["ddp"], pytest.param(["fsdp2", "zero1", "zero2", "zero3"], marks=pytest.mark.long)], ids=str
)
def test_gradient_norms_are_those_of_one_process(engines, scenes, tmp_path):
    job = Job("dreamlip", STEPS, str(tmp_path), str(scenes), micro_batch=3)
    alone = norms("one", job)
    assert {"one:grad_norm/image", "one:grad_norm/text", "one:grad_norm/scale"} <= alone.keys()
    for found in spawn(partial(norms_of, engines, job), 2, tmp_path):
        wanted = {name.replace("one", engine): v for engine in engines for name, v in alone.items()}
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Delay(lightning.Callback):
    """Process 1 is slow: where it waits for data, or while it encodes."""

    def __init__(self, where):
        self.where = where

    def on_train_start(self, trainer, module):
        if self.where == "computing" and trainer.global_rank == 1:
            module.tower.register_forward_pre_hook(lambda *_: time.sleep(0.1))

    def on_train_batch_start(self, trainer, *_):
        if self.where == "waiting for data" and trainer.global_rank == 1:
            time.sleep(0.1)


REASONS = ["waiting for data", "computing"]


def named(job):
    """Per reason: rank/slowest of every logging step, and the lines that were logged."""
    in_group()
    found, lines = {}, []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    observing.log.addHandler(handler)
    for where in REASONS:
        kept, delay = Kept(), Delay(where)
        fit(
            "ddp", job, [kept, delay] if where == "computing" else [delay, kept]
        )  # who hooks first runs first
        found[where] = torch.tensor([values["rank/slowest"] for values in kept.logged])
    return found | {"said": torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)}


def test_a_slow_process_is_named_once_with_the_reason(scenes, tmp_path):
    first, second = spawn(partial(named, Job("siglip", STEPS, str(tmp_path), str(scenes))), 2, tmp_path)
    said = bytes(first["said"].tolist()).decode().splitlines()
    assert len(said) == len(REASONS), said
    for where, line in zip(REASONS, said, strict=True):
        assert first[where].tolist() == [1, 1]
        assert line.startswith(
            f"process 1 on {os.uname().nodename} holds the others up by {where}: it takes 0."
        )
    assert len(second["said"]) == 0, "one process says it"


class Hang(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            the_disk_does_not_answer()


def the_disk_does_not_answer():
    while True:
        time.sleep(0.1)


def hanging(job):
    in_group()
    os.dup2(os.open(f"{job.run}/said-{distributed.get_rank()}.txt", os.O_CREAT | os.O_WRONLY), 2)
    fit("ddp", job, [Watchdog(job.run, 1 / 60, end=True), Hang()])


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
