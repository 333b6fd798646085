"""``initial_spread`` "bounded": adapter layers change the outputs by at most their own size."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf import KalmanConfig, KalmanFilter
from bayes_kf.models.prior.layer_tensors import layer_tensors


class ShortFeatures(nn.Module):
    """A classifier on features of a given length."""

    def __init__(self, length, zero=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.length = nn.Linear(20, 30), nn.Linear(30, 4, bias=False), length
        nn.init.normal_(self.head.weight, std=0.0 if zero else 0.02)

    def forward(self, x):
        return self.head(self.length * nn.functional.normalize(self.body(x), dim=1))


def prior(length, zero=False, spread="bounded"):
    config = LoraConfig(r=4, target_modules=["body"], modules_to_save=["head"])
    kf = KalmanFilter(
        get_peft_model(ShortFeatures(length, zero), config),
        KalmanConfig(initial_spread=spread, initial_logit_sd=10.0, curvature="exact"),
    )
    x = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))
    state = kf.init(x)
    sd = {name: state.prior.variance[where].sqrt() for name, where in kf.adapter.slices().items()}
    return kf, x, sd, layer_tensors(kf.adapter)


def test_the_adapter_changes_the_outputs_by_their_own_size():
    kf, x, sd, layers = prior(length=1.0)
    mean = kf.adapter.vector()
    step = torch.cat([sd[name] if name in layers else 0 * sd[name] for name in kf.adapter.names])
    generator = torch.Generator().manual_seed(0)
    start = kf.adapter.outputs(mean, x)
    signs = torch.randn(400, len(mean), generator=generator)
    changes = [(kf.adapter.outputs(mean + 1e-3 * step * s, x) - start) / 1e-3 for s in signs]  # to first order
    size = (start - start.mean(1, keepdim=True)).square().mean().sqrt()
    assert float(torch.stack(changes).square().mean().sqrt() / size) == pytest.approx(1.0, abs=0.1)
    (head,) = {float(sd[name][0]) for name in sd if name not in layers}
    for name in layers:
        assert (sd[name] < head).all()


def test_features_that_are_long_enough_have_one_variance():
    for spread in ("bounded", "constant"):
        _, _, sd, _ = prior(length=300.0, spread=spread)
        values = torch.cat(list(sd.values()))
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-6, atol=0)


def test_behind_a_head_of_zeros_the_adapter_keeps_the_scale_of_its_initial_values():
    kf, _, sd, layers = prior(length=1.0, zero=True)
    values = torch.cat([kf.adapter.vector()[kf.adapter.slices()[name]] for name in layers if "lora_A" in name])
    for name in layers:
        torch.testing.assert_close(sd[name], values.square().mean().sqrt().expand_as(sd[name]))


def test_a_given_mean_is_the_mean_of_the_prior():
    kf, x, _, _ = prior(length=1.0)
    mean = kf.adapter.vector() + 0.1
    state = kf.init(x, mean)
    assert torch.equal(state.prior.mean, mean)
    assert torch.equal(state.belief.mean, mean)
    assert not torch.equal(state.prior.variance, kf.init(x).prior.variance)  # measured there
