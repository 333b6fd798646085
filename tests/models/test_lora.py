"""The bound on a prior variance of LoRA factors, against draws of the weights themselves."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf.inference import KalmanConfig, KalmanFilter
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.lora import LARGEST_CHANGE, largest_variances


def model(init=True, **lora):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init, **lora))


def test_a_factor_at_its_bound_changes_the_weight_as_far_as_it_says():
    adapter = AdapterModel(model(init=False))
    bounds = largest_variances(adapter)
    assert sorted(name.split(".")[-3] for name in bounds) == ["lora_A", "lora_B"]
    layer = adapter.model.base_model.model[0]
    weight, factors = layer.get_base_layer().weight, {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    for name, variance in bounds.items():
        own = name.split(".")[-3]
        squares = []
        for _ in range(400):
            drawn = {k: f["default"].weight.detach() for k, f in factors.items()}
            drawn[own] = variance**0.5 * torch.randn_like(drawn[own])
            squares.append((layer.scaling["default"] * drawn["lora_B"] @ drawn["lora_A"]).square().mean())
        squares = torch.stack(squares)
        expected = float(LARGEST_CHANGE**2 * weight.detach().square().mean())
        assert float((squares.mean() - expected).abs()) < 5 * float(squares.std()) / 20


def test_factors_without_effect_and_other_tensors_have_no_bound():
    adapter = AdapterModel(model(modules_to_save=["2"]))
    assert [name.split(".")[-3] for name in largest_variances(adapter)] == ["lora_B"]
    assert largest_variances(AdapterModel(nn.Linear(3, 2))) == {}
    convolution = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 8, 3)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    assert len(largest_variances(AdapterModel(convolution))) == 2


@pytest.mark.parametrize(("spread", "bounded"), [("modules", True), ("tensors", False), ("constant", False)])
def test_the_default_prior_is_bounded_behind_a_head_that_sees_little(spread, bounded):
    network = model(modules_to_save=["2"])
    head = next(m for n, m in network.named_modules() if n.endswith("modules_to_save.default"))
    head.weight.data.mul_(1e-4)
    kf = KalmanFilter(network, KalmanConfig(initial_spread=spread))
    prior = kf.adapter.unflatten(kf.init(torch.randn(16, 30)).prior.variance)
    name, most = next(iter(largest_variances(kf.adapter).items()))
    if spread != "constant":
        assert (float(prior[name].max()) <= most * (1 + 1e-6)) is bounded


def test_adapters_merged_into_the_base_are_refused():
    """They have no say in the outputs: a filter would learn nothing, without a word."""
    network = model(init=False)
    network.merge_adapter()
    with pytest.raises(ValueError, match=r"`model` must have its adapters apart from the base, got one merged into"):
        AdapterModel(network)
    network.unmerge_adapter()
    assert AdapterModel(network).num_parameters > 0
