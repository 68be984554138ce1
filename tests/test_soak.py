"""The soak: its parts see what they should, and the shortest one ends as a calm run does."""

import json
import random
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks import flaky, verdicts
from benchmarks.enduring import Ended
from benchmarks.faults import ALL, FULL, MUST, Fault, disk, schedule, tear
from benchmarks.soak import Pace, plan
from benchmarks.witness import Line, joined, not_once
from longclip import runs
from longclip.stored import write_share

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["a", "b", "c", "d"]


def wrote(folder, start, rank, *steps):
    """Steps of one process of one start: an epoch is (a, b), (c, d), process 0 has the first of each pair."""
    folder.mkdir(exist_ok=True)
    lines = [
        Line(step, [KEYS[(2 * (step - 1) + rank) % 4]], float(step).hex(), start + step) for step in steps
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{start:04d}-{rank}.jsonl").write_text(text)


def test_starts_are_joined_by_step_and_a_replay_counts_once(tmp_path):
    for rank in range(2):
        wrote(tmp_path, 1, rank, 1, 2, 3)
        wrote(tmp_path, 2, rank, 3, 4)
    history = joined(tmp_path)
    assert (history.replayed, history.differing) == (1, [])
    assert not_once(history, KEYS, steps=4, world=2) == []


def test_a_step_that_is_missing_or_another_sample_is_seen(tmp_path):
    wrote(tmp_path, 1, 0, 1, 2)
    wrote(tmp_path, 1, 1, 1)
    assert not_once(joined(tmp_path), KEYS, steps=2, world=2)
    wrote(tmp_path, 1, 1, 1, 2)
    assert not_once(joined(tmp_path), KEYS, steps=2, world=2) == []
    (tmp_path / "0002-1.jsonl").write_text(json.dumps(Line(2, ["b"], "0x0", 9.0)) + "\n")
    history = joined(tmp_path)
    assert history.differing == [(2, 1)]
    said = ["steps from 1: b came 2 times", "steps from 1: d came 0 times"]
    assert not_once(history, KEYS, steps=2, world=2) == said


def test_a_fault_costs_the_steps_after_the_checkpoint(tmp_path):
    wrote(tmp_path, 1, 0, *range(1, 8))
    wrote(tmp_path, 2, 0, *range(5, 11))
    ends = [Ended(1, Fault(ALL, 7, 0), [-9, -9], 9.0, 0.5), Ended(2, None, [0, 0], 20.0, 0.0)]
    (loss,) = verdicts.lost(ends, joined(tmp_path), finished=20.0)
    assert (loss.steps, loss.seconds) == (3, 1.0)


def test_a_schedule_is_its_seed_and_holds_every_kind():
    faults = schedule(3, 24, 600, start=5.0, first=20)
    assert faults == schedule(3, 24, 600, start=5.0, first=20) != schedule(4, 24, 600, start=5.0, first=20)
    assert {fault.kind for fault in faults} == set(MUST)
    assert [fault.step for fault in faults] == sorted(fault.step for fault in faults)
    assert faults[0].step >= 20
    assert all(fault.early is None for fault in schedule(3, 6, 60, start=5.0, first=20)), (
        "a short one has no time for it"
    )
    assert plan(2400, Pace(6, 0.1))[0] > plan(600, Pace(6, 0.1))[0] > plan(60, Pace(6, 0.1))[0] == 3


@pytest.mark.parametrize("seed", range(6))
def test_what_is_torn_is_not_whole_any_more(tmp_path, seed):
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / runs.checkpoint_name(step)
        write_share(folder, 0, 1, {"weights/x": torch.ones(8)}, {"step": step})
    assert tear(tmp_path, random.Random(seed)) == folder
    assert runs.newest_checkpoint(tmp_path).name == runs.checkpoint_name(1)


def test_a_full_disk_takes_no_checkpoint_until_it_is_free_again(tmp_path):
    small = disk(tmp_path / "disk", 4 * 2**20)
    program = f"import sys; sys.stdin.read(1); open('{tmp_path}/disk/x', 'wb').write(bytes(2 * 2**20))"
    try:
        for full in (True, False):
            process = subprocess.Popen(
                [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if full:
                small.fill([process])
            process.communicate(b"x", timeout=60)
            assert bool(process.returncode) == full, FULL
            small.free()
    finally:
        small.close()


def test_the_server_fails_some_requests_and_serves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(flaky, "SHARES", {"503": 0.3})
    (tmp_path / "x").write_bytes(b"0123456789")
    with flaky.FlakyServer(tmp_path, seed=0) as server:
        ask = urllib.request.Request(f"{server.url}/x", headers={"Range": "bytes=2-4"})
        assert urllib.request.urlopen(ask).read() == b"234"
        server.faulty, served = True, 0
        for _ in range(20):
            with suppress(urllib.error.HTTPError):
                served += urllib.request.urlopen(ask).read() == b"234"
    assert 0 < served < 20
    assert (server.requests, server.failed["503"]) == (20, 20 - served)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_shortest_soak_ends_as_a_calm_run(tmp_path):
    """A minute on a quiet machine: a rank killed, SIGUSR1, all killed and the newest checkpoint torn."""
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0", "--seed", "1"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "soak.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "soak.json").read_text())
    assert {loss["kind"] for loss in report["losses"]} == set(MUST[:3])
    assert all(verdict["met"] for verdict in report["verdicts"])
