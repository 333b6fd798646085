"""Predictions by every method: exact on linear models, equal across batches, independent of memory."""

import dataclasses
import math

import pytest
import torch
from oracles import against_the_rest, linear_posterior
from small_problems import EXACT, X, Y, in_batches, linear, loader, many
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf import evaluation
from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch


@pytest.mark.parametrize("method", ["linearized", "probit"])
def test_gaussian_predictions_are_exact(method):
    posterior = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT, noise_variance=0.5), progress=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double()
    y = torch.randn(5, 2, generator=torch.Generator().manual_seed(4)).double()
    _, covariance = linear_posterior(X, Y[:, 0], torch.zeros(3).double(), torch.eye(3).double(), 0.5)
    spread = torch.einsum("bi,ij,bj->b", x, covariance, x)
    prediction = posterior.predict(x, method, targets=y)
    torch.testing.assert_close(prediction.epistemic, spread[:, None].expand(5, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.aleatoric, torch.full((5, 2), 0.5).double())
    torch.testing.assert_close(prediction.variance, prediction.epistemic + 0.5)
    normal = torch.distributions.Normal(x @ posterior.mean["weight"].T, prediction.variance.sqrt())
    torch.testing.assert_close(prediction.log_prob, normal.log_prob(y).sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.entropy, normal.entropy().sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_sampled_and_linearized_agree_on_a_linear_model(covariance, temperature):
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    config = bkf.KalmanConfig(covariance=covariance, initial_variance=1.0, temperature=temperature)
    posterior = bkf.fit(linear(3), loader(y=labels), config, progress=False)
    count, x = 20_000, X[:4]
    a, b = (posterior.predict(x, method, num_samples=count) for method in ("linearized", "sampled"))
    error = (a.samples.var(0) / count + b.samples.var(0) / count).sqrt()
    assert ((a.probs - b.probs).abs() < 5 * error).all()
    assert (a.epistemic - b.epistemic).abs().max() < 0.01
    probit = posterior.predict(x, "probit")
    assert (probit.probs - a.probs).abs().max() < 0.03
    assert probit.samples is None


def test_entropies_add_up_and_the_mean_has_no_epistemic_part(fitted, digits):
    images = digits[1].images[:50]
    drawn, mean = fitted.predict(images), fitted.predict(images, "mean")
    torch.testing.assert_close(drawn.aleatoric + drawn.epistemic, drawn.entropy)
    assert (drawn.epistemic > -1e-6).all()
    assert mean.epistemic is None
    torch.testing.assert_close(mean.probs, fitted.adapter.outputs(fitted.mean_vector, images).softmax(-1))
    torch.testing.assert_close(drawn.probs.sum(-1), torch.ones(50))


def test_predictions_repeat_and_follow_the_generator(fitted, digits):
    images = digits[1].images[:5]
    assert torch.equal(fitted.predict(images).probs, fitted.predict(images).probs)
    seeds = [fitted.predict(images, generator=torch.Generator().manual_seed(s)).samples for s in (1, 1, 2)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_predict_loader_joins_batches_in_order(fitted, digits):
    held_out = digits[1]
    data = DataLoader(TensorDataset(held_out.images[:30], held_out.labels[:30]), batch_size=7)
    joined = fitted.predict_loader(data, "mean")
    torch.testing.assert_close(joined.probs, fitted.predict(held_out.images[:30], "mean").probs, rtol=1e-4, atol=1e-6)
    assert torch.equal(joined.targets, held_out.labels[:30])
    assert joined.samples is None
    assert fitted.predict_loader(data, num_samples=3, keep_samples=True).samples.shape == (3, 30, 10)
    with pytest.raises(ValueError, match=r"^`loader` must yield at least one batch, got none\.$"):
        fitted.predict_loader([])


BAD_CALLS = [
    ({"method": "guess"}, r"`method` must be one of linearized, probit, sampled, mean, got 'guess'"),
    ({"num_samples": 0}, r"`num_samples` must be a whole number >= 1, got 0"),
    ({"targets": torch.tensor([10, 0])}, r"`targets` must lie in 0\.\.9"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS)
def test_bad_predictions(fitted, options, message):
    with pytest.raises(ValueError, match=message):
        fitted.predict(torch.zeros(2, 1, 28, 28), **options)
    with pytest.raises(ValueError, match=r"`inputs` must be finite"):
        fitted.predict(torch.full((2, 1, 28, 28), math.nan))


def test_bernoulli_and_poisson_end_to_end():
    torch.manual_seed(0)
    weight = torch.randn(3, 2).double()
    x = torch.randn(400, 3).double()
    targets = {
        "bernoulli": torch.bernoulli((x @ weight).sigmoid()),
        "poisson": torch.poisson((0.5 * x @ weight).exp()),
    }
    for name, y in targets.items():
        config = bkf.KalmanConfig(likelihood=name, covariance="full", initial_variance=1.0)
        posterior = bkf.fit(linear(), loader(x[:300], y[:300], 5), config, progress=False)
        fitted = posterior.predict(x[300:], targets=y[300:])
        prior = bkf.Posterior(posterior.kf, posterior.kf.init()).predict(x[300:], targets=y[300:])
        assert fitted.log_prob.mean() > prior.log_prob.mean() + 0.1
        truth = weight.T if name == "bernoulli" else 0.5 * weight.T
        sd = posterior.variance["weight"].sqrt()
        assert ((posterior.mean["weight"] - truth).abs() < 5 * sd).all()
    with pytest.raises(ValueError, match="`method` 'probit' has no closed form for counts"):
        posterior.predict(x, "probit")


def test_entropy_of_correlated_outputs_is_that_of_the_joint():
    posterior = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT, noise_variance=0.5), progress=False)
    x = X[:3]
    jacobian = posterior.kf.linearize(posterior.mean_vector, x).jacobian().dense()
    total = jacobian @ posterior.covariance_matrix() @ jacobian.mT + 0.5 * torch.eye(2).double()
    expected = 0.5 * torch.logdet(2 * math.pi * math.e * total)
    torch.testing.assert_close(posterior.predict(x).entropy, expected, rtol=1e-9, atol=1e-9)


def test_linearized_predictions_from_parameter_draws_have_the_exact_moments(monkeypatch):
    """Means and entropies over 80 x 60 draws against 20,000 from the exact moments, in standard errors."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=g).double()
    y = torch.randint(90, (30,), generator=g)
    posterior = bkf.fit(many(), loader(x, y), bkf.KalmanConfig(temperature=1.0), progress=False)
    exact = posterior.predict(x[:4], num_samples=20_000)
    monkeypatch.setattr(LinearizedBatch, "jacobian", None)
    actual = [
        posterior.predict(x[:4], num_samples=60, generator=torch.Generator().manual_seed(seed), targets=y[:4])
        for seed in range(80)
    ]
    for of in (lambda p: p.probs, lambda p: p.samples.square().mean(0)):
        runs = torch.stack([of(p) for p in actual])
        error = runs.std(0) / len(runs) ** 0.5
        assert float(((runs.mean(0) - of(exact)).abs() / (error + exact.samples.std(0) / 20_000**0.5)).max()) < 4.5
    assert actual[0].samples.shape == (60, 4, 90)
    torch.testing.assert_close(actual[0].log_prob, actual[0].probs[torch.arange(4), y[:4]].log())


def test_draws_of_very_many_outputs_do_not_form_their_covariance(monkeypatch):
    """A last layer of few features, so that its rows would take few passes: moments of 200 x 64 draws against exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 501)).double()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g).double(), torch.randint(501, (12,), generator=g)
    settings = bkf.KalmanConfig(covariance="diagonal", curvature="truncated", temperature=1.0)
    posterior = bkf.fit(model, loader(x, y), settings, progress=False)
    exact = posterior.predict(x[:2], method="probit")  # by the covariance
    linearized = posterior.kf.linearize(posterior.mean_vector, x[:2])
    covariance = posterior.state.belief.output_covariance(linearized.jacobian())
    torch.testing.assert_close(exact.probs, against_the_rest(linearized.outputs, covariance))
    monkeypatch.setattr(type(linearized), "jacobian", None)
    actual = torch.cat(
        [posterior.predict(x[:2], generator=torch.Generator().manual_seed(seed)).samples.log() for seed in range(200)]
    )
    centred = actual - actual[..., :1]  # log odds against the first class
    variance = covariance.diagonal(dim1=1, dim2=2)
    truth = variance + variance[:, :1] - 2 * covariance[:, :, 0]
    error = truth * (2 / (len(actual) / 2)) ** 0.5  # draws come in pairs
    assert float(((centred.var(0) - truth).abs() / error.clamp_min(1e-12))[:, 1:].max()) < 4.5


