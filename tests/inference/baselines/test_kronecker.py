"""Kronecker factors against loops over examples and places, and which tensors have them."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf.inference.baselines import KFAC
from bayes_kf.inference.baselines.kronecker_factors import kronecker_layers


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(model, layer, inputs, labels):
    """G and A with these labels in place of drawn ones."""
    layer.recording = True
    outputs = model(inputs)
    F.cross_entropy(outputs, labels, reduction="sum").backward()
    factors = layer.factors(len(inputs))
    layer.clear()
    return factors


class Pooled(nn.Module):
    """One layer at many places, squared and averaged, and a frozen classifier."""

    def __init__(self, layer, width):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = layer.double(), nn.Linear(width, 3).double().requires_grad_(False)

    def forward(self, x):
        out = self.layer(x)
        self.hidden = out
        out = out if out.ndim == 3 else out.flatten(2).mT  # (N, T, width)
        return self.last(out.square().mean(1))


def patches_of(convolution, x):
    """What every output pixel of one example sees, by loops, (T, channels · height · width)."""
    (kh, kw), (sh, sw) = convolution.kernel_size, convolution.stride
    (ph, pw), (dh, dw) = convolution.padding, convolution.dilation
    padded = torch.zeros(x.shape[0], x.shape[1] + 2 * ph, x.shape[2] + 2 * pw, dtype=x.dtype)
    padded[:, ph : ph + x.shape[1], pw : pw + x.shape[2]] = x
    rows = []
    for top in range(0, padded.shape[1] - dh * (kh - 1), sh):
        for left in range(0, padded.shape[2] - dw * (kw - 1), sw):
            seen = [
                padded[c, top + a * dh, left + b * dw] for c in range(x.shape[0]) for a in range(kh) for b in range(kw)
            ]
            rows.append(torch.stack(seen))
    return torch.stack(rows)


LAYERS = {
    "tokens": (lambda: nn.Linear(4, 5), (6, 4), 5),
    "tokens, no bias": (lambda: nn.Linear(4, 5, bias=False), (6, 4), 5),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 5, 4), 4),
    "strided": (lambda: nn.Conv2d(2, 4, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (2, 6, 5), 4),
    "1 x 1, no bias": (lambda: nn.Conv2d(3, 2, 1, bias=False), (3, 3, 4), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_means_over_examples_and_places(name):
    """Inputs are gathered pixel by pixel; cotangents come from one backward pass an example."""
    make, shape, width = LAYERS[name]
    torch.manual_seed(0)
    model = Pooled(make(), width)
    inputs, labels = normal(3, *shape), torch.tensor([0, 2, 1])
    (watched,) = kronecker_layers(model)
    out, into = recorded(model, watched, inputs, labels)
    seen, summed, gradient = [], torch.zeros(width, width, dtype=torch.float64), 0.0
    for x, y in zip(inputs, labels, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        (cotangent,) = torch.autograd.grad(loss, model.hidden)
        rows = cotangent[0] if cotangent.ndim == 3 else cotangent[0].flatten(1).mT  # (T, width)
        places = x if x.ndim == 2 else patches_of(model.layer, x)
        if model.layer.bias is not None:
            places = torch.cat([places, torch.ones(len(places), 1, dtype=torch.float64)], 1)
        seen.append(places)
        summed += rows.mT @ rows
        gradient = gradient + rows.mT @ places
    seen = torch.cat(seen)
    torch.testing.assert_close(out, summed / 3, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(into, seen.mT @ seen / len(seen), rtol=1e-12, atol=1e-14)
    # places and columns in the order of the weight: their products are its gradient
    bias = None if model.layer.bias is None else model.layer.bias.grad
    torch.testing.assert_close(watched.join(model.layer.weight.grad, bias), gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_joined_matrix_splits_again(name):
    layer = LAYERS[name][0]()
    (watched,) = kronecker_layers(layer)
    weight, bias = watched.split(watched.join(layer.weight, layer.bias))
    assert torch.equal(weight, layer.weight)
    assert (bias is None) == (layer.bias is None)
    assert bias is None or torch.equal(bias, layer.bias)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3, bias=False).double()

    def forward(self, x):
        return self.layer(input=self.layer(x).tanh())


def test_a_layer_that_is_called_twice_counts_both():
    """Once by keyword."""
    model, inputs, labels = Twice(), normal(4, 3), torch.tensor([0, 1, 2, 1])
    out, into = recorded(model, kronecker_layers(model)[0], inputs, labels)
    first = (inputs @ model.layer.weight.mT).tanh()
    last = F.one_hot(labels, 3).double() - (first @ model.layer.weight.mT).softmax(1)
    before = (last @ model.layer.weight) * (1 - first.square())
    torch.testing.assert_close(into, (inputs.mT @ inputs + first.mT @ first).detach() / 8, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out, (last.mT @ last + before.mT @ before).detach() / 4, rtol=1e-12, atol=1e-14)


def test_only_the_pass_that_is_differentiated_counts():
    """Neither one without gradients, nor one whose outputs are thrown away, nor the backward pass of the loss."""
    results = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = KFAC(model, seed=1)
        inputs, labels = normal(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        outputs = model(inputs)
        if disturbed:
            with torch.no_grad():
                model(normal(9, 4, seed=2))
            model(normal(5, 4, seed=3))
        optimizer.backward(F.cross_entropy(outputs, labels), outputs)
        optimizer.step()
        results.append(
            [optimizer.state[model[i].weight][f"{side}_factor"] for i in (0, 2) for side in ("input", "output")]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def adapted(base, **options):
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **options)).double()


def test_dora_s_own_calls_of_a_factor_do_not_count():
    """DoRA sends an identity matrix through A and B to know the norm of the weight: no example, and no gradient."""
    base = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = adapted(base, target_modules=["2"], use_dora=True)
    inputs, labels = normal(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = KFAC(model)
    assert [layer.name.split(".")[-2] for layer in optimizer._layers] == ["lora_A", "lora_B"]
    hidden = base[0](inputs).tanh().detach()
    factor = optimizer._layers[0].weight
    between = (hidden @ factor.mT).detach()
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    optimizer.step()
    for layer, into in zip(optimizer._layers, (hidden, between), strict=True):
        input_factor = optimizer.state[layer.weight]["input_factor"]
        torch.testing.assert_close(input_factor, into.mT @ into / 6, rtol=1e-12, atol=1e-14)
    (magnitude,) = [p for name, p in model.named_parameters() if "magnitude" in name]
    assert set(optimizer.state[magnitude]) == {"diagonal"}


def test_factors_of_adapted_convolutions_are_convolutions():
    base = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    watched = kronecker_layers(adapted(base, target_modules=["0"]))
    assert [(type(layer.module), layer.module.kernel_size) for layer in watched] == [
        (nn.Conv2d, (3, 3)),
        (nn.Conv2d, (1, 1)),
    ]


def test_what_has_no_kronecker_factors():
    """Grouped convolutions, odd paddings, tied weights and biases of frozen weights are left to the diagonal."""
    tied = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(2, 2, 3, groups=2),
            "same": nn.Conv2d(2, 2, 3, padding="same"),
            "circular": nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
            "bias": nn.Linear(2, 2),
            "tied": tied,
            "other": nn.Linear(3, 3),
            "plain": nn.Linear(2, 2),
        }
    )
    model["other"].weight = tied.weight
    model["bias"].weight.requires_grad_(False)
    assert [layer.name for layer in kronecker_layers(model)] == ["plain"]


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0].mean(1))


def test_a_layer_whose_weight_another_module_reads_takes_the_diagonal():
    model, inputs, labels = Attentive().double(), normal(4, 3, 4), torch.tensor([0, 1, 2, 0])
    optimizer = KFAC(model)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    optimizer.step()
    assert set(optimizer.state[model.attention.out_proj.weight]) == {"diagonal"}
    assert "input_factor" in optimizer.state[model.last.weight]
