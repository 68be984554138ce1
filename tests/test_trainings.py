"""Whole trainings typed in this process: what else a run writes, other recipes, the jobs of a sweep."""

import project
import pytest
import torch

from longclip import runs
from longclip.stored import Stored

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    with project.inside(tmp_path_factory.mktemp("project")) as folder:
        yield folder


def train(*overrides):
    return project.typed("python train.py", *project.SMALL, *project.SCENES, *overrides)


def weights(run):
    stored = Stored(runs.newest_checkpoint(run))
    return {name: stored.read(name) for name in stored.shapes}


def test_tensorboard_is_written(folder):
    train("name=tb", "logger=tensorboard", "benchmark=none")
    assert list((folder / "runs" / "tb").rglob("events.out.tfevents*"))


# All of them take a step in towers/test_chunks.
@pytest.mark.parametrize(("recipe", "more"), [("clip", []), ("debias", ["recipe.terms.short.k=2"])])
def test_other_recipes_train_and_are_judged(folder, recipe, more):
    train(f"name={recipe}", f"recipe={recipe}", *more)
    assert [row["samples_seen"] for row in runs.judgements(folder / "runs" / recipe)] == [0, 8]


def test_the_jobs_of_a_sweep_have_run_directories_of_their_own(folder):
    train("name=sweep", "benchmark=none", "optim.lr=1e-3,1e-4", "-m")
    one, two = (weights(folder / "runs" / f"sweep-{number}") for number in (0, 1))
    assert any(not torch.equal(value, two[name]) for name, value in one.items())
