"""The temperature that streams and held-out data choose, what is scored for it, and what is said at its cold end."""

import dataclasses
import math
import warnings

import pytest
import torch
from small_problems import EXACT, X, Y, linear, loader
from torch import nn

import bayes_kf as bkf
from bayes_kf import evaluation
from bayes_kf.inference.filtering import measurement_update, prequential_temperature
from bayes_kf.inference.fitting.selection.filter_bank import Bank, candidates
from bayes_kf.inference.measurement_model import predictive_density
from bayes_kf.models.batch import Batch
from bayes_kf.models.likelihood import Bernoulli, Categorical


def own_data(seed, inputs=20, classes=3, size=300, sd=3.0):
    """A linear softmax model, and data drawn from its prior of ``sd`` logits."""
    generator = torch.Generator().manual_seed(seed)
    variance = sd**2 / inputs
    weight = variance**0.5 * torch.randn(classes, inputs, generator=generator)
    x = torch.randn(size, inputs, generator=generator)
    y = torch.multinomial((x @ weight.T).softmax(-1), 1, generator=generator)[:, 0]
    model = nn.Linear(inputs, classes, bias=False)
    nn.init.zeros_(model.weight)
    return model, x, y, {"covariance": "full", "initial_variance": variance, "bound_prior": False}


def batches(x, y, size):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(y), size)]


def test_data_of_the_prior_are_not_left_to_the_mean_alone():
    """T = 1 is right for the exact posterior; 32 draws chose 0.001 every time, and with it no epistemic uncertainty."""
    chosen = []
    for seed in range(5):
        model, x, y, settings = own_data(seed)
        posterior = bkf.fit(model, batches(x, y, 4), bkf.KalmanConfig(**settings), progress=False)
        chosen.append(posterior.temperature)
    assert min(chosen) >= 0.1, chosen
    assert max(chosen) <= 1.0, chosen


