"""Order is arithmetic: complete, seeded, and cut by ranks and batches without a trace."""

import pickle

import pytest

from longclip.data.plans.order import Order
from longclip.types import UserError

SIZES = [(1, 1, 1), (7, 3, 2), (64, 4, 4), (100, 32, 2), (1000, 7, 5), (1000, 32, 32), (33, 64, 1)]


def stream(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    return [order.at(position) for position in range(start, stop)]


@pytest.mark.parametrize(("samples", "block", "window"), SIZES)
def test_every_sample_once_an_epoch(samples: int, block: int, window: int) -> None:
    order = Order(samples, seed=3, block=block, window=window)
    for epoch in range(3):
        shown = stream(order, epoch * samples, (epoch + 1) * samples)
        assert {e for e, _ in shown} == {epoch}
        assert sorted(index for _, index in shown) == list(range(samples))


@pytest.mark.parametrize(("samples", "block", "window"), [(100, 4, 3), (64, 2, 2), (1000, 7, 5), (301, 8, 2)])
def test_a_sample_returns_late(samples: int, block: int, window: int) -> None:
    """No batch of up to a quarter of these data that straddles two epochs holds an image twice."""
    order = Order(samples, seed=3, block=block, window=window)
    last, gaps = dict[int, int](), []
    for position, (_, index) in enumerate(stream(order, 0, 8 * samples)):
        gaps.append(position - last.get(index, -samples))
        last[index] = position
    blocks = -(-samples // block)
    near = (blocks - 2 * (blocks % window)) // (3 * window) * window
    assert min(gaps) > (near - 1) * block
    assert min(gaps) >= samples // 4


def test_spans_are_positions_side_by_side() -> None:
    order = Order(100, seed=1, block=8, window=3)
    shown = [list(pair) for pair in stream(order, 0, 300)]
    for start, stop in [(0, 300), (95, 105), (7, 7), (199, 201), (24, 48)]:
        assert order.span(start, stop).tolist() == shown[start:stop]


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


def test_zero_samples_are_refused() -> None:
    with pytest.raises(UserError, match="samples >= 1, got 0"):
        Order(0, seed=0)
