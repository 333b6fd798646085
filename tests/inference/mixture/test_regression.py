"""A mixture of posteriors for real targets: the likelihood is inferred, and intervals are those of the mixture."""

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.mixture_fit import fit_mixture
from bayes_kf.inference.predictive.targets.target_mixture import TargetMixture

torch.manual_seed(0)
X = torch.randn(160, 3)
Y = X @ torch.randn(3, 1) + 0.3 * torch.randn(160, 1)
LOADER = list(zip(X.split(8), Y.split(8), strict=True))


def network(outputs=1):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def test_float_targets_are_real_numbers():
    posterior = fit_mixture(network(), LOADER, progress=False)
    assert {member.config.likelihood for member in posterior.members} == {"gaussian"}
    prediction = posterior.predict(X)
    assert isinstance(prediction.distribution, TargetMixture)
    lower, upper = prediction.interval(0.9)
    assert float(((lower <= Y) & (upper >= Y)).float().mean()) > 0.8
    loaded = posterior.predict_loader(LOADER)
    torch.testing.assert_close(loaded.quantile(0.9), prediction.quantile(0.9), rtol=1e-4, atol=1e-4)
    assert loaded.target_samples(5).shape == (5, 160, 1)
    with pytest.raises(ValueError, match=r"^`interval` needs the draws of a loader's prediction by 'sampled'"):
        posterior.predict_loader(LOADER, "sampled").interval(0.9)


@pytest.mark.parametrize(
    "settings",
    [
        {"likelihood": "student_t", "noise_variance": "estimated"},
        {"likelihood": "heteroscedastic_gaussian"},
    ],
    ids=str,
)
def test_other_noise(settings):
    outputs = 2 if settings["likelihood"] == "heteroscedastic_gaussian" else 1
    configs = [bkf.KalmanConfig(mean_passes=2, initial_logit_sd=sd, **settings) for sd in (1.0, 3.0)]
    posterior = fit_mixture(network(outputs), LOADER, configs, progress=False)
    prediction = posterior.predict(X, targets=Y)
    assert float((prediction.mean - Y).square().mean()) < 0.3
    assert torch.isfinite(prediction.log_prob).all()
    lower, upper = prediction.interval(0.9)
    assert float(((lower <= Y) & (upper >= Y)).float().mean()) > 0.8
