"""Many adapters at once against one after another."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bayes_kf.models import batched_forward as module
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batched_forward import finite_difference_jvps, outputs_of_draws
from bayes_kf.models.zoo import LeNet5, lora_digits_vit

IDS = torch.tensor([[5, 9, 3, 7, 0, 0], [4, 4, 8, 2, 11, 5]])


def text(**lora):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    setting = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False, **lora}
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(modules_to_save=["classifier"], **setting))


IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
CASES = {
    "vision": (lambda: lora_digits_vit(rank=2), IMAGES),
    "text with a mask": (text, {"input_ids": IDS, "attention_mask": (IDS > 0).long()}),
    "dora": (lambda: text(use_dora=True), {"input_ids": IDS, "attention_mask": (IDS > 0).long()}),
    "convolutions": (LeNet5, IMAGES),
}


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_over_all_adapters_is_the_loop(case, at_once, monkeypatch):
    make, inputs = CASES[case]
    adapter = AdapterModel(make().train())
    generator = torch.Generator().manual_seed(1)
    draws = adapter.vector() + 0.1 * torch.randn(5, adapter.num_parameters, generator=generator)
    expected = torch.stack([adapter.outputs(draw, inputs) for draw in draws])
    weights = adapter.vector()
    looped = []
    monkeypatch.setattr(AdapterModel, "outputs", lambda *args: looped.append(args))
    actual = outputs_of_draws(adapter, draws, inputs, at_once)
    assert not looped
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapter.vector(), weights)
    assert all(m.training for m in adapter.model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("case", CASES)
def test_finite_difference_jvps_are_the_jacobian_times_the_steps(case, dtype, tolerance):
    """Against the dense Jacobian in float64, as a share of the largest response.

    In float32 the network of ReLU and max pooling crosses kinks within the share of a step, which is no rounding:
    there the answer is the difference of float64 outputs over the same way.
    """
    make, inputs = CASES[case]
    exact = AdapterModel(make().double())
    double = inputs.double() if isinstance(inputs, torch.Tensor) else inputs
    at = exact.vector()
    steps = 0.02 * torch.randn(5, exact.num_parameters, generator=torch.Generator().manual_seed(1)).double()
    if dtype == torch.float32 and case == "convolutions":
        share = module.STEP_SHARE[dtype]
        ends = torch.stack([exact.outputs(at + share * step, double) for step in steps])
        expected = (ends - exact.outputs(at, double)) / share
    else:
        with exact.eval_mode():
            jacobian = torch.autograd.functional.jacobian(lambda v: exact.call(exact.tensors(v), double), at)
        expected = torch.einsum("bmn,sn->sbm", jacobian, steps)
    adapter = AdapterModel(make().to(dtype))
    assert adapter.is_precise
    given = double.to(dtype) if isinstance(inputs, torch.Tensor) else inputs
    actual = finite_difference_jvps(adapter, at.to(dtype), steps.to(dtype), given, at_once=3)
    missed = float((actual.double() - expected).abs().max() / expected.abs().max())
    if dtype == torch.float64 and case == "dora":
        tolerance = 5e-3  # the norm of its weight has no gradient in PEFT
    assert missed < tolerance


def test_half_precision_is_not_precise():
    adapter = AdapterModel(nn.Sequential(nn.Linear(3, 4).to(torch.bfloat16), nn.Linear(4, 2)))
    assert not adapter.is_precise
    adapter = AdapterModel(nn.Linear(3, 2))
    assert adapter.is_precise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not adapter.is_precise
        with adapter.full_precision():  # its forward passes are rounded still
            assert not adapter.is_precise


def test_casts_are_not_cached_inside_the_callers_autocast():
    """Else the cast weights of every update would stay until the caller leaves autocast."""

    class Looking(nn.Linear):
        def forward(self, x):
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
            return super().forward(x)

    seen: list[tuple[bool, bool]] = []
    adapter = AdapterModel(Looking(3, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with adapter.full_precision():
            adapter.outputs(adapter.vector(), torch.ones(1, 3))
        adapter.model(torch.ones(1, 3))
    assert seen == [(True, False), (True, True)]


def test_a_model_that_cannot_be_batched_is_run_one_by_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            y = self.fc(x)
            return y if float(y.sum()) > 0 else -y

    adapter, x = AdapterModel(Branching()), torch.randn(4, 3)
    draws = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        module._batched(adapter, draws, x, None)
    expected = torch.stack([adapter.outputs(draw, x) for draw in draws])
    with pytest.warns(UserWarning, match="6 draws were run one by one, not at once: .*vmap"):
        actual = outputs_of_draws(adapter, draws, x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_draws_that_do_not_fit_the_memory_together_are_run_one_by_one(kind, monkeypatch):
    adapter, x = AdapterModel(nn.Linear(3, 2)), torch.randn(4, 3)
    draws = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([adapter.outputs(draw, x) for draw in draws])

    def full(*_):
        raise kind("out of memory")

    monkeypatch.setattr(module, "_batched", full)
    with pytest.warns(UserWarning, match="6 draws were run one by one, not at once: out of memory"):
        assert torch.equal(outputs_of_draws(adapter, draws, x), expected)


def test_an_error_that_is_not_about_batching_is_not_swallowed():
    class Broken(nn.Linear):
        def forward(self, x):
            raise TypeError("broken on purpose")

    with pytest.raises(TypeError, match="broken on purpose"):
        outputs_of_draws(AdapterModel(Broken(3, 2)), torch.randn(2, 8), torch.randn(4, 3))


def test_the_loop_raises_the_error_of_invalid_inputs():
    adapter = AdapterModel(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        outputs_of_draws(adapter, torch.randn(2, 8), torch.randn(4, 5))
