"""Everything that a posterior can do, with ordered classes."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

import bayes_kf as bkf
from bayes_kf.models import Ordinal, OrdinalHead

SIZE, CLASSES, PRIOR = 96, 4, 0.5


def model():
    torch.manual_seed(1)
    return OrdinalHead(nn.Linear(3, 1, bias=False).double(), CLASSES)


def problem():
    """Classes between cutpoints of a linear score with logistic noise, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, 3, generator=generator).double()
    noise = torch.rand(SIZE, generator=generator).double().logit()
    score = x @ torch.tensor([2.0, -1.0, 0.0]).double() + noise
    return x, torch.bucketize(score, torch.tensor([-1.5, 0.0, 2.0]).double())


def loader(x, y, size=8):
    return list(zip(x.split(size), y.split(size), strict=True))


def config(**settings):
    common = {"likelihood": "ordinal", "covariance": "full", "initial_variance": PRIOR, "temperature": 1.0}
    return bkf.KalmanConfig(**(common | {"bound_prior": False} | settings))


def test_passes_end_at_the_mode_with_the_information_of_all_examples():
    """Against L-BFGS on −log p(y, θ) in float64, and a dense sum of J Fisher information Jᵀ there."""
    x, y = problem()
    posterior = bkf.fit(model(), loader(x, y), config(passes=12), progress=False)
    head = model()
    parameters = [tensor for tensor in head.parameters() if tensor.requires_grad]
    start = torch.cat([tensor.detach().flatten() for tensor in parameters])
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        theta = torch.cat([tensor.flatten() for tensor in parameters])
        loss = -Ordinal().log_prob(head(x), y).sum() + (theta - start).square().sum() / (2.0 * PRIOR)
        loss.backward()
        return loss

    optimizer.step(objective)
    mode = torch.cat([tensor.detach().flatten() for tensor in parameters])
    torch.testing.assert_close(posterior.mean_vector, mode, rtol=1e-4, atol=1e-4)
    outputs = head(x).detach()
    jacobian = torch.zeros(SIZE, CLASSES - 1, 6).double()
    jacobian[:, 0, :3] = -x
    jacobian[:, :, 3:] = torch.eye(3)
    factor, _ = Ordinal().whiten(outputs, y)
    rows = (factor @ jacobian).flatten(0, 1)
    expected = rows.mT @ rows + torch.eye(6).double() / PRIOR
    torch.testing.assert_close(posterior.covariance_matrix().inverse(), expected, rtol=1e-3, atol=1e-3)


def test_a_stream_learns_scores_and_cutpoints():
    x, y = problem()
    posterior = bkf.fit(model(), loader(x, y), config(), progress=False)
    cutpoints = model().cutpoints(posterior.mean["ordered.bias"])
    assert bool((cutpoints.diff() > 0).all())
    weights = posterior.mean["model.weight"].flatten()
    assert float(weights[0]) > 1.0
    assert float(weights[1]) < -0.3
    assert float(posterior.history["log_loss"].mean()) < math.log(CLASSES)
    assert "correct" in posterior.history


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_penalty": 0.1},
        {"gate_quantile": 0.99},
        {"forgetting": 0.99, "drift_variance": 1e-4},
        {"mean_passes": 2},
        {"temperature": "prequential"},
        {"covariance": "low_rank"},
        {"covariance": "diagonal"},
        {"initial_variance": None},
    ],
    ids=str,
)
def test_settings_that_other_likelihoods_take(settings):
    x, y = problem()
    posterior = bkf.fit(model(), loader(x, y), config(**settings), progress=False)
    losses = -posterior.predict(x, targets=y).log_prob
    assert float(losses.mean()) < 1.2  # ln 4 is 1.39


