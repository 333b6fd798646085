"""Sparse Optimization against a dense reference, step by step, and what it keeps in memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayes_kf.data import uci_digits_split
from bayes_kf.inference.baselines import SparseOptimization
from bayes_kf.inference.baselines.sparse import random_indices
from bayes_kf.models.zoo import lora_digits_vit


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def batch(size=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (size,), generator=generator)


def learn(optimizer, model, inputs, labels):
    outputs = model(inputs)
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    loss = F.cross_entropy(outputs, labels)
    optimizer.zero_grad()
    optimizer.backward(loss, outputs)
    optimizer.step()
    return loss.item()


class Dense:
    """The rule written out on dense vectors, given the masks."""

    def __init__(self, parameter, number, lr, betas, eps):
        self.theta = parameter.detach().flatten().clone()
        self.number, self.lr, self.betas, self.eps = number, lr, betas, eps
        self.first, self.second = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.support = torch.zeros(len(self.theta), dtype=torch.bool)

    def step(self, gradient, mask, count):
        seen = torch.where(mask, gradient, 0.0)
        union = mask | self.support
        self.first = torch.where(union, self.betas[0] * self.first + (1 - self.betas[0]) * seen, 0.0)
        self.second = torch.where(union, self.betas[1] * self.second + (1 - self.betas[1]) * seen**2, 0.0)
        corrected = self.first / (1 - self.betas[0] ** count), self.second / (1 - self.betas[1] ** count)
        self.theta = torch.where(
            union, self.theta - self.lr * corrected[0] / (corrected[1].sqrt() + self.eps), self.theta
        )
        size = torch.where(union, self.first.abs(), -1.0)
        self.support = torch.zeros_like(self.support)
        self.support[size.topk(self.number).indices] = True
        self.first = torch.where(self.support, self.first, 0.0)
        self.second = torch.where(self.support, self.second, 0.0)


def test_steps_are_the_dense_reference_s():
    """Masks, supports, both moments and parameters over five masks; every entry, every tensor."""
    model, setting = mlp(), {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = SparseOptimization(model, density=0.07, refresh=4, seed=3, **setting)
    parameters = list(model.parameters())
    numbers = [max(1, math.floor(0.07 * p.numel())) for p in parameters]
    assert numbers == [8, 1, 2, 1]
    references = [Dense(p, number, **setting) for p, number in zip(parameters, numbers, strict=True)]
    masks, decayed = [], 0
    for number in range(18):
        inputs, labels = batch(seed=number)
        gradients = torch.autograd.grad(F.cross_entropy(model(inputs), labels), parameters)
        if number == 0:
            optimizer._draw_masks()
        shown = {p: optimizer.state[p]["mask"].clone() for p in parameters}
        learn(optimizer, model, inputs, labels)
        now = []
        for p, gradient, reference in zip(parameters, gradients, references, strict=True):
            state, mask = optimizer.state[p], torch.zeros(p.numel(), dtype=torch.bool)
            mask[shown[p]] = True
            decayed += int((reference.support & ~mask).sum())
            assert int(mask.sum()) == reference.number == len(state["support"])
            reference.step(gradient.flatten(), mask, number + 1)
            now.append(mask)
            assert set(state["support"].tolist()) == set(reference.support.nonzero().squeeze(1).tolist())
            for name, dense in (("first", reference.first), ("second", reference.second)):
                torch.testing.assert_close(state[name], dense[state["support"]], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(p.detach().flatten(), reference.theta, rtol=1e-10, atol=1e-12)
        masks.append(torch.cat(now))
    assert decayed > 0  # entries outside the mask were there
    for number in range(1, 18):
        assert torch.equal(masks[number], masks[number - 1]) == (number % 4 != 0)


def test_with_all_entries_it_is_adam():
    model, other = mlp(), mlp()
    optimizer = SparseOptimization(model, lr=0.01, density=1.0)
    adam = torch.optim.Adam(other.parameters(), lr=0.01)
    for number in range(6):
        inputs, labels = batch(seed=number)
        learn(optimizer, model, inputs, labels)
        adam.zero_grad()
        F.cross_entropy(other(inputs), labels).backward()
        adam.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dense_gradients_never_coexist():
    """At every moment of a backward pass at most one tensor has a gradient; and the state is small."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)], nn.Linear(64, 3))
    parameters = list(model.parameters())
    seen = []
    for p in parameters:  # before and after the optimizer's own hooks
        p.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(q.grad.numel() for q in parameters if q.grad is not None))
        )
    optimizer = SparseOptimization(model, density=5e-3)
    inputs, labels = torch.randn(4, 64), torch.tensor([0, 1, 2, 0])
    learn(optimizer, model, inputs, labels)
    assert len(seen) == len(parameters)
    assert max(seen) == 64 * 64
    assert all(p.grad is None for p in parameters)
    held = sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())
    adamw = sum(2 * p.numel() * p.element_size() for p in parameters)
    assert held < 0.03 * adamw  # two moments (4 bytes) and two indices (8) of 0.5 %, one entry at least


