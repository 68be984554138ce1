"""The benchmarks run from end to end; what they measure in a test means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_the_quick_benchmark_of_data_tells_every_figure(tmp_path):
    command = [sys.executable, "-m", "benchmarks.data", "--quick", "--json", tmp_path / "data.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "data.json").read_text())
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    assert {name.partition(".")[0] for name in found} == {"P10", "P11", "P12", "memory"}
    for row in rows:
        assert list(row) == ["id", "measure", "ours", "baseline", "ratio", "goal", "met"]
        assert (row["goal"] is None) == (row["met"] is None)
        assert (row["baseline"] is None) == (row["ratio"] is None)
    assert found["P10.ids"]["ours"] == 0
    assert found["P11.levels"]["ours"] <= 1
