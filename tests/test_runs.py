"""A run directory: where a start goes on, and whose config it keeps."""

import pytest
import torch

from longclip import runs
from longclip.stored import write_share
from longclip.types import UserError


def save(run, *steps):
    for step in steps:
        folder = run / "checkpoints" / runs.checkpoint_name(step)
        write_share(folder, 0, 1, {"weights/x": torch.ones(2)}, {"step": step})
    return folder


def test_a_run_goes_on_from_its_newest_or_from_a_path(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    assert runs.claim(run, None) is runs.claim(run, "auto") is None
    newest = save(run, 4, 6)
    assert runs.claim(run, "auto") == runs.claim(run, str(newest)) == newest
    assert runs.claim(other, str(newest)) == newest, "a branch of its own"
    with pytest.raises(UserError, match="already holds a run: resume=auto"):
        runs.claim(run, None)
    with pytest.raises(UserError, match="no such checkpoint"):
        runs.claim(run, "nowhere")


def test_a_run_does_not_go_back_behind_its_newest_checkpoint(tmp_path):
    """Two branches in one directory: the older would be judged and exported, the newer pruned."""
    newest = save(tmp_path / "run", 4, 6)
    back = newest.with_name(runs.checkpoint_name(4))
    with pytest.raises(UserError, match=r"would go back behind .*step-000000006.*name=OTHER begins a run"):
        runs.claim(tmp_path / "run", str(back))
    assert runs.claim(tmp_path / "run", str(back), leader=False) == back, "the leader ends all"


def test_the_same_command_again_goes_on_with_a_branch(tmp_path):
    """A job that was requeued types what it typed before."""
    begin, run = save(tmp_path / "run", 4), tmp_path / "branch"
    runs.write_config(run, f"resume: {begin}\n")
    newest = save(run, 5)
    assert runs.claim(run, str(begin)) == newest
    with pytest.raises(UserError, match="would go back behind"):
        runs.claim(run, str(save(tmp_path / "run", 6)))


def test_the_config_of_a_start_that_came_to_nothing_is_replaced(tmp_path):
    runs.write_config(tmp_path, "lr: 0.1")
    assert runs.write_config(tmp_path, "lr: 0.2").name == "config.yaml"
    assert (tmp_path / "config.yaml").read_text() == "lr: 0.2"
    runs.record(tmp_path, 0, {"r1": 1.0})
    assert runs.write_config(tmp_path, "lr: 0.3").name == "config.resume-1.yaml"
    assert (tmp_path / "config.yaml").read_text() == "lr: 0.2"
