"""Repeated batches: each direction is carried once, in as few backward passes as possible."""

import pytest
import torch
from torch import nn

from bayes_kf.inference.linearization.batch_repetition import FORWARD_COST, BatchRepetition, cheapest_repetition
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.models.adapter import AdapterModel
from tests.oracles import dense_jacobian

CPU = torch.device("cpu")


@pytest.mark.parametrize("copies", [[1, 1, 1], [2, 1, 4], [3, 3, 3]])
@pytest.mark.parametrize("needed", [None, [5, 1, 9], [0, 2, 2]])
def test_every_direction_is_carried_once(copies, needed):
    repetition = BatchRepetition.of(torch.tensor(copies))
    wanted = needed or [5, 5, 5]
    backward_passes = list(repetition.backward_passes(5, None if needed is None else torch.tensor(needed), CPU))
    carried = [pair for one in backward_passes for pair in zip(one.example.tolist(), one.which.tolist(), strict=True)]
    assert sorted(carried) == [(b, j) for b, number in enumerate(wanted) for j in range(number)]
    assert len(backward_passes) == max(-(-number // times) for number, times in zip(wanted, copies, strict=True))
    for one in backward_passes:
        if one.rows is not None:
            assert repetition.example[one.rows].tolist() == one.example.tolist()


def cost(repetition: BatchRepetition, needed, free):
    passes = len(list(repetition.backward_passes(0, needed, CPU)))
    return (FORWARD_COST + passes) * max(len(repetition.example), free)


@pytest.mark.parametrize("needed", [[40, 2, 2, 3], [7, 7, 7, 7], [1, 1, 1, 1], [30, 1, 30, 1], [40, 30, 30, 30]])
@pytest.mark.parametrize(("free", "most"), [(1, 8), (1, 64), (16, 16), (64, 200)])
def test_no_other_repetition_is_cheaper(needed, free, most):
    needed = torch.tensor(needed)
    actual = cheapest_repetition(tuple(needed.tolist()), free, most)
    assert len(actual.example) <= max(most, len(needed))
    for passes in range(1, int(needed.max()) + 1):
        other = BatchRepetition.of(-(-needed // passes))
        if len(other.example) <= max(most, len(needed)):
            assert cost(actual, needed, free) <= cost(other, needed, free) + 1e-4


def test_one_example_with_many_directions_takes_no_extra_passes_of_the_others():
    repetition = cheapest_repetition((32, 2, 2, 2, 2, 2, 2, 2), 1, 16)
    assert repetition.copies[0] > 1
    assert repetition.copies[1:].tolist() == [1] * 7


@pytest.mark.parametrize("told", [None, 3, [4, 1, 0, 2], [1, 1, 1, 1]])
def test_rows_do_not_depend_on_the_repetition(told):
    """The forecast of the number of directions changes speed alone."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6)).double(), torch.randn(4, 3).double()
    seeds, needed = torch.randn(4, 4, 6).double(), torch.tensor([4, 1, 0, 2])
    seeds *= (torch.arange(4) < needed.unsqueeze(1)).unsqueeze(-1)
    adapter = AdapterModel(model)
    directions = Directions(4, lambda example, which: seeds[example, which], needed)
    actual = Linearizer(adapter)(adapter.vector(), x, rows_per_example=told).jacobian(directions).dense()
    exact = seeds @ dense_jacobian(model, lambda m: m(x))[1].view(4, 6, -1)
    torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
