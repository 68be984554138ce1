"""Whole programs on two processes: a killed one ends the run, another strategy goes on; ZeRO 3 exports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import ROOT, command, run, weights

from longclip import runs

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TWO = ["trainer.accelerator=cpu", "trainer.devices.otherwise=2"]


def child_of(pid):
    """The process that Lightning's launcher has started."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if "train.py" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise AssertionError(f"{pid} has started no second process")


def wait_for_a_checkpoint(folder, process):
    deadline = time.monotonic() + 250
    while runs.newest_checkpoint(folder) is None:
        assert time.monotonic() < deadline, "no checkpoint to kill after"
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the second process in /proc")
def test_a_run_whose_process_is_killed_ends_and_goes_on_under_another_strategy(tmp_path):
    run(command(tmp_path, "export=null", name="one"))
    arguments = command(tmp_path, "trainer=ddp", *TWO, "export=null", name="two")
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_a_checkpoint(tmp_path / "two", process)
        os.kill(child_of(process.pid), signal.SIGKILL)
        said = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    assert process.returncode == -signal.SIGKILL or "does not hear from the others" in said
    done = run(command(tmp_path, "trainer=fsdp2", *TWO, "resume=auto", name="two"))
    assert "saved by DDP x 2, taken apart anew for ModelParallel x 2" in done.stdout
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=0, msg=name)
    assert (tmp_path / "two" / "export" / "open_clip_config.json").exists()


def test_zero_3_judges_saves_and_exports(tmp_path):
    own = "trainer.strategy._target_=engines.ZeroOnProcessors"
    backend = "+trainer.strategy.process_group_backend=gloo"
    arguments = command(tmp_path, "trainer=deepspeed_zero3", *TWO, own, backend, "samples=64", name="zero")
    places = os.pathsep.join(str(ROOT / place) for place in (".", "tests", "tests/strategies"))
    env = os.environ | {"PYTHONPATH": places, "LONGCLIP_TARGETS": "engines"}
    run(arguments, env=env)
    assert (tmp_path / "zero" / "export" / "open_clip_config.json").exists()
    run(
        [
            sys.executable,
            "-m",
            "longclip.cli",
            "export",
            str(tmp_path / "zero"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
