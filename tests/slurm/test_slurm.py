"""The batch scripts on a real SLURM of two nodes: what befalls a job, and that the run does not feel it."""

import os
import re
import sys
from pathlib import Path

import cluster as slurm
import pytest
import torch

from longclip import runs
from longclip.data import scenes
from longclip.stored import Stored

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.prepare.train=96",
    "data.prepare.heldout=24",
    "data.prepare.groups=2",
    "batch_size=16",
    "samples=192",
    "optim.warmup=32",
    "checkpoints.every_steps=3",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
    "export=null",
    "benchmark=none",
]
NO_GPUS = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
TWO_NODES = ["--nodes=2", *NO_GPUS]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
HELD = (2, 5, 9)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if slurm.missing():
        pytest.skip(f"no SLURM on this machine: {slurm.missing()}")
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory, scenes_of_slurm):
    """The folder that all nodes share: runs and logs."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def scenes_of_slurm(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    scenes.make(root, train=96, heldout=24, groups=2, size=72, processes=1)
    return root


@pytest.fixture(scope="module")
def sbatch(cluster, shared, scenes_of_slurm):
    """`sbatch(script, override, ..., options=[...])` -> the job's number."""
    env = {
        "LONGCLIP_PYTHON": sys.executable,
        "LONGCLIP_RUNS": str(shared),
        "LONGCLIP_FREE_GB": "0.5",  # what these runs take, and more
        "GLOO_SOCKET_IFNAME": "lo",
        "WANDB_MODE": "offline",
        "LONGCLIP_TARGETS": "tests,engines",
        "PYTHONPATH": os.pathsep.join(str(ROOT / place) for place in (".", "tests", "tests/strategies")),
    }

    def submit(script, *arguments, options=NO_GPUS, **more):
        log = f"--output={shared}/%x-%j.log"
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", log, *options, f"{ROOT}/slurm/{script}"]
        return cluster.call(*command, *arguments, **(env | more))

    return submit


def reach(cluster, job, run, step):
    """Wait until the run holds at a step; a job that ends before says why."""
    held = run / f"held-{step}"
    cluster.wait(lambda: held.exists() or cluster.state(job) in ENDS, f"step {step}")
    logs = [path for path in run.parent.rglob("*.log") if f"-{job}" in path.name]
    assert held.exists(), f"{cluster.state(job)}: " + "\n".join(path.read_text()[-3000:] for path in logs)


def finish(cluster, job, state="COMPLETED"):
    cluster.wait(lambda: cluster.state(job) in ENDS, f"job {job} to end")
    assert cluster.state(job) == state


def again(cluster, job, restarts):
    """Wait until the job is queued once more, and cut short the pause that SLURM would make.

    Within the same second it would start with the credential that has just been revoked, and fail.
    """
    cluster.wait(lambda: cluster.state(job) == "PENDING" and cluster.restarts(job) == restarts, "the requeue")
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+2", "TimeLimit=60")


def train(scenes, name, *more):
    return ["train.sbatch", *SMALL, "trainer=cpu", f"data.root={scenes}", f"name={name}", *more]


def hold(run, *steps):
    """Overrides by which a run waits for a signal at these steps."""
    at = ",".join(map(str, steps))
    target = "tests.slurm.hold.Hold"
    return [f"+logger.hold._target_={target}", f"+logger.hold.run={run}", f"+logger.hold.at=[{at}]"]


@pytest.fixture(scope="module")
def calm(cluster, sbatch, shared, scenes_of_slurm):
    """A job of two nodes that nobody disturbs."""
    job = sbatch(*train(scenes_of_slurm, "calm"), options=TWO_NODES)
    finish(cluster, job)
    return shared / "calm"


@pytest.fixture(scope="module")
def hard_life(cluster, sbatch, shared, scenes_of_slurm):
    """The same job with what may befall it: the time limit's signal, a more urgent job, a lost node."""
    run = shared / "hard"
    overrides = train(scenes_of_slurm, "hard", "logger=wandb", *hold(run, *HELD))
    job = sbatch(*overrides, options=["--time=60", *TWO_NODES])
    reach(cluster, job, run, HELD[0])
    minutes = int(cluster.call("squeue", "-h", "-j", job, "-O", "TimeUsed").split(":")[-2]) + 2
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")  # USR1@120 is due at once
    again(cluster, job, 1)
    reach(cluster, job, run, HELD[1])
    everything = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={shared}/urgent.log"]
    cluster.call("sbatch", *everything, "--wrap=true")
    again(cluster, job, 2)
    reach(cluster, job, run, HELD[2])
    cluster.lose_node(cluster.nodes[1])
    again(cluster, job, 3)
    cluster.start_node(cluster.nodes[1])
    finish(cluster, job)
    return run, job