def test_streams_are_priced_by_the_filter_s_own_predictions():
    """Against 20,000 independent draws of every prediction before its update."""
    model, x, y, settings = own_data(0, inputs=6, size=24)
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(**settings))
    state, expected = kf.init(x[:2]), torch.zeros(len(prequential_temperature.GRID), dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    for inputs, targets in batches(x, y, 4):
        belief = bkf.Posterior(kf, state)
        linearized = kf.linearize(belief.mean_vector, inputs)
        cov = state.belief.output_covariance(linearized.jacobian())
        noise = torch.randn(20_000, *linearized.outputs.shape, generator=generator)
        spread = torch.einsum("bij,sbj->sbi", torch.linalg.cholesky(cov), noise.to(cov))
        for k, heat in enumerate(prequential_temperature.GRID):
            log_prob = Categorical().log_prob(linearized.outputs + heat**0.5 * spread, targets).double()
            expected[k] -= (log_prob.logsumexp(0) - math.log(20_000)).sum()
        state, _ = kf.update(state, inputs, targets)
    torch.testing.assert_close(state.temperature_scores.total, expected, rtol=0, atol=0.1)  # of 24 examples' nats


def test_parts_of_a_batch_have_the_prices_of_batches():
    """In a linear model with a full covariance a batch is learned in parts, as if they were batches."""
    model, x, y, settings = own_data(1, size=384)
    kf, actual = bkf.KalmanFilter(model.double(), bkf.KalmanConfig(**settings, damping=False)), []
    for size in (64, 128):  # parts have 192 rows
        state = kf.init(x[:2].double())
        for inputs, targets in batches(x.double(), y, size):
            state, _ = kf.update(state, inputs, targets)
        actual.append(state)
    torch.testing.assert_close(
        actual[1].temperature_scores.total, actual[0].temperature_scores.total, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("size", [24, 480])
def test_sampled_curvature_is_priced_at_the_outputs_of_each_part(size, monkeypatch):
    """At the coldest temperature the price is the log loss of the mean, where the belief stands before each part."""
    model, x, y, settings = own_data(2, classes=8, size=480)
    kf, expected = bkf.KalmanFilter(model, bkf.KalmanConfig(**settings, curvature="sampled")), {}
    plain = measurement_update.score_temperatures

    def watched(config, state, batch, where, part, output_cov):
        outputs = batch.outputs_at(state.belief.mean, where)
        loss = float(nn.functional.cross_entropy(outputs, batch.targets[where], reduction="sum"))
        expected[state.examples + where.start] = loss  # a part that was too long is tried again, shorter
        return plain(config, state, batch, where, part, output_cov)

    monkeypatch.setattr(measurement_update, "score_temperatures", watched)
    state = kf.init(x[:32])
    for inputs, targets in batches(x, y, size):
        state, _ = kf.update(state, inputs, targets)
    assert len(expected) > 1
    assert float(state.temperature_scores.total[0]) == pytest.approx(sum(expected.values()), rel=2e-3)


def test_a_bank_of_sampled_curvature_prices_each_candidate_at_its_own_outputs(monkeypatch):
    model, x, y, _ = own_data(3, inputs=16, classes=40, size=40)
    config = bkf.KalmanConfig.stream(curvature="sampled")
    bank, expected = Bank(model, candidates(config, config.tune)), {}
    plain = measurement_update.score_temperatures

    def watched(config, state, batch, where, part, output_cov):
        outputs = batch.outputs_at(state.belief.mean, where)
        loss = float(nn.functional.cross_entropy(outputs, batch.targets[where], reduction="sum"))
        expected[config.initial_logit_sd] = expected.get(config.initial_logit_sd, 0.0) + loss
        return plain(config, state, batch, where, part, output_cov)

    state = bank.init(x[:32])
    monkeypatch.setattr(measurement_update, "score_temperatures", watched)
    for inputs, targets in batches(x, y, 2):
        state, _ = bank.update(state, inputs, targets)
    assert sum(state.own_passes) < 2 * state.step  # most updates are shared with the leader
    for kf, own in zip(bank.filters, state.states, strict=True):
        assert own is not None
        cold = float(own.temperature_scores.total[0])
        assert cold == pytest.approx(expected[kf.config.initial_logit_sd], rel=2e-3)


def test_later_passes_are_priced_by_their_own_belief():
    """Two classes: a dense Gauss-Newton recursion, expanded at the first pass's mean, and quadrature."""
    model, x, y, settings = own_data(4, inputs=3, classes=2, size=40)
    config = bkf.KalmanConfig(**settings, damping=False)
    x, model = x.double(), model.double()
    first = bkf.fit(model, batches(x, y, 1), config, progress=False)
    second = bkf.fit(model, batches(x, y, 1), dataclasses.replace(config, passes=2), progress=False)
    at, expected = first.mean_vector, torch.zeros(len(prequential_temperature.GRID), dtype=torch.float64)
    precision = torch.eye(6).double() / settings["initial_variance"]
    information = torch.zeros(6).double()
    for row, label in zip(x, y, strict=True):
        jacobian = torch.stack([torch.cat([row, torch.zeros(3)]), torch.cat([torch.zeros(3), row])]).double()
        covariance = precision.inverse()
        output_cov, outputs = jacobian @ covariance @ jacobian.T, jacobian @ (covariance @ information)
        odds_var = output_cov[0, 0] + output_cov[1, 1] - 2.0 * output_cov[0, 1]
        sign = 2.0 * label - 1.0
        expected += predictive_density.log_loss(
            Bernoulli(),
            (sign * (outputs[1] - outputs[0])).view(1, 1),
            odds_var.view(1, 1, 1),
            torch.ones(1, 1),
            prequential_temperature.GRID,
        )[:, 0]
        point = jacobian @ at
        probs = point.softmax(0)
        curvature = torch.diag(probs) - probs[:, None] * probs
        residual = nn.functional.one_hot(label, 2) - probs
        precision = precision + jacobian.T @ curvature @ jacobian
        information = information + jacobian.T @ (curvature @ point + residual)
    torch.testing.assert_close(second.state.temperature_scores.total, expected, rtol=0, atol=1e-6)
    assert second.state.temperature_scores.updates == 40


def test_the_stream_chooses_what_it_does_not_clearly_speak_against():
    """Differences of ±1 about a mean have a standard error of √N in their sum."""
    assert prequential_temperature.choose(prequential_temperature.init(torch.device("cpu"))) == 1.0
    sign = torch.tensor([1.0, -1.0]).double().repeat(200)
    for excess, expected in ((0.4, 1.0), (0.6, 0.01)):
        losses = torch.ones(len(prequential_temperature.GRID), 400).double()
        losses[2] = 0.0
        losses[6] = sign + excess / 20.0
        state = prequential_temperature.init(torch.device("cpu"))
        for part in losses.split(7, 1):
            state = prequential_temperature.add(state, part)
        torch.testing.assert_close(state.total, losses.sum(1))
        assert prequential_temperature.choose(state) == expected
    impossible = torch.full((len(prequential_temperature.GRID), 1), torch.inf).double()
    assert (
        prequential_temperature.choose(prequential_temperature.add(state, impossible))
        == prequential_temperature.GRID[0]
    )
    impossible[:6] = 0.0
    assert (
        prequential_temperature.choose(
            prequential_temperature.add(prequential_temperature.init(torch.device("cpu")), impossible)
        )
        == prequential_temperature.GRID[5]
    )


def test_a_margin_keeps_the_covariance_where_it_costs_little():
    """Losses that all examples share reject hotter temperatures at a thousandth of a nat; a margin allows more."""
    grid = prequential_temperature.GRID
    losses = 0.002 * torch.arange(float(len(grid))).double()[:, None].expand(-1, 100)  # in nats, hotter is worse
    scores = prequential_temperature.add(prequential_temperature.init(torch.device("cpu")), losses)
    chosen = [prequential_temperature.choose(scores, 100 * margin) for margin in (0.0, 0.005, 0.011, 1.0)]
    assert chosen == [0.001, 0.01, 0.3, 1.0]
    hot = scores._replace(total=scores.total.flip(0), differences=scores.differences.flip(0, 1))
    assert prequential_temperature.choose(hot, 100.0) == 3.0  # a covariance that is too small is not made smaller
    kf = bkf.KalmanFilter(linear(), bkf.KalmanConfig(temperature_margin=0.005))
    state = kf.init()._replace(temperature_scores=scores, examples=100)
    assert kf.temperature(state) == 0.01
    assert kf.temperature(state._replace(examples=220)) == 0.3  # the margin is one of each example


def test_scores_are_the_log_losses_of_linearized_predictions():
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0)
    kf = bkf.KalmanFilter(linear(), config)
    state, _ = kf.update(kf.init(), X[:5], Y[:5])
    after, _ = kf.update(state, X[5:10], Y[5:10])
    for k, value in enumerate(prequential_temperature.GRID):
        fixed = bkf.KalmanFilter(kf.adapter, dataclasses.replace(config, temperature=value))
        expected = -bkf.Posterior(fixed, state).predict(X[5:10], targets=Y[5:10]).log_prob.sum()
        torch.testing.assert_close(
            after.temperature_scores.total[k] - state.temperature_scores.total[k], expected, rtol=1e-10, atol=1e-10
        )
    fixed = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT), progress=False)
    assert (fixed.temperature, fixed.state.temperature_scores.updates) == (1.0, 0)


