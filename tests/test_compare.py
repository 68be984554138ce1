"""Differences between models: paired by item, with honest intervals, and only of what was judged alike."""

import random
import re

import numpy as np
import pytest

from eval import compare, deltas, results
from eval.results import Facts
from longclip.evaluate import Each, Findings
from longclip.types import UserError

KEYS = [f"k{n}" for n in range(60)]


def hits(seed, share):
    draw = random.Random(seed)
    return [100.0 * (draw.random() < share) for _ in KEYS]


def judged(folder, values, keys=KEYS, protocol="urban1k", settings=None, weights="a", extra=()):
    found = {"long/i2t_r1": sum(values) / len(values), "long/i2t_median": 2.0}
    settings = {"urban": {"split": "test", "root": str(folder), **(settings or {})}}
    findings = Findings(found, protocol, {"long/i2t_r1": Each(keys, values)})
    facts = Facts(str(folder), weights, 248, settings)
    results.write(folder, {"urban": findings} | dict.fromkeys(extra, findings), facts)
    return str(folder)


def resampled(differences, rounds=4000):
    """The textbook bootstrap, one draw at a time."""
    draw = random.Random(5)
    means = [np.mean(draw.choices(differences, k=len(differences))) for _ in range(rounds)]
    return tuple(np.quantile(means, [0.025, 0.975]))


def test_the_interval_is_that_of_the_textbook():
    differences = [b - a for a, b in zip(hits(1, 0.4), hits(2, 0.7), strict=True)]
    assert deltas.interval(KEYS, differences) == pytest.approx(resampled(differences), abs=2.0)
    smooth = [random.Random(n).gauss(3, 10) for n in range(60)]
    assert deltas.interval(KEYS, smooth) == pytest.approx(resampled(smooth), abs=0.3)


def test_copies_of_a_text_make_nothing_surer():
    differences = [b - a for a, b in zip(hits(1, 0.4), hits(2, 0.7), strict=True)]
    five = [f"{key}#{n}" for key in KEYS for n in range(5)]
    copied = [value for value in differences for _ in range(5)]
    assert deltas.interval(five, copied) == pytest.approx(deltas.interval(KEYS, differences))
    unrelated = deltas.interval([str(n) for n in range(300)], copied)
    assert unrelated[1] - unrelated[0] < 0.6 * (13 / 12) * np.subtract(*deltas.interval(five, copied)[::-1])


def test_a_difference_that_is_the_same_everywhere_is_certain():
    assert deltas.interval(KEYS, [7.0] * 60) == pytest.approx((7.0, 7.0))
    assert not deltas.Delta(1.0, 1.0, (0.0, 0.0)).sure
    assert deltas.Delta(1.0, 8.0, (7.0, 7.0)).sure


def test_items_are_paired_by_key_not_by_place(tmp_path):
    values = hits(1, 0.5)
    a = results.load(results.find(judged(tmp_path / "a", values)))
    b = results.load(results.find(judged(tmp_path / "b", values[::-1], keys=KEYS[::-1])))
    found = deltas.compare(a, b)
    assert found["urban/long/i2t_r1"].interval == (0.0, 0.0)
    assert found["urban/long/i2t_median"].interval is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"protocol": "urban1k/rejoined"}, ["urban1k", "urban1k/rejoined", "different protocols"]),
        ({"protocol": ""}, ["no protocol"]),
        ({"settings": {"views": {"long": {"limit": 77}}}}, ["views.long.limit=None", "77"]),
        ({"keys": [*KEYS[:-1], "new"]}, ["60 items", "'k59'"]),
        ({"keys": [*KEYS[:-1], "k0"]}, ["'k59'"]),
    ],
)
def test_what_was_not_judged_alike_is_refused(tmp_path, changed, words, capsys):
    a = judged(tmp_path / "a", hits(1, 0.5))
    b = judged(tmp_path / "b", hits(1, 0.5), **changed)
    assert compare.main([a, b]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_batch_size_and_place_change_no_number(tmp_path):
    a = judged(tmp_path / "a", hits(1, 0.5), settings={"batch_size": 8})
    assert compare.main([a, judged(tmp_path / "b", hits(2, 0.5), settings={"batch_size": 64})]) == 0


def test_results_from_before_a_setting_was_said_compare_with_its_default(tmp_path):
    a = judged(tmp_path / "a", hits(1, 0.5))
    assert compare.main([a, judged(tmp_path / "b", hits(2, 0.5), settings={"scoring": "global"})]) == 0
    assert compare.main([a, judged(tmp_path / "c", hits(2, 0.5), settings={"scoring": "late"})]) == 2


def test_the_table_measures_all_by_the_first(tmp_path, capsys):
    worse, better, same = hits(1, 0.2), hits(2, 0.9), hits(1, 0.2)
    folders = [judged(tmp_path / name, v) for name, v in (("a", worse), ("b", better), ("c", same))]
    assert compare.main([*folders, "--out", str(tmp_path / "table.md")]) == 0
    row = next(line for line in (tmp_path / "table.md").read_text().splitlines() if "i2t_r1" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == cells[4] == f"{np.mean(worse):.1f}"
    assert re.fullmatch(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\] \*", cells[3])
    assert cells[5] == "+0.0 [+0.0, +0.0]"
    assert "median" not in capsys.readouterr().out
    assert compare.main([*folders, "--all"]) == 0
    assert "median" in capsys.readouterr().out


def test_what_only_one_was_judged_on_is_named(tmp_path, capsys):
    a = judged(tmp_path / "a", hits(1, 0.2), extra=["docci"])
    b = judged(tmp_path / "b", hits(2, 0.2))
    assert compare.main([a, b]) == 0
    assert f"not compared: docci: only for {a}" in capsys.readouterr().out


@pytest.mark.parametrize("resamples", [0, -3])
def test_no_draws_make_no_interval(tmp_path, capsys, resamples):
    both = [judged(tmp_path / name, hits(1, 0.2)) for name in "ab"]
    assert compare.main([*both, "--resamples", str(resamples)]) == 2
    assert f"1 draw or more, not {resamples}" in capsys.readouterr().err


def test_one_model_and_strangers_are_sentences(tmp_path, capsys):
    a = judged(tmp_path / "a", hits(1, 0.2))
    assert compare.main([a]) == 2
    assert compare.main([a, str(tmp_path / "nothing")]) == 2
    assert "python -m eval.run model=" in capsys.readouterr().err
    with pytest.raises(UserError, match="no benchmark in common"):
        compare.rows(["a", "b"], [{}, {}], False, 10)
