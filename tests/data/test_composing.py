"""Composed batches: the same samples in another order, in which a batch is of one kind."""

import pickle

import numpy as np
import pytest
from numpy.typing import NDArray

from longclip.data.plans.composing import Arrange, Balanced, Composed, Grouped, Similar
from longclip.data.plans.order import Order
from longclip.types import UserError

COUNT, SIZE, POOL = 330, 8, 10
LENGTHS = np.random.default_rng(0).integers(5, 248, COUNT).astype(np.int32)
LABELS = np.random.default_rng(1).integers(-1, 4, COUNT)
ARRANGE: dict[str, Arrange] = {
    "similar": Similar(LENGTHS),
    "balanced": Balanced(LENGTHS),
    "grouped": Grouped(LABELS, SIZE, 1.0),
    "half grouped": Grouped(LABELS, SIZE, 0.5),
}
EPOCHS = 3


def composed(name: str, count: int = COUNT, seed: int = 0) -> Composed:
    return Composed(Order(count, seed, 4, 4), ARRANGE[name], SIZE, POOL, seed)


def batches(stream: Composed | Order) -> list[NDArray[np.int64]]:
    """The samples of every whole batch of three epochs."""
    samples = stream.span(0, EPOCHS * COUNT)[:, 1]
    return [samples[at : at + SIZE] for at in range(0, len(samples) - SIZE + 1, SIZE)]


@pytest.mark.parametrize("name", ARRANGE)
@pytest.mark.parametrize("count", [COUNT, 320, 17, 8])
def test_every_sample_once_an_epoch(name: str, count: int) -> None:
    stream = composed(name, count)
    for epoch in range(EPOCHS):
        shown = stream.span(epoch * count, (epoch + 1) * count)
        assert set(shown[:, 0]) == {epoch}
        assert sorted(shown[:, 1]) == list(range(count))


@pytest.mark.parametrize("name", ARRANGE)
def test_the_order_is_a_function_of_the_position(name: str) -> None:
    whole = composed(name).span(0, EPOCHS * COUNT).tolist()
    for start, stop in [(0, 5), (75, 85), (320, 340), (79, 241)]:
        assert composed(name).span(start, stop).tolist() == whole[start:stop]
    assert [list(composed(name).at(place)) for place in (3, 81, 700)] == [
        whole[place] for place in (3, 81, 700)
    ]
    assert pickle.loads(pickle.dumps(composed(name))).span(0, 99).tolist() == whole[:99]
    assert composed(name, seed=1).span(0, COUNT).tolist() != whole[:COUNT]


@pytest.mark.parametrize("name", ARRANGE)
def test_pools_keep_their_samples(name: str) -> None:
    """What a pool shows is what the plain order shows there: nothing wanders further."""
    plain = Order(COUNT, 0, 4, 4)
    for first, last in [(0, 80), (80, 160), (320, 330), (330, 400)]:
        shown = composed(name).span(first, last)
        assert sorted(shown[:, 1]) == sorted(plain.span(first, last)[:, 1])


def test_similar_captions_share_a_batch() -> None:
    def spread(stream: Composed | Order) -> float:
        return float(np.mean([np.ptp(LENGTHS[batch]) for batch in batches(stream)]))

    assert spread(composed("similar")) < 0.25 * spread(Order(COUNT, 0, 4, 4))
    means = [LENGTHS[batch].mean() for batch in batches(composed("similar"))[:POOL]]
    assert means != sorted(means)
    assert means != sorted(means)[::-1]


def test_balanced_batches_and_processes_carry_the_same_tokens() -> None:
    def spread(stream: Composed | Order, parts: int) -> float:
        sums = [LENGTHS[part].sum() for batch in batches(stream)[:POOL] for part in np.split(batch, parts)]
        return float(np.std(sums) / np.mean(sums))

    plain = Order(COUNT, 0, 4, 4)
    assert spread(composed("balanced"), 1) < 0.1 * spread(plain, 1)
    assert spread(composed("balanced"), 2) < 0.4 * spread(plain, 2)


@pytest.mark.parametrize(("name", "together"), [("grouped", 8), ("half grouped", 4)])
def test_a_batch_or_a_share_of_it_is_of_one_label(name: str, together: int) -> None:
    """As many of a pool's batches as its labels can fill."""
    stream, plain = composed(name), Order(COUNT, 0, 4, 4)
    for first in (0, 80, 160, 240):
        labels = LABELS[plain.span(first, first + 80)[:, 1]]
        groups = min(POOL, sum(int((labels == label).sum()) // together for label in range(4)))
        found = LABELS[stream.span(first, first + 80)[:, 1]].reshape(POOL, SIZE)
        most = np.array([max((row == label).sum() for label in range(4)) for row in found])
        assert (most >= together).sum() >= groups > 0


def test_groups_are_made_anew_in_every_epoch() -> None:
    sets = [frozenset(batch.tolist()) for batch in batches(composed("grouped"))]
    assert not set(sets[:40]) & set(sets[-40:])


def test_batches_are_composed_among_some() -> None:
    with pytest.raises(UserError, match=r"data.plan.pool is 0"):
        Composed(Order(COUNT, 0), ARRANGE["similar"], SIZE, 0, 0)
    with pytest.raises(UserError, match=r"batch_size is 1, and data.plan.batches=COLUMN .* give 2 or more"):
        Grouped(LABELS, 1, 1.0)
