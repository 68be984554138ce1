"""Who started this process: rank variables, srun, nobody; and whole programs started each way."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longclip import runs
from longclip.launching import ALONE, Place, devices, place, plugins
from longclip.types import UserError

ROOT = Path(__file__).resolve().parents[1]
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "longclip"}
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
}
RANKS = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_a_step_of_slurm_is_read():
    assert place(STEP) == Place(5, 8, 1, 4, "srun")
    assert place(STEP).nodes == 2


def test_a_batch_script_and_a_shell_of_salloc_are_one_process():
    assert place(JOB) is ALONE
    assert place(STEP | {"SLURM_JOB_NAME": "interactive"}) is ALONE


def test_rank_variables_are_read_and_win_over_slurms():
    assert place(RANKS | LOCAL) == Place(5, 8, 1, 4, "rank variables")
    assert place(STEP | RANKS | LOCAL).by == "rank variables"
    assert place(RANKS).nodes == 8, "one process a machine unless told otherwise"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not: set all or none"),
        (RANKS | {"LOCAL_RANK": "1"}, "LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1"),
        (RANKS | {"RANK": "8"}, "RANK=8 of WORLD_SIZE=8"),
    ],
)
def test_half_a_set_of_rank_variables_is_refused(env, words):
    with pytest.raises(UserError, match=words):
        place(env)


def test_devices_follow_from_who_started_the_process(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in RANKS | LOCAL]:
        monkeypatch.delenv(name)
    assert devices("auto") == "auto"
    assert type(plugins()[0]).__name__ == "LightningEnvironment"
    for name, value in (RANKS | LOCAL).items():
        monkeypatch.setenv(name, value)
    assert devices("auto") == 4
    assert type(plugins()[0]).__name__ == "TorchElasticEnvironment"


SMALL = [
    "data.prepare.train=96",
    "data.prepare.heldout=24",
    "data.prepare.groups=2",
    "batch_size=16",
    "samples=96",
    "optim.warmup=32",
    "checkpoints.every_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
    "trainer=cpu",
    "export=null",
    "benchmark=none",
]
QUIET = {name: value for name, value in os.environ.items() if name not in RANKS | LOCAL}
ENV = QUIET | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "LONGCLIP_TARGETS": "tests"}


def program(folder, name, *overrides):
    return ["train.py", *SMALL, f"runs={folder}", f"data.root={folder}/scenes", f"name={name}", *overrides]


def start(command, **env):
    return subprocess.Popen(
        command, cwd=ROOT, env=ENV | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process, code=0):
    said, _ = process.communicate(timeout=500)
    assert process.returncode == code, said[-3000:]
    return said


def weights(run):
    from longclip.stored import Stored

    stored = Stored(runs.newest_checkpoint(run))
    return {name: stored.read(name) for name in stored.shapes}


def same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that torchrun started, of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended(start([*torchrun, *program(folder, "torchrun")]))
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_signal_to_one_of_two_ranks_stops_both_and_the_run_goes_on_elsewhere(folder):
    """Rank variables start it, SIGUSR1 reaches one rank, Lightning's launcher ends it: torchrun's weights."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = folder / "ranks"
    hold = ["+logger.hold._target_=tests.slurm.hold.Hold", f"+logger.hold.run={run}", "+logger.hold.at=[2]"]
    command = [sys.executable, *program(folder, "ranks", *hold)]
    ranks = [start(command, **both, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    deadline = time.monotonic() + 400
    while not (run / "held-2").exists():
        assert time.monotonic() < deadline
        assert ranks[0].poll() is None, ranks[0].communicate()[0]
        time.sleep(0.1)
    os.kill(ranks[0].pid, signal.SIGUSR1)
    assert "SIGUSR1: saved at step 4; resume=auto goes on from there" in ended(ranks[0], 85)
    ended(ranks[1], 85)
    command = [sys.executable, *program(folder, "ranks", "resume=auto", "trainer.devices=2")]
    assert "at step 4" in ended(start(command))
    same(weights(folder / "torchrun"), weights(run))
