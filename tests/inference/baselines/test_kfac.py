"""K-FAC, RING and RENG against dense float64 answers."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayes_kf.data import uci_digits_split
from bayes_kf.inference.baselines import KFAC, RENG, RING
from bayes_kf.inference.baselines.kronecker_factors import kronecker_layers
from bayes_kf.models.zoo import lora_digits_vit

with warnings.catch_warnings():  # of a library that it imports
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    from curvlinops import KFACLinearOperator

KINDS = {"kfac": KFAC, "ring": RING, "reng": RENG}


def mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()


def batch(size=7, features=(4,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, *features, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (size,), generator=generator)


def learn(optimizer, model, inputs, labels):
    outputs = model(inputs)
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    loss = F.cross_entropy(outputs, labels)
    optimizer.zero_grad()
    optimizer.backward(loss, outputs)
    optimizer.step()
    return loss.item()


def drawn_labels(model, inputs, seed=0):
    probs = model(inputs).detach().double().softmax(1)
    return torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def gradients_of_examples(model, inputs, labels):
    """Of −log p of every example, one tensor (N, ...) a parameter."""
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        rows.append(torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_linear_layers_are_means_over_examples(bias):
    """With the same drawn labels: A from the inputs, and G from the gradients of the outputs, example by example."""
    model, (inputs, _) = mlp(bias=bias), batch()
    learned, optimizer = model, KFAC(model, lr=1e-9)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, torch.zeros(7, dtype=torch.long)), outputs)
    optimizer.step()
    model = mlp(bias=bias)  # as it was
    labels = drawn_labels(model, inputs)
    hidden = model[0](inputs)
    for number, into, out in ((0, inputs, hidden), (2, hidden.tanh(), outputs)):
        of = F.one_hot(labels, 3).double() - outputs.softmax(1)
        if number == 0:
            of = (of @ model[2].weight) * (1.0 - hidden.tanh().square())
        into = F.pad(into, (0, 1), value=1.0) if bias else into
        state = optimizer.state[learned[number].weight]
        torch.testing.assert_close(state["input_factor"], (into.mT @ into / 7).detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["output_factor"], (of.mT @ of / 7).detach(), rtol=1e-12, atol=1e-12)
        assert out.shape[1] == len(state["output_factor"])


class Net(nn.Module):
    """Two convolutions and a Linear over positions, then a mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 4, (2, 1), dilation=(1, 2), bias=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.second(F.relu_(self.first(x)))  # in place: cotangents are those before it
        return self.last(x.flatten(2).mT).mean(1)


def exact_fisher_factors(operator_model, inputs):
    """A and G by curvlinops, of its exact Fisher information of the mean loss."""
    return KFACLinearOperator(
        operator_model,
        nn.CrossEntropyLoss(reduction="mean"),
        list(operator_model.parameters()),
        [(inputs, torch.zeros(len(inputs), dtype=torch.long))],
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


@pytest.mark.parametrize(("make", "features"), [(mlp, (4,)), (lambda: Net().double(), (2, 9, 9))])
def test_blocks_average_to_those_of_curvlinops(make, features):
    """G ⊗ A over many drawn labels, against the exact expectation by another library, within five standard errors."""
    model, (inputs, _) = make(), batch(3, features)
    theirs = exact_fisher_factors(copy.deepcopy(model), inputs) @ torch.eye(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64
    )
    watched, draws = kronecker_layers(model), 1500
    total = {layer.name: [] for layer in watched}
    generator = torch.Generator().manual_seed(0)
    outputs = model(inputs)
    for _ in range(draws):
        labels = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator).squeeze(1)
        for layer in watched:
            layer.recording = True
        loss = F.cross_entropy(outputs, labels, reduction="sum")
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for layer in watched:
            out, into = layer.factors(len(inputs))
            total[layer.name].append(torch.kron(out, into))
            layer.clear()
    places = {}
    start = 0
    for name, parameter in model.named_parameters():
        places[name] = (start, parameter.shape)
        start += parameter.numel()
    for layer in watched:
        blocks = torch.stack(total[layer.name])
        width = layer.weight[0].numel()
        rows = torch.arange(len(layer.weight) * width).reshape(len(layer.weight), width)
        index = rows + places[f"{layer.name}.weight"][0]
        if layer.bias is not None:
            bias = torch.arange(len(layer.weight))[:, None] + places[f"{layer.name}.bias"][0]
            index = torch.cat([index, bias], 1)
        index = index.flatten()
        expected = theirs[index][:, index].detach()
        error = blocks.std(0) / math.sqrt(draws)
        assert float(((blocks.mean(0) - expected).abs() / (5.0 * error + 1e-9)).max()) < 1.0
        assert float(expected.abs().max()) > 1e-4


