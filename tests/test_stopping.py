"""A signal never falls into a step: it is heard at once and answered at the step's end."""

import os
import signal
from types import SimpleNamespace

import pytest

from longclip.stopping import CODES, Stop

TRAINER = SimpleNamespace(global_step=7)


class Saves:
    def __init__(self):
        self.count = 0

    def on_train_end(self, trainer, module):
        self.count += 1


@pytest.fixture
def saves():
    return Saves()


@pytest.fixture
def stop(saves, monkeypatch):
    before = {signum: signal.getsignal(signum) for signum in CODES}
    monkeypatch.setattr("atexit.register", lambda function: None)
    yield Stop(saves)
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143)])
def test_in_a_step_it_waits_for_the_end_saves_and_leaves(stop, saves, signum, code):
    module = SimpleNamespace()
    stop.on_train_batch_start(TRAINER, module)
    os.kill(os.getpid(), signum)
    stop.on_train_batch_end(TRAINER, module)
    assert saves.count == 0, "what was heard after the processes had agreed counts in the next step"
    stop.on_train_batch_start(TRAINER, module)
    with pytest.raises(SystemExit) as left:
        stop.on_train_batch_end(TRAINER, module)
    assert (left.value.code, saves.count) == (code, 1)
    os.kill(os.getpid(), signal.SIGTERM)  # on the way out no further signal counts


def test_what_another_process_heard_counts(stop, saves):
    module = SimpleNamespace()
    stop.on_train_batch_start(TRAINER, module)
    module.asked = signal.SIGUSR1  # training_step has agreed with the others
    with pytest.raises(SystemExit):
        stop.on_train_batch_end(TRAINER, module)
    assert saves.count == 1


def test_of_two_signals_the_final_one_wins(stop):
    module = SimpleNamespace()
    stop.on_train_batch_start(TRAINER, module)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    stop.on_train_batch_start(TRAINER, module)
    assert module.asked == signal.SIGTERM


def test_outside_the_steps_it_leaves_at_once(stop, saves):
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (left.value.code, saves.count) == (85, 0)


def test_the_last_judgement_is_left_at_once(stop, saves):
    stop.on_train_batch_start(TRAINER, SimpleNamespace())
    stop.on_train_end(TRAINER, SimpleNamespace())
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    assert saves.count == 0, "saved at its end the run would be done, and never judged"
