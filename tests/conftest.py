"""Shared by all tests: a tiny model, tiny scenes, one thread."""

import json
import os

import pytest
import torch
from tiny import TINY

os.environ.setdefault("WANDB_MODE", "offline")

# Two files are tested at a time on two cores, and sums of several threads end in other bits.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


LONGEST = (
    *("slurm/", "test_run", "strategies/", "test_soak", "test_launching", "test_benchmarks", "export/"),
    *("test_planner", "test_wandb", "test_trainings", "test_docs", "towers/", "data/test_faults"),
)


def pytest_collection_modifyitems(items):
    """Files that take minutes first, so that no core waits for the other at the end."""

    def place(item):
        starts = (n for n, start in enumerate(LONGEST) if item.nodeid.startswith(f"tests/{start}"))
        return next(starts, len(LONGEST))

    items.sort(key=place)  # a stable sort


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """The embedded data, small: 96 scenes to train on, 24 held out, 2 groups of distractors; 24 px."""
    from longclip.data import scenes

    root = tmp_path_factory.mktemp("data") / "scenes"
    scenes.make(root, train=96, heldout=24, groups=2, size=24, processes=1)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The name of a tiny architecture, registered with open_clip, and the folder its JSON lies in."""
    import open_clip

    folder = tmp_path_factory.mktemp("architectures")
    (folder / "ViT-longclip-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return "ViT-longclip-tiny"


@pytest.fixture
def tower(tiny):
    """Towers of that architecture, of random weights."""
    from longclip.towers.clip import DualTower
    from longclip.towers.pretrained import build

    return DualTower(build(tiny, None, 248))


@pytest.fixture
def data(scenes, tower):
    """The tiny scenes as that model reads them, to judge on."""
    from longclip.data.module import DataModule
    from longclip.data.plans.plan import Plan

    return DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(64, 8), groups=None,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg,
    )  # fmt: skip
