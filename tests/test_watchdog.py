"""Silence is told once, with all stacks; a long judgement is no silence. Hangs: tests/strategies."""

import time

import lightning
import pytest
from test_training import parts

from longclip.types import UserError
from longclip.watchdog import Watchdog

DEADLINE = 0.4  # seconds


class Busy(lightning.Callback):
    """After the second step: something that takes twice the deadline."""

    def __init__(self, encodes):
        self.encodes = encodes

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            for _ in range(8):
                time.sleep(DEADLINE / 4)
                if self.encodes:
                    module.tower(batch, module.slots)


def watched(scenes, tiny, run, busy, minutes=DEADLINE / 60):
    dog = Watchdog(run, minutes, end=False)
    trainer, module, data = parts(scenes, tiny, samples=64, extra=[dog, busy])
    trainer.fit(module, data)
    assert module.samples_seen == 64, "the run goes on"
    return list(run.glob("stacks-rank*.txt"))


def test_silence_is_told_once_with_all_stacks(scenes, tiny, tmp_path, capfd):
    (path,) = watched(scenes, tiny, tmp_path, Busy(encodes=False))
    text = path.read_text()
    assert text.count("nothing has happened") == 1
    assert "process 0 on" in text
    assert "since a step ended, 2 steps done; it is left alone" in text
    assert "time.sleep(DEADLINE / 4)" in text.split("thread MainThread")[1]
    assert text in capfd.readouterr().err


def test_a_judgement_longer_than_the_deadline_is_no_silence(scenes, tiny, tmp_path):
    assert watched(scenes, tiny, tmp_path, Busy(encodes=True)) == []


def test_no_minutes_no_watchdog(scenes, tiny, tmp_path):
    assert watched(scenes, tiny, tmp_path, Busy(encodes=False), minutes=0) == []


def test_negative_minutes_are_refused():
    with pytest.raises(UserError, match=r"watchdog.minutes is -1; give minutes"):
        Watchdog("run", -1, end=True)
