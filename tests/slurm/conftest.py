"""A cluster of two nodes for all tests here, and the project's own batch scripts submitted to it."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cluster as slurm

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.prepare.train=96",
    "data.prepare.heldout=24",
    "data.prepare.groups=2",
    "batch_size=16",
    "samples=256",
    "optim.warmup=32",
    "checkpoints.every_steps=3",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
    "export=null",
    "benchmark=none",
]
NO_GPUS = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if slurm.missing():
        pytest.skip(f"no SLURM on this machine: {slurm.missing()}")
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def shared(tmp_path_factory, scenes_of_slurm):
    """The folder that all nodes share: runs and logs."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def scenes_of_slurm(tmp_path_factory):
    from longclip.data import scenes

    root = tmp_path_factory.mktemp("data") / "scenes"
    scenes.make(root, train=96, heldout=24, groups=2, size=72, processes=1)
    return root


@pytest.fixture(scope="session")
def sbatch(cluster, shared, scenes_of_slurm):
    """`sbatch(script, override, ..., options=[...])` -> the job's number."""
    env = {
        "LONGCLIP_PYTHON": sys.executable,
        "LONGCLIP_RUNS": str(shared),
        "GLOO_SOCKET_IFNAME": "lo",
        "WANDB_MODE": "offline",
        "LONGCLIP_TARGETS": "tests,engines",
        "PYTHONPATH": os.pathsep.join(str(ROOT / place) for place in (".", "tests", "tests/strategies")),
    }

    def submit(script, *arguments, options=NO_GPUS, **more):
        log = f"--output={shared}/%x-%j.log"
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", log, *options, f"{ROOT}/slurm/{script}"]
        return cluster.call(*command, *arguments, **env, **more)

    return submit
