"""Models that reorder examples inside, or send them to experts, on a later batch than the first."""

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.linearization.row_order_check import may_move_rows
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.zoo import lora_digits_vit


class Experts(nn.Module):
    """Examples go to one of two by the sign of their first feature."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        outputs = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            which = ((x[:, 0] > 0).long() == number).nonzero()[:, 0]
            if len(which):
                outputs = outputs.index_copy(0, which, expert(x[which]))
        return outputs


class Sorted(nn.Module):
    """Examples are sorted by length inside, and back."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        hidden = torch.tanh(self.first(x[order]))
        return self.last(hidden[order.argsort()])


class SortedTwice(Sorted):
    """All of it in the other order."""

    def forward(self, x):
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        return self.last(torch.tanh(self.first(x[order]))).index_select(0, order.argsort())


class Written(Sorted):
    """The order is restored by writing in place, long sequences first."""

    def forward(self, x):
        outputs, long = x.new_zeros(len(x), 3), (x != 0).all(1)
        order = torch.cat([long.nonzero()[:, 0], (~long).nonzero()[:, 0]])
        outputs[order] = self.last(torch.tanh(self.first(x[order])))
        return outputs


class Packed(nn.Module):
    """A layer on packed sequences before a recurrent one."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(30, 6, padding_idx=0), nn.Linear(6, 6)
        self.rnn, self.head = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3)
        self.rnn.requires_grad_(False)

    def forward(self, ids):
        lengths = (ids != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        hidden = torch.tanh(self.layer(packed.data))
        rest = packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        return self.head(self.rnn(nn.utils.rnn.PackedSequence(hidden, *rest))[1][0])


def exact(adapter, vector, inputs):
    jacobian = torch.autograd.functional.jacobian(lambda v: adapter.call(adapter.unflatten(v), inputs), vector)
    return jacobian.flatten(2)


def batches(kind):
    """A batch that moves no rows, and batches that do; two unequal examples among many are enough."""
    torch.manual_seed(0)
    if kind is Packed:
        ids = torch.randint(1, 30, (6, 5))
        unlike = ids.clone()
        unlike[0, 2:], unlike[3, 3:] = 0, 0
        return [ids, unlike, unlike.flip(0)]
    x = torch.randn(12, 4).abs() + 0.1
    few, many = x.clone(), x.clone()
    few[3, 2:], many[::2, 2:] = 0, 0
    if kind is Experts:
        few, many = x * torch.ones(12, 1).index_fill(0, torch.tensor([3]), -1.0), x * torch.tensor([[1.0], [-1.0]] * 6)
    return [x, few, many]


@pytest.mark.parametrize("pulled", ["jacobian", "softmax_jacobian"])
@pytest.mark.parametrize("kind", [Experts, Sorted, SortedTwice, Written, Packed])
def test_rows_belong_to_their_examples_on_every_batch(kind, pulled):
    model = kind().double()
    adapter = AdapterModel(model)
    linearize, vector, shown = Linearizer(adapter), adapter.vector(), batches(kind)
    inputs = [x if kind is Packed else x.double() for x in shown]
    for x in (*inputs, inputs[0]):
        actual = getattr(linearize(vector, x), pulled)().dense()
        expected = exact(adapter, vector, x)
        if pulled == "softmax_jacobian":
            actual, expected = actual - actual[:, -1:], expected - expected[:, -1:]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    if kind is Sorted:
        assert adapter.linearized_by["first.weight"] == "general"
        assert adapter.linearized_by["last.weight"] == "hooks"


@pytest.mark.parametrize("settings", [{"curvature": "sampled"}, {"curvature": "truncated", "curvature_epsilon": 0.2}])
@pytest.mark.parametrize("kind", [Experts, Sorted])
def test_an_update_never_uses_wrong_rows(kind, settings):
    """Against the same model on the general path from the start, to which another first batch sends it."""
    shown, y = [x.double() for x in batches(kind)], torch.arange(12) % 3
    torch.manual_seed(1)
    model, config = kind().double(), bkf.KalmanConfig(covariance="diagonal", initial_variance=0.3, **settings)
    warned, unwarned = (bkf.KalmanFilter(model, config) for _ in range(2))
    warned.linearize.prepare(warned.adapter.vector(), shown[2])
    warned.linearize._refuse(warned.adapter.names)
    states = [kf.init() for kf in (warned, unwarned)]
    for x in (shown[0], shown[1], shown[2]):
        states = [kf.update(state, x, y)[0] for kf, state in zip((warned, unwarned), states, strict=True)]
    torch.testing.assert_close(states[0].belief.mean, states[1].belief.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(states[0].belief.variance, states[1].belief.variance, rtol=1e-8, atol=1e-10)


def test_models_that_keep_their_rows_are_not_checked():
    adapter = AdapterModel(lora_digits_vit(rank=2))
    x = torch.rand(3, 1, 28, 28)
    leaves = adapter.leaves(adapter.vector())
    assert not may_move_rows(adapter.call(leaves, x))

    class Last(nn.Module):
        """Reads the last place of each text, as language models that classify do."""

        def __init__(self, order):
            super().__init__()
            self.layer, self.order = nn.Linear(4, 3), order

        def forward(self, x):
            return self.layer(x)[self.order, torch.tensor([1, 0, 1])]

    texts = torch.randn(3, 2, 4)
    assert not may_move_rows(Last(torch.arange(3))(texts))
    assert may_move_rows(Last(torch.tensor([1, 0, 2]))(texts))
