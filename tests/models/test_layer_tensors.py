"""Tensors of PEFT's adapter layers: which they are, and new draws that leave the outputs as they are."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.layer_tensors import layer_tensors, redrawn_factors


def adapter(trained=False, **settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(7, 30), nn.Flatten(), nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 3))
    config = LoraConfig(r=8, target_modules=["0", "2"], modules_to_save=["4"], **settings)
    model = get_peft_model(layers, config)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return AdapterModel(model)


def inputs():
    return torch.randint(7, (5, 2), generator=torch.Generator().manual_seed(1))


def test_the_tensors_of_adapter_layers_are_the_factors():
    names = layer_tensors(adapter())
    assert sorted(name.split("default")[0].split(".")[-2] for name in names) == [
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
    ]
    assert layer_tensors(AdapterModel(nn.Linear(3, 2))) == frozenset()


@pytest.mark.parametrize("initialization", [True, "gaussian"])
def test_factors_without_effect_are_drawn_anew_at_the_same_scale(initialization):
    model = adapter(init_lora_weights=initialization)
    before, after = model.vector(), redrawn_factors(model, torch.Generator().manual_seed(3))
    assert torch.equal(model.vector(), before)
    torch.testing.assert_close(model.outputs(after, inputs()), model.outputs(before, inputs()), rtol=0, atol=0)
    for name, where in model.slices().items():
        if ".lora_A." in name or ".lora_embedding_B." in name:
            old, new = before[where], after[where]
            correlation = torch.corrcoef(torch.stack([old, new]))[0, 1]
            assert abs(float(correlation)) < 4 / len(old) ** 0.5
            error = (2 / len(old)) ** 0.5  # relative, of a mean square of normal draws
            assert float(new.square().mean() / old.square().mean()) == pytest.approx(1.0, abs=4 * error)
        else:
            assert torch.equal(before[where], after[where])


def test_factors_with_an_effect_or_a_chosen_value_stay():
    generator = torch.Generator().manual_seed(3)
    for model in (adapter(trained=True), adapter(init_lora_weights="olora"), AdapterModel(nn.Linear(3, 2))):
        before, after = model.vector(), redrawn_factors(model, generator)
        for name, where in model.slices().items():
            if ".lora_embedding_" not in name:  # those are still without effect
                assert torch.equal(before[where], after[where])
