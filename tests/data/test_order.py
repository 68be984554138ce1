"""Order is arithmetic: complete, seeded, and cut by ranks and batches without a trace."""

import pickle

import pytest

from longclip.data.batching import Batches
from longclip.data.order import Order
from longclip.types import UserError

SIZES = [(1, 1, 1), (7, 3, 2), (64, 4, 4), (100, 32, 2), (1000, 7, 5), (1000, 32, 32), (33, 64, 1)]


def stream(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    return [order.at(position) for position in range(start, stop)]


def merged(order: Order, global_batch: int, world: int, start: int, stop: int) -> list[int]:
    """Positions of all ranks, step by step, in rank order."""
    ranks = [list(Batches(order, global_batch, rank, world, start, stop)) for rank in range(world)]
    return [position for step in zip(*ranks, strict=True) for rank in step for position in rank]


@pytest.mark.parametrize(("samples", "block", "window"), SIZES)
def test_every_sample_once_an_epoch(samples: int, block: int, window: int) -> None:
    order = Order(samples, seed=3, block=block, window=window)
    for epoch in range(3):
        shown = stream(order, epoch * samples, (epoch + 1) * samples)
        assert {e for e, _ in shown} == {epoch}
        assert sorted(index for _, index in shown) == list(range(samples))


def test_order_differs_by_epoch_and_by_seed() -> None:
    order = Order(200, seed=0, block=8, window=4)
    epochs = [[index for _, index in stream(order, e * 200, e * 200 + 200)] for e in range(2)]
    other = [index for _, index in stream(Order(200, seed=1, block=8, window=4), 0, 200)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != other
    assert epochs[0] != list(range(200))


def test_order_is_the_same_function_everywhere() -> None:
    """Fixed values: a numpy release, a platform or a refactoring must not move a resumed run."""
    shown = [index for _, index in stream(Order(10, seed=7, block=2, window=3), 0, 20)]
    assert shown == [4, 7, 6, 9, 8, 5, 1, 2, 3, 0, 3, 6, 9, 8, 7, 2, 5, 1, 4, 0]


def test_position_is_all_there_is_to_know() -> None:
    order = Order(500, seed=5, block=16, window=3)
    forwards = stream(order, 0, 1500)
    backwards = [pickle.loads(pickle.dumps(order)).at(position) for position in reversed(range(1500))]
    assert forwards == backwards[::-1]


def test_a_window_mixes_far_apart_blocks() -> None:
    order = Order(10_000, seed=0)
    first = [index for _, index in stream(order, 0, 128)]
    assert len({index // 32 for index in first}) > 16
    assert max(first) - min(first) > 5_000


def test_ten_million_samples_need_no_list_of_samples() -> None:
    order = Order(10_000_000, seed=0)
    assert len({order.at(position)[1] for position in range(12_345_000, 12_346_000)}) == 1000


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


def test_zero_samples_are_refused() -> None:
    with pytest.raises(UserError, match="samples >= 1, got 0"):
        Order(0, seed=0)
