"""Whether sampled predictions are compared with linearized ones, and when they warn."""

import dataclasses

import pytest
import torch
from small_problems import linear, loader
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.predictive import method_agreement


def nonlinear():
    """A network whose outputs are not linear in its weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_sampled_predictions_that_differ_from_linearized_ones_warn_with_numbers():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
    y = x.argmax(1)
    config = bkf.KalmanConfig(initial_variance=1.0, bound_prior=False, temperature=1.0)
    wide = bkf.fit(nonlinear(), loader(x, y), config, progress=False)
    calls = (
        lambda: wide.predict(x, "sampled"),
        lambda: wide.predict_loader([x[:20], x[20:]], "sampled"),
        lambda: wide.to_arviz(64, loader=[(x, y)]),
    )
    for call in calls:
        with pytest.warns(UserWarning, match=r"disagree: 0\.\d+ total variation apart on 16 exampl") as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]  # the caller's line
    narrow = dataclasses.replace(config, initial_variance=1e-4)
    bkf.fit(nonlinear(), loader(x, y), narrow, progress=False).predict(x, "sampled")  # a warning would be an error


def test_a_mixture_reports_it_too_in_the_callers_file():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
    config = bkf.KalmanConfig(initial_variance=1.0, bound_prior=False, temperature=1.0)
    model = nonlinear()
    one, two, apart = (bkf.fit(m, loader(x, x.argmax(1)), config, progress=False) for m in (model, model, nonlinear()))
    for mixture in (bkf.MixturePosterior((one, two), (0.9, 0.1)), bkf.MixturePosterior((one, apart), (0.9, 0.1))):
        for call in (
            lambda m: m.predict(x, "sampled", 200),
            lambda m: m.predict_loader([x[:20], x[20:]], "sampled", 200),
        ):
            with pytest.warns(UserWarning, match=r"disagree: 0\.\d+ total variation apart on 16 exampl") as caught:
                call(mixture)
            assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical", "poisson"])
def test_linear_models_never_warn(likelihood):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(30, 3, generator=g).double()
    targets = {
        "gaussian": torch.randn(30, 2, generator=g).double(),
        "bernoulli": torch.randint(2, (30, 2), generator=g).double(),
        "categorical": torch.randint(2, (30,), generator=g),
        "poisson": torch.randint(4, (30, 2), generator=g).double(),
    }
    config = bkf.KalmanConfig(likelihood=likelihood, initial_variance=0.3, bound_prior=False, temperature=1.0)
    posterior = bkf.fit(linear(), loader(x, targets[likelihood]), config, progress=False)
    for seed in range(20):
        posterior.predict(x, "sampled", generator=torch.Generator().manual_seed(seed))


def test_fewer_draws_than_outputs_are_not_compared(monkeypatch):
    """Fewer draws than outputs; and of a loader only the first batch is."""
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
    posterior = bkf.fit(linear(12), loader(x, torch.arange(30) % 12), bkf.KalmanConfig(), progress=False)
    calls = []
    monkeypatch.setattr(method_agreement, "prediction_distance", lambda *_: calls.append(1) or (0.0, 1.0))
    posterior.predict(x, "sampled", num_samples=11)
    assert not calls
    posterior.predict_loader([x[:10], x[10:20], x[20:]], "sampled", num_samples=12)
    assert len(calls) == 1