def dense_step(gradient, out, into, damping, exact):
    """(F + λI)⁻¹ g over the joined weight, F = G ⊗ A dense, or with its damping in the factors."""
    if exact:
        block = torch.kron(out, into) + damping * torch.eye(out.shape[0] * into.shape[0], dtype=torch.float64)
    else:
        balance = math.sqrt(into.diagonal().mean() / out.diagonal().mean())
        root = math.sqrt(damping)
        block = torch.kron(
            out + root / balance * torch.eye(len(out), dtype=torch.float64),
            into + root * balance * torch.eye(len(into), dtype=torch.float64),
        )
    return torch.linalg.solve(block, gradient.flatten()).view_as(gradient)


@pytest.mark.parametrize("inverse", ["cholesky", "newton", "eigen"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_is_the_dense_solve(inverse, clip):
    model, (inputs, labels) = mlp(), batch()
    before = copy.deepcopy(model)
    optimizer = KFAC(model, lr=0.3, damping=0.01, kl_clip=clip, inverse=inverse)
    learn(optimizer, model, inputs, labels)
    gradients = torch.autograd.grad(F.cross_entropy(before(inputs), labels), list(before.parameters()))
    moves, divergence = [], 0.0
    for number, (weight, bias) in enumerate((gradients[:2], gradients[2:])):
        state = optimizer.state[model[2 * number].weight]
        joined = torch.cat([weight, bias[:, None]], 1)
        moves.append(dense_step(joined, state["output_factor"], state["input_factor"], 0.01, inverse == "eigen"))
        divergence += 0.3**2 * (moves[-1] * joined).sum().item()
    scale = 1.0 if clip is None else min(1.0, math.sqrt(clip / divergence))
    assert clip is None or scale < 1.0
    for number, move in enumerate(moves):
        joined = torch.cat([before[2 * number].weight, before[2 * number].bias[:, None]], 1) - 0.3 * scale * move
        updated = torch.cat([model[2 * number].weight, model[2 * number].bias[:, None]], 1)
        torch.testing.assert_close(updated, joined, rtol=1e-9, atol=1e-12)


def test_factors_are_moving_averages():
    """Of what one update would have: with the first as it is, and then 0.7 of the old and 0.3 of the new."""
    model = mlp()
    optimizer = KFAC(model, lr=1e-3, decay=0.7)
    generator, expected = torch.Generator().manual_seed(0), {}
    for number in range(4):
        inputs, labels = batch(seed=number)
        hidden = model[0](inputs)
        probs = model[2](hidden.tanh()).detach().softmax(1)
        drawn = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        of = F.one_hot(drawn, 3).double() - probs
        into = F.pad(inputs, (0, 1), value=1.0)
        back = (of @ model[2].weight.detach()) * (1.0 - hidden.detach().tanh().square())
        for name, rows in (("input_factor", into), ("output_factor", back)):
            new = rows.mT @ rows / 7
            expected[name] = 0.7 * expected[name] + 0.3 * new if name in expected else new
        learn(optimizer, model, inputs, labels)
    for name, factor in expected.items():
        torch.testing.assert_close(optimizer.state[model[0].weight][name], factor, rtol=1e-12, atol=1e-14)


def test_other_tensors_take_the_damped_diagonal():
    """LayerNorm: squared gradients on drawn labels times the batch size, as the whole estimate has it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double()
    model[1].requires_grad_(False)
    inputs, labels = batch()
    before = copy.deepcopy(model)
    optimizer = KFAC(model, lr=0.1, damping=0.01, kl_clip=None)
    learn(optimizer, model, inputs, labels)
    drawn = F.cross_entropy(before(inputs), drawn_labels(before, inputs))
    for name in ("weight", "bias"):
        parameter = getattr(before[0], name)
        estimate = 7 * torch.autograd.grad(drawn, parameter, retain_graph=True)[0].square()
        gradient = torch.autograd.grad(F.cross_entropy(before(inputs), labels), parameter)[0]
        expected = parameter - 0.1 * gradient / (estimate + 0.01)
        torch.testing.assert_close(getattr(model[0], name), expected, rtol=1e-10, atol=1e-12)


def run(kind, steps=12, **options):
    model = mlp()
    optimizer = KINDS[kind](model, lr=0.1, refresh=3, **options)
    for number in range(steps):
        learn(optimizer, model, *batch(seed=number))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


@pytest.mark.parametrize("kind", ["ring", "reng"])
@pytest.mark.parametrize("inverse", ["cholesky", "newton", "eigen"])
def test_without_a_penalty_both_are_kfac_bit_for_bit(kind, inverse):
    assert torch.equal(run("kfac", inverse=inverse)[0], run(kind, inverse=inverse, penalty=0.0)[0])
    assert not torch.equal(run("kfac", inverse=inverse)[0], run(kind, inverse=inverse, penalty=0.5)[0])


@pytest.mark.parametrize("inverse", ["cholesky", "newton", "eigen"])
def test_ring_is_kfac_under_the_damping_of_the_gradient(inverse):
    """Step by step, each against a dense solve with λ₀ + ρ‖g‖²; lazily corrected inverses are good to a per cent."""
    model = mlp()
    optimizer = RING(model, lr=0.1, damping=0.02, penalty=0.02, kl_clip=None, inverse=inverse, refresh=4)
    lazily = 0
    for number in range(8):
        inputs, labels = batch(seed=number)
        before = copy.deepcopy(model)
        learn(optimizer, model, inputs, labels)
        gradients = torch.autograd.grad(F.cross_entropy(before(inputs), labels), list(before.parameters()))
        damping = 0.02 + 0.02 * float(sum(g.square().sum() for g in gradients))
        state = optimizer.state[model[0].weight]
        joined = torch.cat([gradients[0], gradients[1][:, None]], 1)
        moved = torch.cat([before[0].weight - model[0].weight, (before[0].bias - model[0].bias)[:, None]], 1) / 0.1
        if number % 4 == 0:  # inverses of these factors and this damping
            expected = dense_step(joined, state["output_factor"], state["input_factor"], damping, inverse == "eigen")
            torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-12)
        elif inverse != "eigen" and state["root_damping"] != math.sqrt(damping):
            lazily += 1
            shift = math.sqrt(damping) - state["root_damping"]
            sides = [
                torch.linalg.inv(torch.linalg.inv(state[name]) + by * torch.eye(len(state[name]), dtype=torch.float64))
                for name, by in (
                    ("output_inverse", shift / state["balance"]),
                    ("input_inverse", shift * state["balance"]),
                )
            ]
            expected = sides[0] @ joined @ sides[1]
            assert ((moved - expected).norm() / expected.norm()).item() < 0.03  # one per cent of ‖X‖ on either side
    assert inverse == "eigen" or lazily


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_exactly(kind, tmp_path):
    """From a state saved in the middle, generator, inverses and momentum included; nothing is unpickled."""

    def fresh(seed=0):
        model = mlp(seed)
        return model, KINDS[kind](model, lr=0.05, refresh=4, momentum=0.9, weight_decay=0.01, seed=3)

    model, optimizer = fresh()
    for number in range(6):
        learn(optimizer, model, *batch(seed=number))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    for number in range(6, 12):
        learn(optimizer, model, *batch(seed=number))
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again, other = fresh(seed=9)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for number in range(6, 12):
        learn(other, again, *batch(seed=number))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedulers_scale_the_step():
    moved = []
    for factor in (1.0, 0.25):
        model = mlp()
        optimizer = KFAC(model, lr=0.1, kl_clip=None)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        before = model[0].weight.detach().clone()
        learn(optimizer, model, *batch())
        moved.append(model[0].weight.detach() - before)
    torch.testing.assert_close(moved[1], 0.25 * moved[0])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_transformer_learn(kind):
    """LoRA and the head of the bundled transformer on real digits: the loss of a pass falls well below the start's."""
    model = lora_digits_vit(rank=4).eval()
    train, _ = uci_digits_split(seed=0)
    optimizer = KINDS[kind](model, lr=0.05, damping=1e-2)
    with optimizer.forward() if kind == "reng" else torch.enable_grad():
        losses = [
            learn(optimizer, model, x, y)
            for x, y in zip(train.images.split(16)[:50], train.labels.split(16), strict=False)
        ]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert all(math.isfinite(loss) for loss in losses)


def test_gradients_that_are_not_finite_change_nothing():
    model, (inputs, labels) = mlp(), batch()
    optimizer = KFAC(model)
    learn(optimizer, model, inputs, labels)
    before = copy.deepcopy(model.state_dict())
    outputs = model(inputs)
    optimizer.zero_grad()
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    model[0].weight.grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the gradients are not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "`lr` must be positive and finite, got 0.0"),
        ({"damping": -1.0}, "`damping` must be positive and finite"),
        ({"kl_clip": 0.0}, "`kl_clip` must be positive and finite"),
        ({"decay": 1.0}, r"`decay` must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"`momentum` must lie in \[0, 1\)"),
        ({"weight_decay": -1.0}, "`weight_decay` must be >= 0"),
        ({"refresh": 0}, "`refresh` must be a whole number >= 1, got 0"),
        ({"inverse": "lu"}, "`inverse` must be one of cholesky, newton, eigen, got 'lu'"),
        ({"penalty": -1.0}, "`penalty` must be >= 0 and finite"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RING(mlp(), **options)
