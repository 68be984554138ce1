"""Whole programs in processes of their own: train, kill, resume, judge, export. Minutes, so marked long."""

import csv
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

pytestmark = pytest.mark.long
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


def losses(run_directory):
    with open(run_directory / "csv" / "metrics.csv") as f:
        return [float(row["train/loss"]) for row in csv.DictReader(f) if row["train/loss"]]


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


def test_a_second_run_of_the_same_name_refuses(folder):
    done = run(command(folder), code=2)
    assert "resume=auto continues it" in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_and_resumed_equals_uninterrupted_bit_by_bit(folder):
    process = subprocess.Popen(command(folder, name="killed"), cwd=ROOT, stdout=subprocess.DEVNULL)
    killed = folder / "killed"
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / runs.checkpoint_name(4)).exists():
        assert time.monotonic() < deadline, "no checkpoint to kill after"
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    at = runs.newest_checkpoint(killed).name
    done = run(command(folder, "resume=auto", name="killed"))
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


def test_the_command_line_exports_a_run(folder):
    done = run(
        [sys.executable, "-m", "longclip.cli", "export", str(folder / "small"), "--out", str(folder / "out")]
    )
    assert "next:" in done.stdout
    assert (folder / "out" / "open_clip_config.json").exists()


def test_two_processes_end_with_the_weights_of_one(folder):
    """DDP over gloo: same batches, same losses; sums are taken in another order, hence the tolerance."""
    run(command(folder, "trainer.devices=2", "+trainer.strategy=ddp", "export=null", name="two"))
    one, two = weights(folder / "small"), weights(folder / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-3, rtol=0, msg=name)
    assert losses(folder / "two") == pytest.approx(losses(folder / "small"), rel=1e-4)


def test_tensorboard_is_written(folder):
    run(command(folder, "logger=tensorboard", "samples=32", "export=null", name="tb"))
    assert list((folder / "tb").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("recipe", ["clip", "debias"])  # all of them take a step in towers/test_chunks
def test_other_recipes_train(folder, recipe):
    overrides = ["batch_size=48", "samples=96", "export=null", f"recipe={recipe}"]
    run(command(folder, *overrides, name=recipe))
    assert (folder / recipe / "metrics.json").exists()