def test_predictions_are_averages_of_class_probabilities():
    """Against 200,000 draws of the outputs."""
    x, y = problem()
    posterior = bkf.fit(model(), loader(x, y), config(), progress=False)
    prediction = posterior.predict(x[:6], num_samples=4000, targets=y[:6])
    linearized = posterior.kf.linearize(posterior.mean_vector, x[:6])
    cov = posterior.state.belief.output_covariance(linearized.jacobian())
    torch.manual_seed(0)
    eta = torch.distributions.MultivariateNormal(linearized.outputs, cov).sample((200_000,))
    probs = Ordinal().mean(eta)
    error = 5.0 * probs.std(0) * (1 / 4000 + 1 / 200_000) ** 0.5
    assert bool(((prediction.probs - probs.mean(0)).abs() <= error).all())
    assert prediction.probs.shape == (6, CLASSES)
    torch.testing.assert_close(prediction.probs.sum(1), torch.ones(6).double())
    torch.testing.assert_close(prediction.entropy, torch.special.entr(prediction.probs).sum(1))
    assert bool((prediction.epistemic > 0).all())
    torch.testing.assert_close(prediction.log_prob, prediction.probs.gather(1, y[:6, None]).log().squeeze(1))
    sampled = posterior.predict(x[:6], "sampled", num_samples=4000)
    assert bool(((sampled.probs - probs.mean(0)).abs() <= error).all())
    at_mean = posterior.predict(x[:6], "mean")
    torch.testing.assert_close(at_mean.probs, Ordinal().mean(linearized.outputs.detach()))


def test_the_posterior_is_saved_calibrated_exported_and_reported(tmp_path):
    x, y = problem()
    posterior = bkf.fit(model(), loader(x[:64], y[:64]), config(temperature="prequential"), progress=False)
    posterior.save_pretrained(tmp_path)
    opened = bkf.Posterior.from_pretrained(tmp_path, model())
    torch.testing.assert_close(opened.predict(x).probs, posterior.predict(x).probs)
    calibrated = posterior.calibrate(loader(x[64:], y[64:]))
    assert "size" in calibrated.history
    assert "sharpness" not in calibrated.history
    report = bkf.evaluate(calibrated, loader(x[64:], y[64:]), num_simulations=39)
    prediction = calibrated.predict(x[64:], targets=y[64:])
    assert report.scores["accuracy"] == pytest.approx(float((prediction.probs.argmax(1) == y[64:]).double().mean()))
    assert report.scores["nll"] == pytest.approx(-float(prediction.log_prob.mean()), rel=1e-6)
    assert any("rps" in name or "ranked" in name for name in report.scores)
    data = posterior.to_arviz(40, loader=loader(x, y))
    assert data.posterior_predictive["target"].shape == (2, 20, SIZE)
    assert set(np.unique(data.posterior_predictive["target"])) <= set(range(CLASSES))
    bank = bkf.Bank(model(), [config(initial_variance=v, temperature="prequential") for v in (0.1, 0.5)])
    state = bank.init(x)
    for some, targets in loader(x, y):
        state, _ = bank.update(state, some, targets)
    assert bank.predict(state, x, y).probs.shape == (SIZE, CLASSES)


def test_a_mixture_of_several_fits():
    x, y = problem()
    mixture = bkf.fit_mixture(model(), loader(x, y), [config(mean_passes=1), config(seed=1, mean_passes=1)],
                              progress=False)  # fmt: skip
    assert mixture.predict(x).probs.shape == (SIZE, CLASSES)
    assert float(-mixture.predict(x, targets=y).log_prob.mean()) < 1.2


def test_pyro_stays_near_the_posterior():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, y = problem()
    posterior = bkf.fit(model(), loader(x, y), config(mean_passes=2), progress=False)
    guide = posterior.guide()
    svi = SVI(posterior.pyro_model, guide, Adam({"lr": 0.003}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    losses = [svi.step(x, y) for _ in range(100)]
    assert np.mean(losses[-30:]) < np.mean(losses[:30]) + 1.0


def test_what_does_not_apply_is_refused():
    with pytest.raises(ValueError, match=r"^`noise` must be 'exponential_family' for `likelihood` 'ordinal'"):
        config(noise="identity")
    with pytest.raises(ValueError, match=r"^`expansion` must be 'mode' for `likelihood` 'ordinal'"):
        config(expansion="mean")
    with pytest.raises(ValueError, match=r"^`curvature` 'sampled' needs `likelihood` 'categorical'"):
        config(curvature="sampled")
    x, y = problem()
    kf = bkf.KalmanFilter(model(), config())
    posterior = kf.posterior(kf.init())
    with pytest.raises(ValueError, match="`method` 'probit' has no closed form for ordered classes"):
        posterior.predict(x, "probit")
    with pytest.raises(ValueError, match=r"`targets` must lie in 0\.\.3 for 3 outputs, got 0\.\.4"):
        kf.update(kf.init(), x, y + (y == 3))
