"""One of two processes fails in the middle of a run: the other ends within a bounded time and says why."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TIMEOUT = 8  # seconds that a collective waits


def both(mode, run, scenes):
    """(exit code, last line of stderr) of both processes; they are killed where they outlive a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1]))),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, HERE / "one_of_two.py", mode, run, scenes, str(TIMEOUT)]
    started = [
        subprocess.Popen(
            command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    try:
        said = started[0].communicate(timeout=240)[1]
        if mode == "hang":
            started[1].kill()
        said = said, started[1].communicate(timeout=TIMEOUT + 30)[1]
    finally:
        for process in started:
            process.kill()
    return [
        (process.returncode, text.strip().rpartition("\n")[2])
        for process, text in zip(started, said, strict=True)
    ]


def test_a_process_that_raises_ends_the_other_with_its_message(scenes, tmp_path):
    (code, said), (own_code, own) = both("raise", tmp_path, scenes)
    assert (code, own_code) == (1, 1)
    assert own == "ValueError: the disk under process 1 is on fire"
    assert said.startswith("UserError: process 0 stops because another failed first: process 1 on ")
    assert said.endswith("the disk under process 1 is on fire")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["kill", "hang"])
def test_a_process_that_is_killed_or_hangs_ends_the_other_with_a_sentence(mode, scenes, tmp_path):
    (code, said), (own_code, _) = both(mode, tmp_path, scenes)
    assert (code, own_code) == (1, -9)
    assert said.startswith(
        "UserError: process 0 does not hear from the others any more, and none of them left"
    )


@pytest.mark.long
def test_shapes_that_differ_between_processes_end_both(scenes, tmp_path):
    codes = {code for code, _ in both("shape", tmp_path, scenes)}
    assert not codes & {0, -9}, "gloo aborts one of them; neither goes on, neither had to be killed"
