"""Assignment: against all permutations, and without a look at the numbers from the host."""

from itertools import permutations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longclip.objectives.assignment import assign


def least(cost_KN):
    """The cost of the best of all ways to give every row a column of its own."""
    ways = permutations(range(len(cost_KN[0])), len(cost_KN))
    return min(sum(row[n] for row, n in zip(cost_KN, way, strict=True)) for way in ways)


def paid(cost_BKN):
    column_BK = assign(cost_BKN)
    for columns in column_BK.tolist():
        assert len(set(columns)) == len(columns), "two rows share a column"
        assert all(0 <= n < cost_BKN.shape[2] for n in columns)
    return cost_BKN.take_along_dim(column_BK[..., None], 2)[..., 0].sum(1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (3, 3), (4, 4), (3, 6), (5, 6)])
def test_costs_are_the_least_of_all_permutations(rows, columns):
    random = torch.Generator().manual_seed(rows * columns)
    fine = torch.randn(20, rows, columns, generator=random, dtype=torch.float64)
    ties = torch.randint(0, 3, (20, rows, columns), generator=random).double()
    for cost in (fine, ties, -10 * fine):
        torch.testing.assert_close(paid(cost), torch.tensor([least(c) for c in cost.tolist()]).double())


def test_an_earlier_row_gives_way_to_a_later_one():
    cost = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 5.0, 9.0], [2.0, 1.0, 9.0]]])
    assert assign(cost).tolist() == [[2, 0, 1]]


def test_rows_that_cost_nothing_anywhere_are_in_nobodys_way():
    random = torch.Generator().manual_seed(0)
    cost = torch.randn(30, 4, 5, generator=random)
    cost[:, 1::2] = 0
    torch.testing.assert_close(paid(cost), torch.tensor([least(c[::2]) for c in cost.tolist()]))


def test_it_runs_on_tensors_that_hold_no_numbers():
    with FakeTensorMode():
        assert assign(torch.empty(3, 2, 4)).shape == (3, 2)


def test_more_rows_than_columns_are_a_fault():
    with pytest.raises(AssertionError, match="3 rows"):
        assign(torch.zeros(1, 3, 2))
