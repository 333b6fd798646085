"""The width of drawn adapters that held-out data allow."""

import language_models as lm
import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.models.language import SupervisedTokens
from bayes_kf.models.likelihoods.tokens import COUNT, LOG_PROB
from bayes_kf.serving import draw_width


def test_the_width_of_a_linear_regression_is_that_of_its_closed_form():
    """A draw's excess loss is w² Σ_x J P Jᵀ z z / 2σ², a multiple of w² for given draws."""
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]]) + 0.5 * torch.randn(60, 1)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=0.25, covariance="full", curvature="exact")
    posterior = bkf.fit(nn.Linear(3, 1, bias=False), [(x[:20], y[:20])], config, progress=False)
    held_out = [(x[20:], y[20:])]
    draws, mean = posterior.sample(8), posterior.mean_vector
    squares = ((y[20:] - x[20:] @ draws.T.double().to(x)) ** 2).mean(0), ((y[20:, 0] - x[20:] @ mean) ** 2).mean()

    def excess(width):
        each = y[20:] - x[20:] @ (mean + width * (draws - mean)).T
        return float(((each**2).mean(0) - squares[1]).mean() / 0.5)

    actual = draw_width(posterior, held_out, most=0.01)
    assert excess(actual) <= 0.01 < excess(1.06 * actual)
    assert draw_width(posterior, held_out, most=100.0) == 1.0


def test_text_of_drawn_adapters_loses_no_more_than_was_allowed():
    model = lm.lora()
    posterior = lm.posterior_around(model, 0.3).with_adapter(SupervisedTokens(model))
    text = lm.english()[5000:5480].view(12, 40)
    batches = [{"input_ids": part, "labels": part} for part in text.split(4)]

    def loss(vector):
        outputs = torch.cat([posterior.adapter.outputs(vector, batch) for batch in batches])
        return -float(outputs[:, LOG_PROB].sum() / outputs[:, COUNT].sum())

    width = draw_width(posterior, batches, most=0.05)
    assert 0.001 < width < 1.0
    at_mean = loss(posterior.mean_vector)
    excess = sum(loss(draw) for draw in posterior.sample(8, width=width)) / 8 - at_mean
    assert 0.0 < excess <= 0.05
    wide = sum(loss(draw) for draw in posterior.sample(8, width=1.1 * width)) / 8 - at_mean
    assert wide > 0.05


def test_draws_of_a_mixture_are_compared_with_their_members():
    one, other = lm.posterior_around(lm.lora(), 0.3), lm.posterior_around(lm.lora(seed=1), 0.3)
    mixture = bkf.MixturePosterior((one, other), (0.5, 0.5))
    ids = lm.english()[:160].view(8, 20)
    last = torch.full((8,), 18)
    width = draw_width(mixture, [{"input_ids": ids, "place": last, "labels": ids[:, -1]}], most=0.05)
    assert 0.001 <= width <= 1.0
    draws, centres = mixture.sample(4, width=0.5), mixture.sample(4, width=0.0)
    whole = mixture.sample(4)
    torch.testing.assert_close(draws, centres + 0.5 * (whole - centres), rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    posterior = lm.posterior_around(lm.lora(), 0.1)
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="`most` must be above 0 nats, got 0"):
        draw_width(posterior, [{"input_ids": ids, "labels": ids[:, 0]}], most=0)
    with pytest.raises(ValueError, match="`loader` must yield batches, got none"):
        draw_width(posterior, [])
    with pytest.raises(ValueError, match="`loader` must yield batches with targets"):
        draw_width(posterior, [{"input_ids": ids}])
    with pytest.raises(ValueError, match="`num_samples` must be a whole number >= 1, got 0"):
        draw_width(posterior, [{"input_ids": ids, "labels": ids[:, 0]}], num_samples=0)
