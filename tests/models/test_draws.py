"""Many adapters at once against one after another."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bayes_kf.models import draws as module
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.draws import outputs_of_draws
from bayes_kf.models.zoo import LeNet5, lora_digits_vit

IDS = torch.tensor([[5, 9, 3, 7, 0, 0], [4, 4, 8, 2, 11, 5]])


def text(**lora):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    setting = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False, **lora}
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(modules_to_save=["classifier"], **setting))


CASES = {
    "vision": (lambda: lora_digits_vit(rank=2), torch.randn(3, 1, 28, 28)),
    "text with a mask": (text, {"input_ids": IDS, "attention_mask": (IDS > 0).long()}),
    "dora": (lambda: text(use_dora=True), {"input_ids": IDS, "attention_mask": (IDS > 0).long()}),
    "convolutions": (LeNet5, torch.randn(3, 1, 28, 28)),
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
    found = outputs_of_draws(adapter, draws, inputs, at_once)
    assert not looped
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapter.vector(), weights)
    assert all(m.training for m in adapter.model.modules())


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
        found = outputs_of_draws(adapter, draws, x)
    assert torch.equal(found, expected)


def test_an_error_that_is_not_about_batching_is_not_swallowed():
    class Broken(nn.Linear):
        def forward(self, x):
            raise TypeError("broken on purpose")

    with pytest.raises(TypeError, match="broken on purpose"):
        outputs_of_draws(AdapterModel(Broken(3, 2)), torch.randn(2, 8), torch.randn(4, 3))


def test_the_loop_says_what_is_wrong_with_the_inputs():
    adapter = AdapterModel(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        outputs_of_draws(adapter, torch.randn(2, 8), torch.randn(4, 5))
