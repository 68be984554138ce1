"""Silence is told once, with all stacks; a judgement is no silence. A real hang: tests/strategies."""

import threading
from types import SimpleNamespace

import lightning
import pytest
from test_training import parts

from longclip.stopping import AGAIN
from longclip.types import UserError
from longclip.watchdog import GRACE, TICKS, Watchdog

TOLD = "nothing has happened for 0:10:00 since a step ended, 7 steps done"


class Script:
    """Stands for the event that a watchdog waits on: each tick does what the script says next."""

    def __init__(self, *actions):
        self.actions = list(actions)

    def wait(self, seconds):
        if not self.actions:
            return True
        self.actions.pop(0)()
        return False


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Lets a watchdog of ten minutes see these ticks; returns it, its exit codes, and what it wrote."""

    def run(*ticks, end=False):
        codes = []
        monkeypatch.setattr("os._exit", codes.append)
        dog = Watchdog(tmp_path, minutes=10, end=end)
        dog.done = Script(*((lambda: dog._sign("a step ended")) if tick == "sign" else int for tick in ticks))
        dog._watch(SimpleNamespace(global_step=7))
        return dog, codes, "".join(path.read_text() for path in tmp_path.glob("stacks-rank0.txt"))

    return run


def test_silence_is_told_once_with_all_stacks(watch, capsys):
    _, codes, text = watch("sign", *["quiet"] * 3 * TICKS)
    assert text.count(TOLD) == 1
    assert "process 0 on" in text
    assert "it is left alone" in text
    assert "test_silence_is_told_once_with_all_stacks" in text.split("thread MainThread")[1]
    assert text in capsys.readouterr().err
    assert codes == []


def test_a_sign_of_life_begins_the_count_anew(watch):
    almost = ["sign", *["quiet"] * (TICKS - 1)]
    assert watch(*almost, *almost, *almost)[1:] == ([], "")
    assert watch(*almost, "quiet", *almost, "quiet")[2].count(TOLD) == 2


def test_the_end_comes_after_a_grace_in_which_life_may_come_back(watch):
    silent = ["sign", *["quiet"] * TICKS]
    assert watch(*silent, "sign", *silent, end=True)[1] == []
    assert watch(*silent, *["quiet"] * GRACE, end=True)[1] == [AGAIN]


def test_an_exception_after_the_stacks_is_the_others_leaving(watch):
    for ticks, code in ((["quiet"] * TICKS, [AGAIN]), (["quiet"] * (TICKS - 1), [])):
        dog, codes, _ = watch("sign", *ticks, end=True)
        dog.done = threading.Event()
        dog.on_exception(None, None, RuntimeError("Connection closed by peer"))
        assert codes == code


class Encodes(lightning.Callback):
    """A judgement, as far as a watchdog can tell."""

    def __init__(self, dog):
        self.dog, self.signs = dog, []

    def on_train_start(self, trainer, module):
        batch = next(iter(trainer.train_dataloader))
        for _ in range(3):
            module.tower(batch, module.slots)
            self.signs.append(self.dog.signs)


def test_every_batch_of_a_judgement_is_a_sign_of_life(scenes, tiny, tmp_path):
    dog = Watchdog(tmp_path, minutes=10, end=True)
    judge = Encodes(dog)
    trainer, module, data = parts(scenes, tiny, samples=32, extra=[dog, judge])
    trainer.fit(module, data)
    assert judge.signs == [2, 3, 4]
    assert dog.signs == 4 + 2 * 3, "a batch arrived, it was encoded, the step ended"
    assert dog.done.is_set()


def test_no_minutes_no_watchdog_and_negative_ones_are_refused(tmp_path):
    dog, before = Watchdog(tmp_path, 0, end=True), set(threading.enumerate())  # another's may just be ending
    dog.on_fit_start(None, None)
    assert "watchdog" not in {thread.name for thread in set(threading.enumerate()) - before}
    with pytest.raises(UserError, match=r"watchdog.minutes is -1; give minutes"):
        Watchdog(tmp_path, -1, end=True)