def weights(run):
    stored = Stored(runs.newest_checkpoint(run))
    return {name: stored.read(name) for name in stored.shapes}


def test_the_weights_equal_those_of_a_run_that_nobody_stopped(calm, hard_life):
    whole, stopped = weights(calm), weights(hard_life[0])
    assert whole.keys() == stopped.keys()
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name


def test_every_start_goes_on_from_the_newest_checkpoint(hard_life, shared):
    _, job = hard_life
    log = (shared / "logs" / f"longclip-{job}-0.log").read_text()
    resumed = re.findall(r"\.ckpt at step (\d+)", log)
    # A signal saves after the step that it falls into; the lost node takes what came after step 9 with it.
    assert resumed == ["4", "7", "9"]


def test_one_run_directory_and_one_wandb_run_through_all_starts(hard_life):
    run, _ = hard_life
    started = [path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")]
    assert started == [(run / "wandb_id").read_text()] * 4
    assert len(list(run.glob("config*.yaml"))) == 4
    assert len(list(run.glob("csv*/metrics.csv"))) == 4, "the curves of all starts are kept"


def test_each_task_has_one_log_through_all_starts(hard_life, shared):
    _, job = hard_life
    logs = [(shared / "logs" / f"longclip-{job}-{task}.log").read_text() for task in (0, 1)]
    assert logs[0].count("longclip: hard") == 4
    batch = (shared / f"longclip-{job}.log").read_text()
    assert [f"start {start} on 127.0.0.[2-3]" in batch for start in range(1, 5)] == [True] * 4
    assert batch.count("2 process(es) on 2 node(s)") == 4, "the preflight passes before each"


def test_zero_2_goes_on_after_a_signal_and_ends_with_the_weights_of_ddp(
    cluster, sbatch, shared, scenes_of_slurm, calm
):
    run = shared / "zero"
    strategy = [
        "trainer=deepspeed_zero2",
        "trainer.accelerator=cpu",
        "trainer.strategy._target_=engines.ZeroOnProcessors",
        "+trainer.strategy.process_group_backend=gloo",
    ]
    job = sbatch(*train(scenes_of_slurm, "zero", *strategy, *hold(run, 5)), options=TWO_NODES)
    reach(cluster, job, run, 5)
    cluster.call("scancel", "--signal=USR1", job)
    again(cluster, job, 1)
    finish(cluster, job)
    whole, stopped = weights(calm), weights(run)
    assert whole.keys() == stopped.keys()
    for name, value in whole.items():
        torch.testing.assert_close(stopped[name], value, atol=1e-6, rtol=0, msg=name)


def test_gpus_that_torch_does_not_see_end_the_job_before_training(cluster, sbatch, shared, scenes_of_slurm):
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=1"]
    job = sbatch(*train(scenes_of_slurm, "blind"), options=options)
    finish(cluster, job, "FAILED")
    said = (shared / f"longclip-{job}.log").read_text()
    assert "GPUs 0,1 were given but torch sees none: rank 0 on 127.0.0.2; rank 1 on 127.0.0.3" in said
    assert not (shared / "blind").exists()


def test_scancel_saves_and_does_not_start_again(cluster, sbatch, shared, scenes_of_slurm):
    run = shared / "cancelled"
    job = sbatch(*train(scenes_of_slurm, "cancelled", *hold(run, 4)), options=["--nodes=1", *NO_GPUS])
    reach(cluster, job, run, 4)
    cluster.call("scancel", job)
    finish(cluster, job, "CANCELLED")
    assert runs.newest_checkpoint(run).name == runs.checkpoint_name(6)


def test_an_array_takes_one_line_of_overrides_a_task(cluster, sbatch, shared, scenes_of_slurm):
    (shared / "sweep.txt").write_text("name=slow optim.lr=1e-5\nname=fast optim.lr=1e-3\n")
    overrides = train(scenes_of_slurm, "unused", "samples=32")
    job = sbatch(*overrides, options=["--array=1-2", "--nodes=1", *NO_GPUS], SWEEP=str(shared / "sweep.txt"))
    for task in (1, 2):
        finish(cluster, f"{job}_{task}")
    assert "lr: 1.0e-05" in (shared / "slow" / "config.yaml").read_text()
    assert "lr: 0.001" in (shared / "fast" / "config.yaml").read_text()


def test_a_run_is_judged_by_a_job(cluster, sbatch, calm, scenes_of_slurm):
    judged = [f"model={calm}", f"data.root={scenes_of_slurm}", "data.prepare=null", "benchmark=scenes"]
    options = ["--gpus-per-node=0", "--cpus-per-task=1"]
    finish(cluster, sbatch("eval.sbatch", *judged, options=options))
    assert (calm / "eval" / "metrics.json").exists()
