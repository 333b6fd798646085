"""The report that compares several posteriors, or several sets of predictions."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.classification.comparison import COMPARED, SELECTIVE, compare_predictions
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.options import EvaluationOptions
from bayes_kf.evaluation.posterior_report import as_loader, class_predictions, forecast_of, ood_probs
from bayes_kf.evaluation.protocols import LoaderPrediction, PosteriorLike
from bayes_kf.evaluation.regression.comparison import compare_losses
from bayes_kf.evaluation.regression_report import make_forecast
from bayes_kf.evaluation.report.provenance import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.sections.classification import score_section
from bayes_kf.evaluation.sections.comparison import (
    comparison_section,
    coverage_figures,
    diagram_section,
    stream_comparison_section,
)
from bayes_kf.evaluation.sections.regression import Forecast, coverage_section, error_section, example_losses


def compare(
    posteriors: Mapping[str, PosteriorLike | Array],
    loader: Any,
    *,
    ood: Mapping[str, Any] | None = None,
    cost: Mapping[str, float] | None = None,
    method: str = "linearized",
    num_samples: int = 64,
    num_bins: int = 15,
    num_simulations: int = 1000,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report that compares posteriors: which one is better in which score, by how much, and which ones are tied.

    Classifiers are compared in log loss, Brier score, accuracy, AURC and detection of out-of-distribution inputs;
    regressions in log loss, CRPS and squared error.

    Args:
        posteriors: At least two. Name to posterior (see `PosteriorLike`), or to class probabilities (N, C) of another
            model for the loader's examples in their order.
        loader: Inputs with their targets. It is iterated once for each posterior, so it cannot be an iterator.
        ood: Name to loader of out-of-distribution inputs, or a tensor of them, if all are posteriors of classes.
        cost: Name to cost, in any unit (seconds, epochs, parameters): a column of the table.
        method: Prediction method, as the posteriors name it.
        num_samples: Number of draws for each prediction.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets for each null band, at least 39.
        title: Title of the page.
        seed: Seed of the predictions' draws and the simulations.

    Raises:
        ValueError: If there are fewer than two posteriors, the loader is an iterator or its targets differ between two
            passes, or only some posteriors predict class probabilities.
    """
    if len(posteriors) < 2:
        raise ValueError(f"`posteriors` must hold at least two, got {len(posteriors)}.")
    if isinstance(loader, Iterator):
        raise ValueError("`loader` must be iterable more than once, got an iterator.")
    config = {"method": method, "num_samples": num_samples}
    options = EvaluationOptions(null=NullSettings(num_bins, num_simulations, seed), title=title, config=config)
    predict = {"method": method, "num_samples": num_samples}
    predictions = _predictions(posteriors, loader, predict, seed)
    if len(predictions) == len(posteriors) and all(_is_forecast(found) for found in predictions.values()):
        if ood:
            raise ValueError("`ood` must be left out for posteriors without class probabilities, got some.")
        return forecast_comparison_report(*_forecasts(predictions, seed), cost, options)
    probs, targets = _class_probs(posteriors, predictions)
    histories = {
        name: posterior.history
        for name, posterior in posteriors.items()
        if not isinstance(posterior, Tensor | np.ndarray) and posterior.history
    }
    foreign = {name: _ood_probs(posteriors, name, inputs, predict, seed) for name, inputs in (ood or {}).items()}
    return comparison_report(probs, targets, histories, options, foreign, cost)


