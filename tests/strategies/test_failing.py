"""One of two processes fails in its third step: the other ends within a bounded time and says why."""

import os
import signal
import sys
from dataclasses import replace
from functools import partial

import lightning
import pytest
from engines import Job, fit, in_group
from processes import start
from torch import distributed

from longclip.failing import Together

TIMEOUT = 8  # seconds that a collective waits


class Fail(lightning.Callback):
    """What befalls process 1."""

    def __init__(self, mode):
        self.mode = mode

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            if self.mode == "raise":
                raise ValueError("the disk under process 1 is on fire")
            if self.mode == "shape":  # an image too many: its collectives do not fit those of process 0
                module.terms["long"].register_forward_pre_hook(lambda _, args: (shortened(args[0]),))
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[self.mode])


def shortened(e):
    return replace(e, image_BE=e.image_BE[1:], text_BKE=e.text_BKE[1:], mask_BK=e.mask_BK[1:])


def failing(mode, job):
    in_group()
    os.dup2(os.open(f"{job.run}/said-{distributed.get_rank()}.txt", os.O_CREAT | os.O_WRONLY), 2)
    try:
        fit("ddp", job, [Together(job.run), Fail(mode)])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


def both(mode, run, scenes):
    """(exit code, last line of stderr) of both processes; they are killed where they outlive a minute."""
    job = Job("siglip", 6, str(run), str(scenes))
    processes = start(partial(failing, mode, job), 2, run, seconds=TIMEOUT)
    try:
        processes[0].join(240)
        if mode == "hang":
            processes[1].kill()
        processes[1].join(TIMEOUT + 30)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(run / f"said-{rank}.txt").read_text() for rank in range(2)]
    return [(code, text.strip().rpartition("\n")[2]) for code, text in zip(codes, said, strict=True)]


def test_a_process_that_raises_ends_the_other_with_its_message(scenes, tmp_path):
    (code, said), (own_code, own) = both("raise", tmp_path, scenes)
    assert (code, own_code) == (1, 1)
    assert own == "ValueError: the disk under process 1 is on fire"
    assert said.startswith("UserError: process 0 stops because another failed first: process 1 on ")
    assert said.endswith("the disk under process 1 is on fire")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["kill", "hang"])
def test_a_process_that_is_killed_or_hangs_ends_the_other_with_a_sentence(mode, scenes, tmp_path):
    (code, said), (own_code, _) = both(mode, tmp_path, scenes)
    assert (code, own_code) == (1, -9)
    assert said.startswith(
        "UserError: process 0 does not hear from the others any more, and none of them left"
    )


@pytest.mark.long
def test_shapes_that_differ_between_processes_end_both(scenes, tmp_path):
    codes = {code for code, _ in both("shape", tmp_path, scenes)}
    assert not codes & {0, None, -9}, "gloo aborts one of them; neither goes on, neither had to be killed"
