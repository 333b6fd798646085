"""The strong rows on toy problems: early stopping, the temperature and the ensemble against independent answers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn

from benchmarks.bench.registry.problems import QualityProblem
from benchmarks.common.learners import Stream
from benchmarks.quality.rows import validation
from benchmarks.quality.split import rows, strong
from benchmarks.quality.split.strong import FINE_TUNING, Plan, fitted_temperature, members, search, train


def clusters(number, seed):
    """Three overlapping clusters in the plane."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number,), generator=generator)
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return Stream(centres[labels] + torch.randn(number, 2, generator=generator), labels)


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


STREAM, TEST = clusters(200, 0), clusters(500, 1)
FITTED, HELDOUT = validation(STREAM)
TOY = QualityProblem("toy", "toy", lambda seed: None, network, classes=3, priority=0)


def losses_by_epoch(model, rate, epochs, seed):
    """Held-out losses and weights after each epoch of a plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    generator, steps = torch.Generator().manual_seed(seed), epochs * 11  # 175 examples in batches of 16
    result, done = [], 0
    for _ in range(epochs):
        order = torch.randperm(175, generator=generator)
        for which in order.split(16):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - done / steps)
            loss = F.cross_entropy(model(FITTED.inputs[which]), FITTED.labels[which])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        with torch.no_grad():
            loss = F.cross_entropy(model(HELDOUT.inputs).double(), HELDOUT.labels).item()
        result.append((loss, copy.deepcopy(model.state_dict())))
    return result


@pytest.mark.parametrize("rate", [1e-2, 1.0])  # 1.0 jumps about, so that the best epoch is not the last
def test_the_best_epoch_is_kept_and_patience_ends_the_run(rate):
    plan = Plan(10, 3, F.cross_entropy)
    run = train(network(0), FITTED, HELDOUT, 5, rate, plan)
    expected = losses_by_epoch(network(0), rate, 10, 5)
    best = 0
    for epoch in range(10):  # epochs counted from 0
        if expected[epoch][0] < expected[best][0]:
            best = epoch
        if epoch - best >= 3:
            break
    assert (run.epochs, run.best_epoch) == (epoch + 1, best + 1)
    assert run.loss == pytest.approx(expected[best][0], rel=1e-6)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, expected[best][1][name], rtol=1e-5, atol=1e-6)


def test_the_search_takes_the_rate_with_the_least_held_out_loss():
    runs = search(network, FITTED, HELDOUT, 0, FINE_TUNING)
    assert sorted(run.rate for run in runs) == sorted(strong.RATES)
    alone = [train(network(0), FITTED, HELDOUT, 0, rate, FINE_TUNING) for rate in strong.RATES]
    assert runs[0].rate == min(alone, key=lambda run: run.loss).rate
    assert runs[0].loss == min(run.loss for run in alone)


def test_no_finite_loss_is_an_error():
    bad = Stream(FITTED.inputs * torch.nan, FITTED.labels)
    with pytest.raises(FloatingPointError, match="no learning rate has a finite held-out loss"):
        search(network, bad, HELDOUT, 0, Plan(1, 1, F.cross_entropy))


@pytest.mark.parametrize("prior_sd", [0.5, math.inf])
def test_the_temperature_has_the_least_loss_within_its_limits(prior_sd):
    probs = (3 * network(3)(HELDOUT.inputs)).double().softmax(1).detach()
    labels = HELDOUT.labels

    def loss(log_s):
        powers = probs ** math.exp(-log_s)
        log_likelihood = (powers / powers.sum(1, keepdim=True)).log().gather(1, labels[:, None]).sum().item()
        return -log_likelihood + 0.5 * (log_s / prior_sd) ** 2

    limits = (-math.log(10), math.log(10))
    minimum = minimize_scalar(loss, bounds=limits, method="bounded", options={"xatol": 1e-9})
    assert fitted_temperature(probs, labels, prior_sd) == pytest.approx(math.exp(minimum.x), rel=1e-5)


def test_the_prior_speaks_where_all_answers_are_right():
    sure = torch.tensor([[0.9, 0.1], [0.2, 0.8]] * 15, dtype=torch.float64)
    right, wrong = torch.tensor([0, 1] * 15), torch.tensor([1, 0] * 15)
    assert fitted_temperature(sure, right, math.inf) == pytest.approx(0.1)
    assert fitted_temperature(sure, wrong, math.inf) == pytest.approx(10.0)
    assert 0.3 < fitted_temperature(sure, right) < 0.7
    assert fitted_temperature(torch.eye(2, dtype=torch.float64)[[0, 1]], torch.tensor([0, 1])) == pytest.approx(1.0)


def test_the_ensemble_has_the_best_run_and_two_more_at_its_rate():
    runs, unused = members(network, FITTED, HELDOUT, 0, FINE_TUNING)
    assert len(runs) == 3
    assert len(unused) == len(strong.RATES) - 1
    assert {run.rate for run in runs} == {runs[0].rate}
    assert runs[0].loss <= min(run.loss for run in unused)
    weights = [run.model[0].weight for run in runs]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_the_strong_row_learns_and_scales():
    learned = rows.strong(TOY, STREAM, 0)
    predicted = learned.predict(TEST)
    assert predicted.epistemic is None
    torch.testing.assert_close(predicted.probs.sum(1), torch.ones(500, dtype=torch.float64))
    assert (predicted.probs.argmax(1) == TEST.labels).double().mean() > 0.9  # Bayes: 0.95
    best = search(network, FITTED, HELDOUT, 0, FINE_TUNING)[0].model
    with torch.no_grad():
        expected = (best(TEST.inputs).double() / learned.facts["temperature"]).softmax(1)
    torch.testing.assert_close(predicted.probs, expected, rtol=1e-9, atol=1e-12)
    assert learned.facts["search_seconds"] > 0
    assert len(learned.facts["epochs"]) == 4
    with torch.no_grad():
        bare = best(TEST.inputs).double()
    torch.testing.assert_close(learned.variants["unscaled"](TEST).probs, bare.softmax(1))
    without = (bare / learned.facts["temperature_no_prior"]).softmax(1)
    torch.testing.assert_close(learned.variants["no_prior"](TEST).probs, without)


def test_the_ensembles_epistemic_entropy_is_mutual_information():
    learned = rows.strong_ensemble(TOY, STREAM, 0)
    predicted = learned.predict(TEST)
    runs, _ = members(network, FITTED, HELDOUT, 0, FINE_TUNING)
    with torch.no_grad():
        each = torch.stack([run.model(TEST.inputs).double().softmax(1) for run in runs])
    mean = each.mean(0)
    parts = (torch.special.entr(mean).sum(1), torch.special.entr(each).sum(2).mean(0))
    torch.testing.assert_close(predicted.epistemic, parts[0] - parts[1], rtol=1e-9, atol=1e-12)
    power = mean ** (1 / learned.facts["temperature"])
    torch.testing.assert_close(predicted.probs, power / power.sum(1, keepdim=True), rtol=1e-9, atol=1e-12)
    assert len(learned.facts["epochs"]) == 6
