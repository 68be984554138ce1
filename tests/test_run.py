"""Whole programs in processes of their own: train, kill, resume, judge, export. Minutes, so marked long.

A start costs ten seconds before its first step: what can be shown in this process is shown in test_trainings.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longclip import models, runs

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[1]

SMALL = [
    "data.prepare.train=96",
    "data.prepare.heldout=24",
    "data.prepare.groups=2",
    "batch_size=16",
    "samples=192",
    "optim.warmup=32",
    "checkpoints.every_steps=2",
    "checkpoints.keep=20",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
]


def command(folder, *overrides, name="small"):
    own = [f"runs={folder}", f"data.root={folder}/scenes", f"name={name}"]
    return [sys.executable, "train.py", *SMALL, *own, *overrides]


def run(arguments, code=0, env=None, timeout=280):
    """The finished process; one that hangs is asked for the stacks of its threads first."""
    env = {**(env or os.environ), "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        try:
            stdout, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
        pytest.fail(f"still running after {timeout} s\n{stdout[-3000:]}\n{stderr[-9000:]}")
    assert process.returncode == code, stdout[-3000:] + stderr[-3000:]
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One uninterrupted run, exported; the others are compared with it."""
    folder = tmp_path_factory.mktemp("runs")
    done = run(command(folder))
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def weights(run_directory):
    return models.read_checkpoint(runs.newest_checkpoint(run_directory))["state_dict"]


def wait_for_a_checkpoint(folder, process):
    deadline = time.monotonic() + 250
    while runs.newest_checkpoint(folder) is None:
        assert time.monotonic() < deadline, "no checkpoint to kill after"
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)


def test_a_run_says_what_it_will_do_judges_exports_and_names_the_next_command(folder):
    printed = (folder / "printed.txt").read_text()
    for words in ("12 of 16 images", "context 248, packed", "term grouping (not exported)"):
        assert words in printed, words
    for words in ("judged at 0 samples", "ETA", "next: python -m eval.run"):
        assert words in printed, words
    assert "━" not in printed.split("first and last judgement")[0].split("ETA")[-1], (
        "no bar without a terminal"
    )
    metrics = json.loads((folder / "small" / "metrics.json").read_text())
    assert {"scenes/long/i2t_r1", "scenes/long/t2i_r1", "scenes/pointing/accuracy"} <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())
    rows = runs.judgements(folder / "small")
    assert [row["samples_seen"] for row in rows] == [0, 192]
    assert (folder / "small" / "length.png").stat().st_size > 10_000


def test_killed_and_resumed_equals_uninterrupted_bit_by_bit(folder):
    process = subprocess.Popen(
        command(folder, "export=null", name="killed"), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    killed = folder / "killed"
    wait_for_a_checkpoint(killed, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    at = runs.newest_checkpoint(killed).name
    done = run(command(folder, "export=null", "resume=auto", name="killed"))
    assert f"{at} at step" in done.stdout
    assert "data position restored" in done.stdout
    assert (killed / "config.resume-1.yaml").exists()
    whole, resumed = weights(folder / "small"), weights(killed)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_judging_the_export_offline_on_two_processes_gives_the_runs_own_numbers(folder):
    source = [f"model={folder}/small/export", f"data.root={folder}/scenes", "data.prepare=null", "device=cpu"]
    done = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "eval.run", *source]
    )
    assert done.stdout.count("metrics: ") == 1, "one process speaks for all"
    assert not (ROOT / "run.log").exists(), "judging leaves nothing where it was started"
    offline = json.loads((folder / "small" / "export" / "eval" / "metrics.json").read_text())
    online = json.loads((folder / "small" / "metrics.json").read_text())
    assert online.keys() <= offline.keys()
    for name, value in online.items():
        assert offline[name] == pytest.approx(value, abs=1e-6), name


TWO = ["trainer.accelerator=cpu", "trainer.devices.otherwise=2"]


def child_of(pid):
    """The process that Lightning's launcher has started."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if "train.py" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise AssertionError(f"{pid} has started no second process")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the second process in /proc")
def test_a_run_of_two_whose_one_is_killed_ends_and_goes_on_elsewhere_as_one_process_would(
    folder,
):
    arguments = command(folder, "trainer=ddp", *TWO, "export=null", "benchmark=none", name="two")
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_a_checkpoint(folder / "two", process)
        os.kill(child_of(process.pid), signal.SIGKILL)
        said = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert process.returncode == -signal.SIGKILL or "does not hear from the others" in said
    done = run(command(folder, "trainer=fsdp2", *TWO, "export=null", "resume=auto", name="two"))
    assert "saved by DDP x 2, taken apart anew for ModelParallel x 2" in done.stdout
    one, two = weights(folder / "small"), weights(folder / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=0, msg=name)


def test_zero_3_judges_saves_and_exports(tmp_path):
    own = "trainer.strategy._target_=engines.ZeroOnProcessors"
    backend = "+trainer.strategy.process_group_backend=gloo"
    arguments = command(tmp_path, "trainer=deepspeed_zero3", *TWO, own, backend, "samples=64", name="zero")
    places = os.pathsep.join(str(ROOT / place) for place in (".", "tests", "tests/strategies"))
    run(arguments, env=os.environ | {"PYTHONPATH": places, "LONGCLIP_TARGETS": "engines"})
    assert (tmp_path / "zero" / "export" / "open_clip_config.json").exists()
    assert (tmp_path / "zero" / "metrics.json").exists()
