"""RENG's gradient g + ρHg against dense Hessians in float64, through attention too."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertForSequenceClassification

from bayes_kf.inference.baselines import RENG

TEXTS = {
    "input_ids": torch.tensor([[5, 9, 3, 7], [4, 4, 8, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}
LABELS = torch.tensor([0, 2])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=generator, dtype=torch.float64), torch.randint(3, (7,), generator=generator)


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    lora = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, modules_to_save=["classifier"])
    return get_peft_model(BertForSequenceClassification(config), lora).eval().double()


def penalized(loss_at, model, penalty):
    """g + ρHg of the trained tensors, as one vector, with a dense Hessian."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trained.values()]

    def loss(vector):
        parts = vector.split(sizes)
        return loss_at({name: part.view_as(trained[name]) for name, part in zip(trained, parts, strict=True)})

    at = torch.cat([p.detach().flatten() for p in trained.values()])
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.functional.jacobian(loss, at)
        hessian = torch.autograd.functional.hessian(loss, at)
    assert float(hessian.abs().max()) > 1e-3
    return gradient + penalty * hessian @ gradient


def gradient_vector(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_gradient_of_a_small_network():
    model, (inputs, labels) = mlp(), batch()
    expected = penalized(lambda tensors: F.cross_entropy(functional_call(model, tensors, inputs), labels), model, 0.7)
    optimizer = RENG(model, penalty=0.7)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    torch.testing.assert_close(gradient_vector(model), expected, rtol=1e-10, atol=1e-12)


def test_gradient_through_attention():
    """LoRA on queries and values, called as any model is."""
    model = bert()

    def loss_at(tensors):
        return F.cross_entropy(functional_call(model, tensors, (), TEXTS).logits, LABELS)

    expected = penalized(loss_at, model, 0.5)
    with RENG(model, penalty=0.5) as optimizer:
        outputs = model(**TEXTS).logits
        optimizer.backward(F.cross_entropy(outputs, LABELS), outputs)
    torch.testing.assert_close(gradient_vector(model), expected, rtol=1e-9, atol=1e-12)


def test_gradient_through_attention_by_differences():
    """The same without any second derivative: differences of gradients along the gradient."""
    model = bert()
    optimizer = RENG(model, penalty=0.5)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient():
        outputs = model(**TEXTS).logits
        return torch.autograd.grad(F.cross_entropy(outputs, LABELS), parameters)

    outputs = model(**TEXTS).logits
    optimizer.backward(F.cross_entropy(outputs, LABELS), outputs)
    optimizer.close()  # any attention does for first derivatives
    first, share = gradient(), 1e-5
    ends = []
    for way in (share, -share):
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.add_(way * g)
        ends.append(gradient())
        with torch.no_grad():
            for p, g in zip(parameters, first, strict=True):
                p.sub_(way * g)
    for p, g, ahead, behind in zip(parameters, first, *ends, strict=True):
        expected = g + 0.5 * (ahead - behind) / (2 * share)
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-8)


def test_gradients_add_up():
    model, (inputs, labels) = mlp(), batch()
    optimizer = RENG(model, penalty=0.7)
    total = 0.0
    for part in (slice(0, 4), slice(4, 7)):
        optimizer.zero_grad()
        outputs = model(inputs[part])
        optimizer.backward(F.cross_entropy(outputs, labels[part]), outputs)
        total = total + gradient_vector(model)
    optimizer.zero_grad()
    for part in (slice(0, 4), slice(4, 7)):
        outputs = model(inputs[part])
        optimizer.backward(F.cross_entropy(outputs, labels[part]), outputs)
    torch.testing.assert_close(gradient_vector(model), total, rtol=1e-12, atol=1e-14)


class Attention(nn.Module):
    """Self-attention by torch's own function, and a method besides ``forward``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.last = nn.Linear(4, 12), nn.Linear(4, 3)

    def scores(self, x):
        q, k, v = self.into(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)  # (N, 1, T, 4) each
        return self.last(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    def forward(self, x):
        if x.isnan().any():
            raise ArithmeticError("not a number")
        return self.scores(x)


def test_parts_called_by_themselves_need_the_context():
    """Without it the fused kernel's missing derivative is reported, with what to do."""
    model, x, labels = Attention(), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), LABELS
    optimizer = RENG(model, penalty=0.1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = model.scores(x)
    with pytest.raises(RuntimeError) as caught:
        optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    assert caught.value.__notes__ == ["call parts of the model directly only inside `with optimizer.forward():`"]
    with optimizer.forward():
        outputs = model.scores(x)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    first = gradient_vector(model)
    optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # whatever is asked for outside
        outputs = model(x)
    optimizer.backward(F.cross_entropy(outputs, labels), outputs)
    assert torch.equal(gradient_vector(model), first)


def kernels():
    backends = torch.backends.cuda
    return backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()


def test_kernels_are_given_back():
    """After a pass, after one that raised, and around passes without gradients; nothing is taken with ρ = 0."""
    model, x = Attention(), torch.zeros(2, 5, 4)
    seen, before = [], kernels()
    model.last.register_forward_hook(lambda *_: seen.append(kernels()))
    optimizer = RENG(model, penalty=0.1)
    model(x)
    assert kernels() == before
    with pytest.raises(ArithmeticError):
        model(x * float("nan"))
    assert kernels() == before
    with torch.no_grad():
        model(x)
    optimizer.close()
    model(x)
    RENG(model, penalty=0.0)
    model(x)
    assert seen == [(False, False, False), before, before, before]
    assert any(before)  # a fast kernel was allowed before, so that putting it back says something
