"""The benchmarks count rightly and run from end to end; what they measure in a test means nothing."""

import json

import numpy as np
import project
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import documents, plots
from benchmarks.__main__ import MALLOC
from benchmarks.lengths import LONG, SHORT, SUBS, drawn_from, of_captions, synthetic
from benchmarks.measures import at_most, faster, fewer, flops, load, peak_bytes, save, saved_bytes, seconds

KIB = 256  # float32 elements of a KiB


def test_flops_are_twice_the_multiply_adds_of_forward_and_backward():
    x, weight = torch.ones(5, 3), torch.ones(3, 7, requires_grad=True)
    assert flops(lambda: x @ weight) == 2 * 5 * 3 * 7
    assert flops(lambda: (x @ weight).sum().backward()) == 2 * 2 * 5 * 3 * 7  # x wants no gradient
    assert flops(lambda: torch.zeros(5, 7).addmm_(x, weight.detach())) == 2 * 5 * 3 * 7


def test_saved_bytes_count_every_storage_once_and_no_parameter():
    x, linear = torch.ones(4, KIB), nn.Linear(KIB, KIB)
    assert saved_bytes(lambda: linear(x)) == 4 * 1024
    assert saved_bytes(lambda: [linear(x), linear(x[:2])]) == 4 * 1024
    # x @ half of the weight: x is kept, the view of the parameter is free
    assert saved_bytes(lambda: x @ linear.weight[:3].T) == 4 * 1024
    assert saved_bytes(lambda: linear(x).exp()) == (4 + 4) * 1024


def test_saved_bytes_do_not_count_what_is_made_again():
    x, first, second = torch.ones(4, KIB), nn.Linear(KIB, KIB), nn.Linear(KIB, KIB)

    def again():
        checkpoint(lambda x: second(first(x).exp()), x, use_reentrant=False).sum().backward()

    assert saved_bytes(again) == 4 * 1024


def test_peak_bytes_is_the_most_alive_at_one_time():
    x = torch.ones(KIB)

    def job():
        a = x + 1  # 1 KiB
        b = torch.cat([a, a, a])  # 4
        del a  # 3
        c = b[:KIB] * 2  # 4
        b.mul_(2)  # in place
        del b  # 1
        return torch.cat([c, c])  # 3

    assert peak_bytes(job) == 4 * 1024


def test_peak_bytes_see_gradients_and_what_autograd_keeps():
    weight = torch.ones(KIB, requires_grad=True)

    def job():
        weight.exp().exp().sum().backward()

    # forward: two results kept (2 KiB, the sum's 4 bytes) and the gradient that enters, expanded from a
    # scalar, then two products: the first result and the gradient at it live when the second is made
    assert peak_bytes(job) == 3 * 1024 + 8
    assert weight.grad is not None


def test_peak_bytes_do_not_count_views_and_updates_of_older_tensors():
    x = torch.ones(KIB)
    assert peak_bytes(lambda: x.view(4, -1).add_(1).t()) == 0
    assert peak_bytes(lambda: torch.empty(2**40, device="meta") + 1) == 2 * 4 * 2**40


def test_every_job_takes_its_turn_and_its_fastest_counts():
    turns = []
    loops = iter([400_000, 0, 10_000, 0])

    def work():
        turns.append("slow")
        sum(range(next(loops)))
        next(loops)

    found = seconds({"slow": work, "nothing": lambda: turns.append("nothing")}, rounds=2)
    assert turns == ["slow", "nothing"] * 2
    assert 0 <= found["nothing"] < found["slow"]


def test_rows_say_how_many_times_better_and_whether_that_is_enough():
    assert faster("a", "images/s", 6, 2, 2.5)[2:] == (6, 2, 3, "ratio >= 2.5", None, True)
    assert fewer("a", "bytes", 6, 3, 2, "7x")[2:] == (6, 3, 0.5, "ratio >= 2", "7x", False)
    assert fewer("a", "bytes", 2, 3)[2:] == (2, 3, 1.5, None, None, None)
    assert at_most("a", "relative error", 2e-6, 1e-6)[2:] == (2e-6, None, None, "<= 1e-06", None, False)


def test_rows_come_back_from_their_file(tmp_path):
    rows = [fewer("P1", "FLOPs", 2, 3, 1.2), at_most("P4", "error", 0.0, 1)]
    save(rows, tmp_path / "rows.json")
    assert load(tmp_path / "rows.json") == rows
    assert list(json.loads((tmp_path / "rows.json").read_text())[0]) == [
        *("id", "measure", "ours", "baseline", "ratio", "goal", "limit", "met")
    ]


