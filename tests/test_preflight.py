"""The preflight: who is missing, differs or hangs is named, and nobody waits for ever."""

import contextlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from longclip.preflight import meeting, reports
from longclip.preflight.__main__ import main
from longclip.preflight.reports import Look, Report

FIT = Report(0, "node1", 0, 2, {"torch": "2.15.0", "longclip": "0.1.0 (commit abc)"}, 0, None, 100.0, None)


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(rank, world, port, folder, deadline, grace):
    from longclip.preflight import rounds

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "SLURMD_NODENAME": f"node{rank}"}
    meeting.GRACE = rounds.GRACE = grace
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["--folder", str(folder), "--deadline", str(deadline), "--free-gb", "0"])
    (folder / f"{rank}.json").write_text(json.dumps([code, said.getvalue()]))


def start(ranks, world, port, folder, deadline=60.0, grace=0.5):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longclip.preflight.rounds"])
    arguments = [(rank, world, port, folder, deadline, grace) for rank in ranks]
    processes = [context.Process(target=_child, args=each) for each in arguments]
    for process in processes:
        process.start()
    return processes


def verdicts(processes, ranks, folder):
    """(exit code, what was printed) of each; a process that hangs fails the test."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "it hangs"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in ranks]


def test_processes_that_agree_are_fit_and_leave_nothing_behind(port, tmp_path):
    one, two = verdicts(start([0, 1], 2, port, tmp_path), [0, 1], tmp_path)
    assert (one[0], two) == (0, [0, ""])
    assert "2 process(es) on 1 node(s)" in one[1]
    assert "all-reduce over gloo" in one[1]
    assert not list(tmp_path.glob(".preflight*"))


def test_who_is_missing_is_named_to_all_who_came(port, tmp_path):
    for code, said in verdicts(start([0, 2], 3, port, tmp_path, deadline=2), [0, 2], tmp_path):
        assert code == 2
        assert "2 of 3 processes came to 'start'" in said
        assert "missing: rank 1; there: rank 0 on node0, 2 on node2" in said


def test_without_rank_0_the_others_say_what_they_tried(port, tmp_path):
    ((code, said),) = verdicts(start([1], 2, port, tmp_path, deadline=1), [1], tmp_path)
    assert code == 2
    assert f"rank 1 on node1 could not reach rank 0 at 127.0.0.1:{port} within 1 s" in said


SHORT_GRACE = """
import sys
from longclip.preflight import __main__, meeting, rounds
meeting.GRACE = rounds.GRACE = 1.5
__main__.end(__main__.main(sys.argv[1:]))
"""


def test_who_does_not_take_part_in_the_all_reduce_is_named(port, tmp_path):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURMD_NODENAME": "node0"}
    env = (
        os.environ
        | ranks
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    )
    options = ["--folder", str(tmp_path), "--deadline", "6", "--free-gb", "0"]
    command = [sys.executable, "-c", SHORT_GRACE, *options]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        peer = meeting.Meeting("127.0.0.1", port, 1, 2, "node1", 60)
        peer.store.set("start/1", "")
        twin = FIT._replace(rank=1, same=reports.versions())
        peer.store.set("compare/1", json.dumps([twin, Look(time.time(), True)]))
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the all-reduce" in said
    assert "missing: rank 0 on node0, 1 on node1" in said


def _hang(port):
    meeting.GRACE = 0.2
    alone = meeting.Meeting("127.0.0.1", port, 0, 1, "node0", 0.2)
    alone.watch("end", "it hangs")
    time.sleep(60)


def test_a_hanging_library_is_ended_from_another_thread(port):
    process = multiprocessing.get_context("forkserver").Process(target=_hang, args=(port,))
    process.start()
    process.join(50)
    assert process.exitcode == 2


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (
            {"same": FIT.same | {"torch": "2.13.0"}},
            "torch is 2.13.0 for rank 2 on node2 and 2.15.0 elsewhere",
        ),
        ({"same": {"torch": "2.15.0"}}, "longclip is none for rank 2 on node2"),
        ({"promised": "0,1"}, "GPUs 0,1 were given but torch sees none: rank 2 on node2"),
        ({"gpus": 1, "local_rank": 1}, "no GPU is left for rank 0, 1 on node1; rank 2 on node2"),
        ({"refused": "Read-only file system"}, "cannot be written by rank 2 on node2: Read-only file system"),
        ({"free_gb": 1.0}, "1.0 GB are free in the run folder, 5 wanted: rank 2 on node2"),
    ],
)
def test_what_differs_is_named_by_rank_and_node(odd, sentence):
    three = [FIT, FIT._replace(rank=1, local_rank=1), FIT._replace(rank=2, node="node2", **odd)]
    looks = [Look(0.0, True)] * 3
    found = reports.problems(three, looks, 5)
    assert len(found) == 1
    assert sentence in found[0]


def test_more_gpus_than_tasks_are_named():
    assert "node1 has 8 GPUs for 2 task(s)" in reports.problems([FIT._replace(gpus=8)], [Look(0, True)], 5)[0]


def test_a_folder_that_is_not_shared_and_a_wrong_clock_are_named():
    three = [FIT, FIT._replace(rank=1), FIT._replace(rank=2, node="node2")]
    looks = [Look(1000.0, True), Look(1001.0, True), Look(1100.0, False)]
    folder, clock = reports.problems(three, looks, 5)
    assert "rank 2 on node2 does not see" in folder
    assert "put runs= on shared storage" in folder
    assert clock == "the clock is +99 s off for rank 2 on node2"
    assert reports.problems(three, [Look(1000.0 + rank, True) for rank in range(3)], 5) == []
