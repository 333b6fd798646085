"""Sophia-G against a dense reference, step by step."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayes_kf.data import uci_digits_split
from bayes_kf.inference.baselines import SophiaG
from bayes_kf.models.zoo import lora_digits_vit


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(size=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (size,), generator=generator)


def learn(optimizer, model, inputs, labels):
    outputs = model(inputs)
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    loss = F.cross_entropy(outputs, labels)
    optimizer.zero_grad()
    optimizer.backward(loss, outputs)
    optimizer.step()
    return loss.item()


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_steps_are_the_reference_s():
    """m, h and θ as vectors, with labels drawn by the same generator, over three estimates of the curvature."""
    model = mlp()
    reference = copy.deepcopy(model)
    optimizer = SophiaG(model, lr=0.02, betas=(0.9, 0.8), rho=0.5, refresh=4, weight_decay=0.1, seed=5)
    generator = torch.Generator().manual_seed(5)
    parameters = list(reference.parameters())
    mean = curvature = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    clipped = set()
    for number in range(11):
        inputs, labels = batch(size=5 + number % 3, seed=number)
        outputs = reference(inputs)
        if number % 4 == 0:
            drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator).squeeze(1)
            sampled = flat(torch.autograd.grad(F.cross_entropy(outputs, drawn), parameters, retain_graph=True))
            curvature = 0.8 * curvature + 0.2 * len(inputs) * sampled.square()
        gradient = flat(torch.autograd.grad(F.cross_entropy(outputs, labels), parameters))
        mean = 0.9 * mean + 0.1 * gradient
        ratio = mean.abs() / (0.5 * curvature)
        clipped |= set((ratio > 1).tolist())
        theta = (1 - 0.02 * 0.1) * flat(parameters) - 0.02 * mean.sign() * ratio.clamp(max=1.0)
        torch.nn.utils.vector_to_parameters(theta, parameters)
        learn(optimizer, model, inputs, labels)
        torch.testing.assert_close(flat(model.parameters()), theta, rtol=1e-11, atol=1e-13)
    assert clipped == {True, False}


def test_estimate_averages_to_the_diagonal_of_the_fisher_information():
    """Over many drawn labels, against the dense expectation over the labels of every example, within five errors."""
    model, (inputs, _) = mlp(), batch(4)
    parameters = list(model.parameters())
    probs = model(inputs).detach().softmax(1)
    exact = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for x, prob in zip(inputs, probs, strict=True):
        for label in range(3):
            loss = F.cross_entropy(model(x[None]), torch.tensor([label]))
            exact += prob[label] * flat(torch.autograd.grad(loss, parameters)).square() / len(inputs)
    estimates = []
    optimizer = SophiaG(model, lr=1e-9, betas=(0.9, 0.0), refresh=1)
    for _ in range(1500):
        drawn = optimizer._curvature(model(inputs))
        estimates.append(torch.cat([drawn[p].flatten() for p in parameters]))
    samples = torch.stack(estimates)
    error = samples.std(0) / math.sqrt(len(samples))
    assert float(((samples.mean(0) - exact).abs() / (5 * error + 1e-12)).max()) < 1


@pytest.mark.slow
def test_adapters_of_a_transformer_learn():
    model = lora_digits_vit(rank=4).eval()
    train, _ = uci_digits_split(seed=0)
    optimizer = SophiaG(model, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 50)
    losses = []
    for x, y in zip(train.images.split(16)[:50], train.labels.split(16), strict=False):
        losses.append(learn(optimizer, model, x, y))
        schedule.step()
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_gradients_that_are_not_finite_change_nothing():
    model, (inputs, labels) = mlp(), batch()
    optimizer = SophiaG(model)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    before = flat(model.parameters())
    model[2].bias.grad[0] = math.inf
    with pytest.raises(FloatingPointError, match="the gradients are not finite"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), before)
    assert not optimizer.state  # nor is the curvature: a clean batch goes on as the first one
    other = mlp()
    fresh = SophiaG(other)
    fresh._generator.set_state(optimizer._generator.get_state())
    assert learn(optimizer, model, inputs, labels) == learn(fresh, other, inputs, labels)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    outputs = model(inputs) * math.nan
    with pytest.raises(FloatingPointError, match="the outputs are not finite"):
        optimizer.backward(F.cross_entropy(outputs, labels), outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be positive and finite, got -1.0"),
        ({"rho": 0.0}, "`rho` must be positive"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"`betas` must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"refresh": 0}, "`refresh` must be a whole number >= 1"),
        ({"weight_decay": -0.1}, "`weight_decay` must be >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SophiaG(mlp(), **options)
