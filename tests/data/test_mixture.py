"""Mixtures: exact shares in every epoch, each source complete on its own, counted by brute force."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from longclip.data.plans import mixture as module
from longclip.data.plans.mixture import Mixture, Part, Shares
from longclip.data.plans.order import Order

SIZES = {
    "one": [(50, 50)],
    "equal": [(40, 40), (40, 40)],
    "small and large": [(7, 28), (300, 300), (90, 45)],
    "less than a pass": [(100, 3), (64, 50)],
    "many": [(5 + n, 3 * n + 1) for n in range(9)],
}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW", 16)


def made(sizes: list[tuple[int, int]], seed: int = 3) -> Mixture:
    """Sources of (samples, samples an epoch)."""
    starts = np.cumsum([0, *(samples for samples, _ in sizes)])
    orders = [Order(samples, seed + n, block=3, window=4) for n, (samples, _) in enumerate(sizes)]
    parts = [Part(str(n), orders[n], int(starts[n]), epoch) for n, (_, epoch) in enumerate(sizes)]
    return Mixture(parts, seed)


def stream(mixture: Mixture, epochs: int) -> list[tuple[int, int]]:
    return [mixture.at(position) for position in range(epochs * mixture.samples)]


def of_source(mixture: Mixture, shown: list[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    part = mixture.parts[number]
    inside = range(part.start, part.start + part.order.samples)
    return [(passed, index - part.start) for passed, index in shown if index in inside]


@pytest.mark.parametrize("name", SIZES)
def test_every_epoch_holds_every_source_exactly_as_often_as_it_should(name: str) -> None:
    mixture = made(SIZES[name])
    for epoch in range(4):
        shown = mixture.span(epoch * mixture.samples, (epoch + 1) * mixture.samples).tolist()
        counts = [len(of_source(mixture, shown, number)) for number in range(len(mixture.parts))]
        assert counts == [epoch_size for _, epoch_size in SIZES[name]]


@pytest.mark.parametrize("name", SIZES)
def test_each_source_goes_through_its_own_order_pass_after_pass(name: str) -> None:
    mixture = made(SIZES[name])
    shown = stream(mixture, 5)
    for number, part in enumerate(mixture.parts):
        own = of_source(mixture, shown, number)
        assert own == [part.order.at(position) for position in range(len(own))]
        size = part.order.samples
        for first in range(0, len(own) - size + 1, size):
            assert sorted(index for _, index in own[first : first + size]) == list(range(size))


@pytest.mark.parametrize("name", SIZES)
def test_positions_spans_and_counts_agree(name: str) -> None:
    mixture = made(SIZES[name])
    shown = stream(mixture, 3)
    rng = np.random.default_rng(0)
    for start, stop in rng.integers(0, len(shown), (30, 2)).tolist():
        assert mixture.span(start, max(start, stop)).tolist() == [list(x) for x in shown[start:stop]]
    for position in [0, mixture.samples, *rng.integers(0, len(shown), 20).tolist()]:
        counts = [len(of_source(mixture, shown[:position], n)) for n in range(len(mixture.parts))]
        assert list(mixture.shown(position).values()) == counts


def test_sources_are_spread_evenly_and_shuffled() -> None:
    mixture = made(SIZES["small and large"])
    shown = stream(mixture, 1)
    sources = [next(n for n, p in enumerate(mixture.parts[::-1]) if index >= p.start) for _, index in shown]
    ends = np.linspace(0, len(sources), 9).astype(int)
    for first, last in pairwise(ends):
        counts = Counter(sources[first:last])
        for place, part in enumerate(mixture.parts[::-1]):
            assert abs(counts[place] - part.epoch * (last - first) / mixture.samples) <= 6
    assert len(set(pairwise(sources))) > 6


def test_one_source_is_its_own_order() -> None:
    order = Order(50, 3, block=3, window=4)
    assert stream(made(SIZES["one"]), 3) == [order.at(position) for position in range(150)]


def test_no_sample_comes_twice_under_the_same_pass() -> None:
    shown = stream(made(SIZES["small and large"]), 4)
    assert len(set(shown)) == len(shown)


def test_only_what_is_kept_is_shown() -> None:
    kept = np.array([2, 3, 5, 7, 11, 13])
    mixture = Mixture([Part("a", Order(6, 1, 2, 2), 0, 12, kept), Part("b", Order(4, 2), 20, 4)], 0)
    counts = Counter(index for _, index in stream(mixture, 1))
    assert counts == Counter(dict.fromkeys(kept.tolist(), 2) | dict.fromkeys(range(20, 24), 1))


def test_weighted_samples_come_floor_or_ceil_times_a_pass_and_on_average_their_share() -> None:
    weights = np.array([0.1, 0.0, 0.3, 1.0, 2.5, 0.7, 0.4, 3.0])
    part = Part("a", Order(8, 1, 2, 2), 0, 8, None, Shares(weights))
    expected, passes = 8 * weights / weights.sum(), 3000
    total = np.zeros(8)
    for number in range(passes):
        shown = part.span(8 * number, 8 * number + 8)
        counts = np.bincount(shown[:, 1], minlength=8)
        assert (counts >= np.floor(expected)).all()
        assert (counts <= np.ceil(expected)).all()
        assert len({tuple(row) for row in shown.tolist()}) == 8, "a repetition is a pass of its own"
        total += counts
    assert np.abs(total / passes - expected).max() < 0.03
    assert total[1] == 0


def test_equal_weights_are_no_weights_and_a_pass_shows_all() -> None:
    part = Part("a", Order(64, 1, 4, 4), 0, 64, None, Shares(np.full(64, 0.123)))
    assert sorted(part.span(64, 128)[:, 1].tolist()) == list(range(64))


def test_ten_million_samples_of_three_sources_need_no_list_of_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ROW", 1024)
    mixture = made([(10_000_000, 10_000_000), (1_000_000, 4_000_000), (5_000, 20_000)])
    assert len(mixture._ends) * 8 < 200_000
    shown = mixture.span(12_345_678, 12_347_678)
    assert len({tuple(row) for row in shown.tolist()}) == 2000
