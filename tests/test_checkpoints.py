"""When checkpoints appear and go: by steps, by minutes, in the background, the newest few."""

import threading

import lightning
import pytest
import torch

from longclip import checkpoints, runs
from longclip.checkpoints import CLOCK_STEPS, Checkpoints, _prune
from longclip.stored import Stored, write_share
from longclip.types import UserError


class Module(lightning.LightningModule):
    """The smallest module that trains and keeps its place."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.samples_seen = 0

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["longclip"] = {"samples_seen": self.samples_seen}

    def on_load_checkpoint(self, checkpoint):
        self.samples_seen = checkpoint["longclip"]["samples_seen"]


def train(saves, steps, *callbacks):
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[saves, *callbacks],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(100, 2), batch_size=1))
    return module


def steps(run):
    return [Stored(path).values["global_step"] for path in runs.checkpoints(run)]


def test_by_steps_and_at_the_end_the_newest_few_stay(tmp_path):
    train(Checkpoints(tmp_path, 3, 0, keep=2), 10)
    assert steps(tmp_path) == [9, 10]
    train(Checkpoints(tmp_path / "none", 0, 0, keep=1), 4)
    assert steps(tmp_path / "none") == [4]


def test_by_minutes(tmp_path):
    train(Checkpoints(tmp_path, 0, 1e-9, keep=9), 2 * CLOCK_STEPS + 1)
    assert steps(tmp_path) == [CLOCK_STEPS, 2 * CLOCK_STEPS, 2 * CLOCK_STEPS + 1]


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, 1, 0, keep=0)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    later, in_time = threading.Event(), []

    def slowly(*args):
        in_time.append(later.wait(timeout=30))
        write_share(*args)

    class Later(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                later.set()

    monkeypatch.setattr(checkpoints, "write_share", slowly)
    train(Checkpoints(tmp_path, 3, 0, keep=9), 5, Later())
    assert in_time == [True, True]
    assert steps(tmp_path) == [3, 5]


def test_what_a_background_write_holds_is_the_state_of_its_step(tmp_path, monkeypatch):
    seen, later = {}, threading.Event()

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen[trainer.global_step] = module.layer.weight.detach().clone()
            if trainer.global_step == 5:
                later.set()

    monkeypatch.setattr(checkpoints, "write_share", lambda *args: (later.wait(30), write_share(*args)))
    train(Checkpoints(tmp_path, 3, 0, keep=9), 5, Keep())
    for path in runs.checkpoints(tmp_path):
        found = Stored(path)
        assert torch.equal(found.read("weights/layer.weight"), seen[found.values["global_step"]])


def test_only_whole_checkpoints_count_and_leftovers_go(tmp_path):
    def write(step, world=1):
        path = tmp_path / "checkpoints" / runs.checkpoint_name(step)
        write_share(path, 0, world, {}, {"global_step": step})

    for step in (1, 2, 4, 5):
        write(step)
    write(3, world=2)  # torn between whole ones
    write(6, world=2)  # perhaps still being written
    _prune(tmp_path, keep=2)
    assert [path.name for path in runs.checkpoints(tmp_path)] == [runs.checkpoint_name(n) for n in (4, 5, 6)]
    _prune(tmp_path, keep=3)
    assert len(runs.checkpoints(tmp_path)) == 3, "too few whole ones: nothing goes"


def test_a_save_replaces_what_a_killed_one_left_at_the_same_step(tmp_path):
    left = tmp_path / "checkpoints" / runs.checkpoint_name(3)
    write_share(left, 1, 2, {"old": torch.ones(1)}, {})
    train(Checkpoints(tmp_path, 3, 0, keep=9), 3)
    assert [path.name for path in left.iterdir()] == ["00001-of-00001.safetensors"]
    assert Stored(left).values["global_step"] == 3
