"""Torch's encoder layers: eval mode must not ignore adapters."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.adapter import AdapterModel


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
    return get_peft_model(Encoder(), lora)


def test_outputs_and_jacobian_are_those_of_the_adapted_layers(adapted):
    """Training mode, whose path is the plain one, is the reference: without dropout it computes the same."""
    x = torch.randn(2, 5, 8)
    adapter = AdapterModel(adapted.train())
    at = adapter.vector()
    expected = adapted(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda v: adapter.call(adapter.tensors(v), x), at)
    torch.testing.assert_close(adapter.outputs(at, x), expected)
    torch.testing.assert_close(Linearizer(adapter)(at, x).jacobian().dense(), jacobian)
    assert bool((jacobian.abs().amax((0, 1)) > 0).all())  # every number of every factor matters
    adapted.eval()
    assert torch.backends.mha.get_fastpath_enabled()  # it is as it was
    assert not torch.allclose(adapted(x), expected, atol=1e-3)  # what the fused path makes of the same weights


def test_the_switch_stays_off_until_the_last_thread_has_left(adapted):
    """Of two models, since threads on one take turns; the switch is one for all."""
    adapters = AdapterModel(adapted), AdapterModel(copy.deepcopy(adapted))
    entered, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def stay(number):
        with adapters[number].eval_mode():
            entered.wait(5)
            leave[number].wait(5)

    threads = [threading.Thread(target=stay, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    entered.wait(5)
    leave[0].set()
    threads[0].join(5)
    assert not torch.backends.mha.get_fastpath_enabled()
    leave[1].set()
    threads[1].join(5)
    assert torch.backends.mha.get_fastpath_enabled()
