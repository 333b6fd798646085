"""The rows of ``run.py`` on regressions: from a problem and its stream to Gaussian predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge
from torch import Tensor

import bayes_kf as bkf
from benchmarks.bench.registry.problems import RegressionProblem
from benchmarks.common.learners import Stream
from benchmarks.quality.rows import AHEAD, raw, validation
from benchmarks.quality.split.scores import GaussianPredicted
from benchmarks.quality.split.strong import BATCH, FROM_SCRATCH, facts, members, search


class LearnedRegression(NamedTuple):
    """The result of a row: ``predict`` from a stream to means and variances, and further numbers."""

    predict: Callable[[Stream], GaussianPredicted]
    facts: Mapping[str, Any] = {}


Learn = Callable[[RegressionProblem, Stream, int], LearnedRegression]


def strong(problem: RegressionProblem, stream: Stream, seed: int) -> LearnedRegression:
    """AdamW with early stopping and four rates; σ² is the mean squared error of the held-out eighth."""
    fitted, heldout = validation(stream)
    best, *others = search(problem.model, fitted, heldout, seed, FROM_SCRATCH)

    def predict(given: Stream) -> GaussianPredicted:
        mean = raw(best.model, given)[:, 0]
        return GaussianPredicted(mean, torch.full_like(mean, best.loss))

    return LearnedRegression(predict, {"noise_variance": best.loss, **facts([best], others)})


def strong_ensemble(problem: RegressionProblem, stream: Stream, seed: int) -> LearnedRegression:
    """Three such members: their mean, and the variance between them plus σ².

    σ² is what the held-out squared errors of the mean have beyond that variance, but at least a tenth of them.
    """
    fitted, heldout = validation(stream)
    runs, unused = members(problem.model, fitted, heldout, seed, FROM_SCRATCH)

    def moments(given: Stream) -> tuple[Tensor, Tensor]:
        outputs = torch.stack([raw(run.model, given)[:, 0] for run in runs])
        return outputs.mean(0), outputs.var(0, correction=0)

    mean, between = moments(heldout)
    error = (mean - heldout.labels[:, 0].double()).square().mean().item()
    noise_var = max(error - between.mean().item(), 0.1 * error)

    def predict(given: Stream) -> GaussianPredicted:
        mean, between = moments(given)
        return GaussianPredicted(mean, between + noise_var)

    return LearnedRegression(predict, {"noise_variance": noise_var, **facts(runs, unused)})


def ridge(problem: RegressionProblem, stream: Stream, seed: int) -> LearnedRegression:
    """scikit-learn's BayesianRidge, a linear model whose precisions maximize the evidence."""
    return _scikit_learn(BayesianRidge(), stream)


def gaussian_process(problem: RegressionProblem, stream: Stream, seed: int) -> LearnedRegression:
    """scikit-learn's GaussianProcessRegressor: a squared exponential with a length for each input, and noise."""
    lengths = RBF([1.0] * stream.inputs.shape[1], (1e-2, 1e3))  # type: ignore[union-attr]  # a tensor
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * lengths + WhiteKernel(0.1, (1e-6, 1e1))
    return _scikit_learn(GaussianProcessRegressor(kernel, random_state=seed), stream)


def default(problem: RegressionProblem, stream: Stream, seed: int) -> LearnedRegression:
    """This package without settings."""
    posterior = bkf.fit(problem.model(seed), stream.batches(BATCH), progress=False)
    return LearnedRegression(_moments(posterior), {"noise_variance": float(posterior.likelihood.noise_variance)})


def mixture(problem: RegressionProblem, stream: Stream, seed: int) -> LearnedRegression:
    """This package: three fits from other starts, and their mixture, as a Gaussian of its moments."""
    posterior = bkf.fit_mixture(problem.model(seed), stream.batches(BATCH), progress=False)
    variances = [float(member.likelihood.noise_variance) for member in posterior.members]
    return LearnedRegression(_moments(posterior), {"noise_variances": variances})


def _moments(posterior: Any) -> Callable[[Stream], GaussianPredicted]:
    """The means and variances of a posterior's predictions."""

    def predict(given: Stream) -> GaussianPredicted:
        prediction = posterior.predict_loader([(inputs, None) for inputs, _ in given.batches(AHEAD)])
        assert prediction.variance is not None  # a regression
        return GaussianPredicted(prediction.mean[:, 0].double(), prediction.variance[:, 0].double())

    return predict


def _scikit_learn(model: Any, stream: Stream) -> LearnedRegression:
    """A model of scikit-learn, fitted to all of the stream."""
    model.fit(_array(stream), stream.labels[:, 0].double().numpy())

    def predict(given: Stream) -> GaussianPredicted:
        mean, sd = model.predict(_array(given), return_std=True)
        return GaussianPredicted(torch.from_numpy(mean), torch.from_numpy(sd).square())

    return LearnedRegression(predict)


def _array(stream: Stream) -> Any:
    assert isinstance(stream.inputs, Tensor)
    return stream.inputs.double().numpy()


ROWS: dict[str, tuple[str, Learn]] = {  # title, method
    "strong": ("AdamW, early stopping, σ² held out", strong),
    "strong-ensemble": ("ensemble of three of them", strong_ensemble),
    "ridge": ("Bayesian ridge (scikit-learn)", ridge),
    "gp": ("Gaussian process (scikit-learn)", gaussian_process),
    "default": ("**ours, default**", default),
    "mixture": ("**ours, mixture of three**", mixture),
}