@pytest.mark.filterwarnings("ignore:`method` 'sampled' and 'linearized' disagree")
@pytest.mark.parametrize("settings", [{}, {"method": "sampled", "num_samples": 12}])
def test_predictions_of_a_loader_do_not_depend_on_its_batches(fitted, digits, settings):
    whole, *divided = [
        fitted.predict_loader(in_batches(size, digits[1]), keep_samples=True, **settings) for size in (30, 1, 7)
    ]
    for actual in divided:
        torch.testing.assert_close(actual.samples, whole.samples, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(actual.probs, whole.probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual.log_prob, whole.log_prob, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual.epistemic, whole.epistemic, rtol=1e-3, atol=1e-5)
    noise = whole.samples.var(0).mean()
    assert noise > 1e-4  # there are draws to differ by


@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_predictions_from_drawn_adapters_do_not_depend_on_batches(method):
    """More outputs than draws: linearized predictions are by differences; in float64 these are exact to rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 5).double(), torch.randint(12, (20,))
    config = bkf.KalmanConfig(covariance="full", temperature=1.0)
    posterior = bkf.fit(nn.Sequential(nn.Linear(5, 12)).double(), [(x, y)], config, progress=False)
    actual = [
        posterior.predict_loader(list(zip(x.split(size), y.split(size), strict=True)), method, 8, keep_samples=True)
        for size in (20, 1, 7)
    ]
    for other in actual[1:]:
        torch.testing.assert_close(other.samples, actual[0].samples, rtol=1e-6, atol=1e-6)
    expected = posterior.predict(x, method, 8)
    torch.testing.assert_close(actual[0].samples, expected.samples, rtol=1e-6, atol=1e-6)


def test_predictions_do_not_depend_on_the_chunks_that_fit_in_memory(fitted, digits):
    images = digits[1].images[:20]
    small = dataclasses.replace(fitted.config, bytes_budget=1)
    pieces = bkf.Posterior(bkf.KalmanFilter(fitted.adapter, small), fitted.state)
    assert len(list(pieces.kf.linearize.chunks(pieces.mean_vector, images))) == 20
    actual, expected = pieces.predict(images), fitted.predict(images)
    torch.testing.assert_close(actual.samples, expected.samples, rtol=1e-3, atol=1e-4)


def test_draws_of_different_examples_are_independent(fitted, digits):
    """Draws of one image, repeated, are independent: averages over examples have the error of independent draws."""
    images = digits[1].images[:1].expand(40, -1, -1, -1)
    samples = fitted.predict(images, num_samples=200).samples.double().log()
    correlation = torch.corrcoef((samples[..., 0] - samples[..., 1]).T)  # log odds, which are Gaussian
    off = correlation[~torch.eye(40, dtype=torch.bool)]
    assert off.abs().max() < 6 / 200**0.5
    assert abs(off.mean()) < 5 / (200 * 780) ** 0.5


def test_scores_of_a_report_do_not_depend_on_the_batch_size(fitted, digits):
    actual = [
        evaluation.evaluate(fitted, in_batches(size, digits[1], 60), num_simulations=50, num_samples=32).scores
        for size in (60, 1, 7)
    ]
    for name in ("accuracy", "nll", "brier", "ece", "entropy", "aleatoric", "epistemic"):
        values = [scores[name] for scores in actual]
        assert values == pytest.approx([values[0]] * 3, abs=2e-5), name