def test_synthetic_lengths_have_the_stated_means_and_limits():
    subs_BK, long_B = synthetic(4000, seed=1)[:, :SUBS], synthetic(4000, seed=1)[:, SUBS]
    assert abs(subs_BK.mean() - 20) < 0.5
    assert abs(long_B.mean() - 140) < 2
    assert (subs_BK.min(), subs_BK.max() <= SHORT) == (5, True)
    assert (long_B.min(), long_B.max()) == (20, LONG)
    assert (synthetic(4, seed=1) != synthetic(4, seed=2)).any()


def test_lengths_of_captions_are_those_of_the_text_and_its_sentences(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("A dog runs. It is brown.\n\n" + "red " * 300 + "\n" + "One cat. " * 12 + "\n")
    dog, red, cats = of_captions(path).tolist()
    assert dog == [4 + 2, 4 + 2, 0, 0, 0, 0, 0, 0, 8 + 2]  # the stops are tokens
    assert red == [SHORT, 0, 0, 0, 0, 0, 0, 0, LONG]
    assert cats == [3 + 2] * 8 + [12 * 3 + 2]


def test_a_batch_of_captions_holds_every_row_once_before_one_comes_again():
    rows = [[1, 10], [2, 20], [3, 30]]
    drawn = drawn_from(np.array(rows))(5, 0).tolist()
    assert sorted(drawn[:3]) == rows
    assert all(row in rows for row in drawn[3:])


def test_the_picture_shows_costs_as_shares_of_all_captions_padded(tmp_path):
    rows = [fewer("P1.pad248", "FLOPs", 2, 16), fewer("P1.pad77+248", "FLOPs", 2, 4)]
    rows += [fewer(f"P8.at.{images}", "bytes", images, images**2) for images in (64, 512)]
    by_id = {row.id: row for row in rows}
    assert plots.costs(by_id) == {"P1": {"pad248": 1, "pad77+248": 4 / 16, "ours": 2 / 16}}
    plots.draw(by_id, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_goes_between_its_marks_and_nowhere_else(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- goals: made -->\nold\n<!-- /goals -->\nb\n")
    rows = [fewer("P1", "FLOPs", 2, 3, 1.2), at_most("P4", "error", 2.0, 1)]
    documents.replace(path, "goals", documents.of_rows(rows))
    before, *table, after = path.read_text().replace("old", "").splitlines()[1:-1]
    assert (before, after) == ("<!-- goals: made -->", "<!-- /goals -->")
    assert [line.split(" | ")[-1] for line in table[2:]] == ["yes |", "**no** |"]
    assert documents.read(path, "goals") == "\n".join(table)
    with pytest.raises(SystemExit, match="no marks <!-- gpu -->"):
        documents.replace(path, "gpu", "")


@pytest.mark.long
def test_a_quick_run_tells_every_figure(tmp_path, monkeypatch):
    for name, value in MALLOC.items():
        monkeypatch.setenv(name, value)  # else it starts itself anew
    printed = project.typed(f"python -m benchmarks --quick --json {tmp_path}/rows.json")
    rows = load(tmp_path / "rows.json")
    found = {row.id: row for row in rows}
    assert len(found) == len(rows)
    assert {id.partition(".")[0] for id in found} == {*(f"P{number}" for number in range(1, 14)), "memory"}
    for row in rows:
        assert row.measure.startswith("(quick) ")
        assert (row.goal is None) == (row.met is None)
        assert (row.baseline is None) == (row.ratio is None)
    assert found["P10.ids"].ours == 0
    assert found["P11.levels"].ours <= 1
    assert "goals met" in printed


@pytest.mark.long
def test_the_gpu_benchmark_runs_up_to_the_device(tmp_path):
    try:
        project.typed(f"python -m benchmarks.gpu --device cpu --quick --json {tmp_path}/rows.json")
    finally:
        torch.compiler.set_default_backend("inductor")
        torch._dynamo.reset()
    rows = load(tmp_path / "rows.json")
    kinds = {row.id.split(".")[1] for row in rows}
    assert kinds == {"attention", "loss", "compile", "ceiling", "mfu", "images", "largest", "wait"}
    rounding = [row.ratio for row in rows if row.id.startswith("GPU.attention") and row.baseline < 1]
    assert len(rounding) == 4
    assert all(ratio > 0.5 for ratio in rounding)