def report_comparison(
    probs: Mapping[str, Array],
    targets: Array,
    *,
    histories: Mapping[str, Mapping[str, Array]] | None = None,
    ood: Mapping[str, Mapping[str, Array]] | None = None,
    cost: Mapping[str, float] | None = None,
    num_bins: int = 15,
    num_simulations: int = 1000,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report that compares class probabilities of several models for the same examples.

    Args:
        probs: Name to class probabilities, (N, C), of at least two models.
        targets: Class indices, (N,).
        histories: Name to series of the stream that a model was fitted to, "log_loss" and "correct" for each example.
        ood: Name of a set of out-of-distribution inputs to each model's class probabilities for them, (M, C).
        cost: Name of each model to its cost, in any unit: a column of the table.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets for each null band, at least 39.
        config: Settings to print.
        title: Title of the page.
        seed: Seed of the simulations.

    Returns:
        A report whose scores are named "model/score".

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> report = report_comparison({"a": probs, "b": probs.flip(0)}, torch.tensor([0, 1, 1]))
        >>> round(report.scores["a/accuracy"], 3), report.scores["b/nll"] > report.scores["a/nll"]
        (0.667, True)
    """
    null = NullSettings(num_bins, num_simulations, seed)
    options = EvaluationOptions(null=null, title=title, config=config or {})
    return comparison_report(probs, targets, histories or {}, options, ood, cost)


def report_forecast_comparison(
    forecasts: Mapping[str, Mapping[str, Array]],
    targets: Array,
    *,
    cost: Mapping[str, float] | None = None,
    num_simulations: int = 1000,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report that compares predictions of real values by several models for the same examples.

    Args:
        forecasts: Name of at least two models to its "mean" and its "variance" or "samples"; see `evaluate_regression`.
            The log loss is compared if all have a variance.
        targets: Observed values, (N,) or (N, m).
        cost: Name of each model to its cost, in any unit: a column of the table.
        num_simulations: Number of simulated data sets for each null band, at least 39.
        config: Settings to print.
        title: Title of the page.
        seed: Seed of the simulations.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> targets = torch.linspace(-1, 1, 60)
        >>> near = {"mean": targets + 0.1, "variance": torch.full((60,), 0.01)}
        >>> far = {"mean": torch.zeros(60), "variance": torch.full((60,), 0.4)}
        >>> report_forecast_comparison({"near": near, "far": far}, targets).headline
        ['Best in negative log-likelihood, CRPS and squared error: near.']
    """
    if len(forecasts) < 2:
        raise ValueError(f"`forecasts` must hold at least two models, got {len(forecasts)}.")
    checked = {}
    for name, given in forecasts.items():
        unknown = sorted(set(given) - {"mean", "variance", "samples"})
        if unknown or "mean" not in given:
            raise ValueError(f"`forecasts[{name!r}]` must hold mean, and variance or samples, got {', '.join(given)}.")
        checked[str(name)] = make_forecast(given["mean"], targets, given.get("variance"), given.get("samples"))
    null = NullSettings(num_simulations=num_simulations, seed=seed)
    options = EvaluationOptions(null=null, title=title, config=config or {})
    return forecast_comparison_report(checked, {}, cost, options)


def forecast_comparison_report(
    forecasts: Mapping[str, Forecast],
    log_probs: Mapping[str, Tensor],
    cost: Mapping[str, float] | None,
    options: EvaluationOptions,
) -> Report:
    """The report on several regressions; the log losses are those of the predicted log densities, if all are known."""
    cost = _checked_cost(cost, forecasts)
    known = log_probs if len(log_probs) == len(forecasts) else {}
    losses = {name: example_losses(forecast, known.get(name)) for name, forecast in forecasts.items()}
    shared = [score for score in ("nll", "crps", "mse") if all(score in own for own in losses.values())]
    comparisons = compare_losses({score: {name: own[score] for name, own in losses.items()} for score in shared})
    models = {
        name: error_section(forecast, known.get(name)) + coverage_section(forecast)
        for name, forecast in forecasts.items()
    }
    sections = comparison_section(comparisons, models, cost) + coverage_figures(models)
    targets = next(iter(forecasts.values())).targets
    fingerprints = {f"predictions of {name}": fingerprint(forecast.mean) for name, forecast in forecasts.items()}
    return Report(
        title=options.title or "Comparison of regressions",
        config=options.printed_config(models=", ".join(forecasts), seed=options.null.seed),
        sections=sections,
        fingerprints=fingerprints | {"targets": fingerprint(targets)},
    )


def comparison_report(
    probs: Mapping[str, Array],
    targets: Array,
    histories: Mapping[str, Mapping[str, Array]],
    options: EvaluationOptions,
    ood: Mapping[str, Mapping[str, Array]] | None = None,
    cost: Mapping[str, float] | None = None,
) -> Report:
    """The report on several models; see `report_comparison`."""
    comparisons = compare_predictions(probs, targets, scores=(*COMPARED, SELECTIVE), ood=ood)
    cost = _checked_cost(cost, probs)
    checked = {str(name): as_probs(values, f"probs[{name!r}]") for name, values in probs.items()}
    models = {name: score_section(p, as_targets(targets, p), None, options.null) for name, p in checked.items()}
    sections = (
        comparison_section(comparisons, models, cost) + diagram_section(models) + stream_comparison_section(histories)
    )
    fingerprints = {f"predictions of {name}": fingerprint(values) for name, values in checked.items()}
    return Report(
        title=options.title or "Comparison of classifiers",
        config=options.printed_config(models=", ".join(checked), **asdict(options.null)),
        sections=sections,
        fingerprints=fingerprints | {"targets": fingerprint(targets)},
    )


def _checked_cost(cost: Mapping[str, float] | None, models: Mapping[str, Any]) -> dict[str, float]:
    """The cost of every model, or nothing."""
    given = {str(name): float(value) for name, value in (cost or {}).items()}
    if given and set(given) != {str(name) for name in models}:
        raise ValueError(f"`cost` must hold the models {', '.join(map(str, models))}, got {', '.join(given)}.")
    if not all(map(math.isfinite, given.values())):
        raise ValueError(f"`cost` must hold finite numbers, got {given}.")
    return given


def _predictions(
    posteriors: Mapping[str, PosteriorLike | Array], loader: Any, predict: Mapping[str, Any], seed: int
) -> dict[str, LoaderPrediction]:
    """The predictions of every posterior for the loader, whose targets must be the same in each pass."""
    found: dict[str, LoaderPrediction] = {}
    for name, posterior in posteriors.items():
        if isinstance(posterior, Tensor | np.ndarray):
            continue
        generator = torch.Generator().manual_seed(seed)
        found[name] = posterior.predict_loader(loader, **predict, generator=generator)
    if not found:
        raise ValueError(
            "`posteriors` must hold at least one posterior to read the targets with, got predictions only."
        )
    first = next(iter(found.values())).targets
    for name, prediction in found.items():
        if first is not None and prediction.targets is not None and not torch.equal(first, prediction.targets):
            raise ValueError(f"`loader` must give the same targets every time, got others for posteriors[{name!r}].")
    return found


def _is_forecast(prediction: LoaderPrediction) -> bool:
    """Whether a posterior predicts real values."""
    return prediction.probs is None and prediction.variance is not None


def _forecasts(predictions: Mapping[str, LoaderPrediction], seed: int) -> tuple[dict[str, Forecast], dict[str, Tensor]]:
    """The forecast of every posterior, and its log densities where known."""
    forecasts = {str(name): forecast_of(prediction, seed) for name, prediction in predictions.items()}
    known = {str(name): found.log_prob for name, found in predictions.items() if found.log_prob is not None}
    return forecasts, known


def _class_probs(
    posteriors: Mapping[str, PosteriorLike | Array], predictions: Mapping[str, LoaderPrediction]
) -> tuple[dict[str, Array], Tensor]:
    """Class probabilities of each posterior, and the targets."""
    probs: dict[str, Array] = {}
    for name, posterior in posteriors.items():
        if isinstance(posterior, Tensor | np.ndarray):
            probs[name] = posterior
        else:
            probs[name], targets = class_predictions(posterior, predictions[name], f"posteriors[{name!r}]")
    return probs, targets


def _ood_probs(
    posteriors: Mapping[str, PosteriorLike | Array], name: str, inputs: Any, predict: Mapping[str, Any], seed: int
) -> dict[str, Array]:
    """Class probabilities of every posterior for a set of out-of-distribution inputs."""
    found: dict[str, Array] = {}
    for model, posterior in posteriors.items():
        if isinstance(posterior, Tensor | np.ndarray):
            raise ValueError(f"`ood` must be left out if a model is given by its predictions, got {model!r}.")
        generator = torch.Generator().manual_seed(seed)
        prediction = posterior.predict_loader(as_loader(inputs), **predict, generator=generator)
        found[model] = ood_probs(posterior, name, prediction)
    return found