@pytest.fixture
def contradicted():
    """A belief of many logits, and data that its mean alone predicts: only the coldest temperature will do."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="full", initial_variance=400.0, bound_prior=False))
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    return bkf.Posterior(kf, kf.init(x)), x, (x[:, 0] < 0).long()


def chosen_by_scores(posterior, x, y):
    """The temperature that the posterior's predictions of a data set choose, as those of a stream do."""
    linearized = posterior.kf.linearize(posterior.mean_vector, Batch.of(x))
    covariance = posterior.state.belief.output_covariance(linearized.jacobian())
    losses = predictive_density.log_loss(Categorical(), linearized.outputs, covariance, y, prequential_temperature.GRID)
    return prequential_temperature.choose(
        prequential_temperature.add(prequential_temperature.init(torch.device("cpu")), losses)
    )


def test_a_temperature_at_the_cold_end_is_said(contradicted, tmp_path):
    posterior, x, y = contradicted
    actual = posterior.with_settings(temperature=chosen_by_scores(posterior, x, y))
    with pytest.warns(UserWarning, match=r"the temperature chosen is 0.001: predictions are those of the mean alone"):
        prequential_temperature.warn_of_edge(actual.temperature)
    assert actual.temperature == prequential_temperature.GRID[0]
    assert "those of the mean alone" in repr(actual)
    actual.save_pretrained(tmp_path / "saved")
    assert "those of the mean alone" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    report = evaluation.evaluate(actual, [(x[:100], y[:100])], num_simulations=39)
    page = report.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "those of the mean alone" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hot = bkf.Posterior(
            bkf.KalmanFilter(actual.adapter, dataclasses.replace(actual.config, temperature=1.0)), actual.state
        )
    assert hot.notes == ()
    assert "mean alone" not in repr(hot)


def test_the_largest_temperature_is_said():
    with pytest.warns(
        UserWarning, match=r"^the temperature chosen is 3, the largest that was tried: the covariance is"
    ):
        prequential_temperature.warn_of_edge(prequential_temperature.GRID[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for temperature in (0.03, 1.0, 2.9, 30.0):  # the last was given, not chosen
            prequential_temperature.warn_of_edge(temperature)


def test_fit_warns_once_at_the_cold_end(contradicted):
    posterior, x, y = contradicted
    settings = {"covariance": "diagonal", "initial_variance": 400.0, "bound_prior": False}
    model, few = posterior.adapter.model, batches(x[:80], y[:80], 40)
    with pytest.warns(UserWarning, match="those of the mean alone") as caught:
        bkf.fit(model, few, bkf.KalmanConfig(**settings), progress=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bkf.fit(model, batches(x, y, 40), bkf.KalmanConfig(**settings, temperature=0.001), progress=False)


def test_a_posterior_and_a_prediction_are_shown_in_a_line():
    model, x, y, settings = own_data(0, size=40)
    posterior = bkf.fit(model, batches(x, y, 8), bkf.KalmanConfig(**settings, temperature=1.0), progress=False)
    assert repr(posterior) == (
        "Posterior(categorical, 60 parameters, covariance='full', temperature=1, 40 examples in 5 updates)"
    )
    assert repr(posterior.predict(x[:4], "mean")) == "Prediction(mean (4, 3), probs (4, 3), entropy (4,))"
