"""Rows of regressions on a linear problem whose noise is known."""

import pytest
import torch
from torch import nn

from benchmarks.bench.registry.problems import RegressionProblem
from benchmarks.common.learners import Stream
from benchmarks.quality.rows import validation
from benchmarks.quality.split import regression_rows
from benchmarks.quality.split.regression_rows import ROWS
from benchmarks.quality.split.scores import regression_scores
from benchmarks.quality.split.strong import FROM_SCRATCH, members

NOISE_VAR = 0.09


def linear(number, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 3, generator=generator)
    noise = NOISE_VAR**0.5 * torch.randn(number, 1, generator=generator)
    return Stream(inputs, inputs @ torch.tensor([[0.5], [-0.5], [0.6]]) + noise)


def network(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


STREAM, TEST = linear(240, 0), linear(2000, 1)
TOY = RegressionProblem("toy", "toy", lambda seed: None, network, 0)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_finds_the_noise_and_covers(row):
    learned = ROWS[row][1](TOY, STREAM, 0)
    scores = regression_scores(learned.predict(TEST), TEST.labels)
    assert scores["rmse"] == pytest.approx(NOISE_VAR**0.5, rel=0.1)
    assert scores["coverage_90"] == pytest.approx(0.9, abs=0.08)  # σ² from 30 held-out targets has an sd of 26 %


def test_the_ridge_is_the_closed_form_at_its_precisions():
    predicted = regression_rows.ridge(TOY, STREAM, 0).predict(TEST)
    inputs, targets = STREAM.inputs.double(), STREAM.labels[:, 0].double()
    noise_var = float(predicted.variance.min())  # that of a test input near the mean, nearly
    exact = torch.linalg.lstsq(inputs - inputs.mean(0), targets - targets.mean()).solution
    mean = (TEST.inputs.double() - inputs.mean(0)) @ exact + targets.mean()
    torch.testing.assert_close(predicted.mean, mean, rtol=0, atol=0.02)  # the prior shrinks it a little
    assert noise_var == pytest.approx(NOISE_VAR, rel=0.3)


def test_the_ensembles_variance_is_the_members_and_the_noise():
    learned = regression_rows.strong_ensemble(TOY, STREAM, 0)
    predicted = learned.predict(TEST)
    runs, _ = members(network, *validation(STREAM), 0, FROM_SCRATCH)
    with torch.no_grad():
        means = torch.stack([run.model(TEST.inputs)[:, 0].double() for run in runs])
    torch.testing.assert_close(predicted.mean, means.mean(0))
    expected = means.var(0, correction=0) + learned.facts["noise_variance"]
    torch.testing.assert_close(predicted.variance, expected)