def test_subsets_are_uniform():
    """Every entry is as likely, and so is every pair; five standard errors."""
    generator, draws = torch.Generator().manual_seed(0), 4000
    counts = torch.zeros(20)
    pairs = 0
    for _ in range(draws):
        indices = random_indices(20, 5, generator)
        assert len(set(indices.tolist())) == 5
        counts[indices] += 1
        pairs += int({0, 1} <= set(indices.tolist()))
    error = math.sqrt(draws * 0.25 * 0.75)
    assert float((counts - draws / 4).abs().max()) < 5 * error
    chance = (5 / 20) * (4 / 19)
    assert abs(pairs - draws * chance) < 5 * math.sqrt(draws * chance * (1 - chance))
    assert sorted(random_indices(6, 6, generator).tolist()) == list(range(6))


def test_schedulers_scale_the_step():
    moved = []
    for factor in (1.0, 0.25):
        model = mlp()
        optimizer = SparseOptimization(model, lr=0.1, density=0.2)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        before = model[0].weight.detach().clone()
        learn(optimizer, model, *batch())
        moved.append(model[0].weight.detach() - before)
    torch.testing.assert_close(moved[1], 0.25 * moved[0])


def test_a_transformer_s_own_weights_learn():
    """No adapter: the attention and MLP matrices of the bundled transformer, one entry in twenty, on real digits."""
    model = lora_digits_vit(rank=4).unload().eval()
    for name, p in model.named_parameters():
        p.requires_grad_(p.ndim == 2 and "embed" not in name)
    train, _ = uci_digits_split(seed=0)
    optimizer = SparseOptimization(model, lr=2e-3, density=0.05)
    losses = [
        learn(optimizer, model, x, y) for x, y in zip(train.images.split(16)[:50], train.labels.split(16), strict=False)
    ]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_gradients_accumulate_over_backward_passes():
    model, (inputs, labels) = mlp(), batch(8)
    optimizer = SparseOptimization(model, density=0.3)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    whole = {p: values.clone() for p, values in optimizer._masked.items()}
    optimizer.zero_grad()
    other = SparseOptimization(model, density=0.3)
    for part in (slice(0, 4), slice(4, 8)):
        outputs = model(inputs[part])
        other.backward(0.5 * F.cross_entropy(outputs, labels[part]), outputs)
    for p, values in whole.items():
        torch.testing.assert_close(other._masked[p], values)


def test_gradients_that_are_not_finite_change_nothing():
    model, (inputs, labels) = mlp(), batch()
    optimizer = SparseOptimization(model, density=0.5)
    learn(optimizer, model, inputs, labels)
    before = [p.detach().clone() for p in model.parameters()]
    outputs = model(inputs)
    optimizer.zero_grad()
    optimizer.backward(F.cross_entropy(outputs, labels) * math.nan, outputs)
    with pytest.raises(FloatingPointError, match="the gradients are not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    learn(optimizer, model, inputs, labels)  # goes on


def test_one_bad_entry_outside_the_mask_is_seen():
    model, (inputs, labels) = mlp(), batch()
    optimizer = SparseOptimization(model, density=1e-3)
    before = model[0].weight.detach().clone()
    model[0].weight.register_hook(
        lambda g: g.index_put((torch.tensor(5), torch.tensor(7)), torch.tensor(math.nan).double())
    )
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    assert 5 * 12 + 7 not in optimizer.state[model[0].weight]["mask"].tolist()
    with pytest.raises(FloatingPointError, match="the gradients are not finite"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_a_skipped_batch_draws_no_mask():
    model, (inputs, labels) = mlp(), batch()
    optimizer = SparseOptimization(model, density=0.1)
    masks = []
    for _ in range(3):
        outputs = model(inputs)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(outputs, labels), outputs)
        masks.append(optimizer.state[model[0].weight]["mask"])
    assert torch.equal(masks[0], masks[2])


def test_tensors_that_are_not_contiguous():
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(6, 4).mT)
    optimizer = SparseOptimization(model, lr=0.1, density=0.3)
    before = model.weight.detach().clone()
    outputs = model(torch.eye(6))
    optimizer.backward(outputs.square().sum(), outputs)
    mask = optimizer.state[model.weight]["mask"]
    optimizer.step()
    changed = (model.weight != before).reshape(-1).nonzero().squeeze(1)
    assert sorted(mask.tolist()) == changed.tolist()


def test_gradients_of_other_losses_stay_dense():
    model, (inputs, labels) = mlp(), batch()
    optimizer = SparseOptimization(model)
    F.cross_entropy(model(inputs), labels).backward()  # not through the optimizer
    assert model[0].weight.grad is not None
    optimizer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
        ({"density": 0.0}, "`density` must be positive"),
        ({"density": 1.5}, r"`density` must lie in \(0, 1\], got 1.5"),
        ({"refresh": 2.0}, "`refresh` must be a whole number >= 1, got 2.0"),
        ({"betas": (-0.1, 0.9)}, r"`betas` must be two numbers in \[0, 1\)"),
        ({"eps": 0.0}, "`eps` must be positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseOptimization(mlp(), **options)
