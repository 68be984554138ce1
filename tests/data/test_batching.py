"""Where a stream is cut: by any number of processes without a trace, and within a budget of tokens."""

import numpy as np
import pytest

from longclip.data.plans.batching import Batches, Budget
from longclip.data.plans.order import Order
from longclip.types import UserError


def stream(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    return [order.at(position) for position in range(start, stop)]


def merged(order: Order, global_batch: int, world: int, start: int, stop: int) -> list[int]:
    """Positions of all ranks, step by step, in rank order."""
    ranks = [list(Batches(order, global_batch, rank, world, start, stop)) for rank in range(world)]
    return [position for step in zip(*ranks, strict=True) for rank in step for position in rank]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_show_the_same_stream(world: int) -> None:
    assert merged(Order(50, seed=0), 12, world, 0, 130) == list(range(120))


def test_resume_anywhere_on_another_world_and_batch_continues_the_stream() -> None:
    order = Order(101, seed=0, block=4, window=4)
    before = merged(order, 8, 2, 0, 56)
    after = merged(order, 12, 4, 56, 301)
    assert [order.at(p) for p in before + after] == stream(order, 0, 56 + 240)


def test_length_counts_the_whole_run_and_iteration_what_is_left() -> None:
    batches = Batches(Order(100, seed=0), 10, 0, 1, start=30, stop=205, before=3)
    assert len(batches) == 20
    assert len(list(batches)) == 17


def test_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"10 over 4 processes; set batch_size=8"):
        Batches(Order(100, seed=0), 10, 0, 4, 0, 100)


def test_fewer_samples_than_a_batch_is_refused_with_both_ways_out() -> None:
    with pytest.raises(
        UserError, match=r"has 9 samples, fewer than one batch of 16; set batch_size=8 .*data.root=FOLDER"
    ):
        Batches(Order(9, seed=0), 16, 0, 2, 0, 100)


ORDER = Order(150, seed=4, block=4, window=4)
LENGTHS = np.random.default_rng(1).integers(3, 100, 150).astype(np.int32)


def cut(world: int, start: int = 0, before: int = 0, tokens: int = 600) -> list[Batches]:
    budget = Budget(tokens, LENGTHS)
    return [Batches(ORDER, 16, rank, world, start, 400, before, budget) for rank in range(world)]


def steps(batches: list[Batches]) -> list[list[list[int]]]:
    """Positions by step and rank."""
    return [list(step) for step in zip(*batches, strict=True)]


def by_hand(world: int, start: int, tokens: int) -> list[int]:
    """Images of each step, by adding one after the other."""
    sizes, position = [], start
    while position + world <= 400:
        used = size = 0
        while size < 16 and position + size < 400:
            used += int(LENGTHS[ORDER.at(position + size)[1]])
            if used > tokens:
                break
            size += 1
        sizes.append(size // world * world)
        position += sizes[-1]
    return sizes


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("ahead", [16, 50, 65_536])
def test_a_budget_takes_what_fits_and_all_processes_the_same_number(
    world: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longclip.data.plans.batching.AHEAD", ahead)
    found = steps(cut(world))
    assert [sum(map(len, step)) for step in found] == by_hand(world, 0, 600)
    assert all(len({len(part) for part in step}) == 1 for step in found)
    positions = [position for step in found for part in step for position in part]
    assert positions == list(range(400 // world * world))


def test_a_budget_is_counted_in_steps_and_resumed_at_any_of_them() -> None:
    (whole,) = cut(1)
    found = list(whole)
    assert len(whole) == len(found) == whole.left
    for done in (1, 7, len(found) - 1):
        (rest,) = cut(1, found[done][0], done)
        assert len(rest) == len(whole)
        assert list(rest) == found[done:]


def test_a_budget_below_one_image_is_refused_with_what_is_needed() -> None:
    with pytest.raises(UserError, match=r"data.plan.tokens=100 is less than .* each of 4 processes needs"):
        steps(cut(4, tokens=100))
