"""The report on a regression, from its predictions alone."""

from collections.abc import Mapping

from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.options import EvaluationOptions
from bayes_kf.evaluation.regression.scores import check_same_shape
from bayes_kf.evaluation.report.provenance import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.sections.online import stream_sections
from bayes_kf.evaluation.sections.regression import (
    Forecast,
    coverage_section,
    error_section,
    pit_section,
    prediction_section,
    spread_section,
)
from bayes_kf.evaluation.sections.regression_assessment import assessment_section


def evaluate_regression(
    mean: Array,
    targets: Array,
    *,
    variance: Array | None = None,
    samples: Array | None = None,
    log_prob: Array | None = None,
    history: Mapping[str, Array] | None = None,
    parameter_variance: Mapping[str, Array] | None = None,
    output_variance: Mapping[str, float] | None = None,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
    num_simulations: int = 1000,
    seed: int = 0,
) -> Report:
    """Report on predictions of real values by any model.

    Coverage of the 50, 80 and 95 % intervals, CRPS and PIT values are computed from `samples`, or from N(mean,
    variance) if there are none. The null bands assume independent targets; they are too narrow if the errors of the
    outputs of one example are correlated. Without `variance`, the variances are those of the samples. Predictions of
    counts need samples, because N(mean, variance) is not their distribution.

    Args:
        mean: Predictive means, (N,) or (N, m).
        targets: Observed values, of the same shape; (N,) and (N, 1) count as the same.
        variance: Predictive variances, noise included, of the same shape as the means.
        samples: Draws of the target, noise included, (S, N) or (S, N, m).
        log_prob: Predictive log density of each example's target, (N,). A joint one of m outputs is divided among them.
            Without it, the log loss is that of N(mean, variance) if there are variances.
        history: Series of a stream: "log_loss" for each example, "innovation", "dof" for each update.
        parameter_variance: Name to posterior variances of each tensor.
        output_variance: Name to contribution of each tensor to the variance of the outputs.
        config: Settings to print.
        title: Title of the page.
        num_simulations: Number of simulated data sets for each simulated null band, at least 39.
        seed: Seed of the simulation, and of the randomized PIT values of samples.

    Raises:
        ValueError: If an argument is malformed, or neither `variance` nor `samples` is given.

    Example:
        >>> import torch
        >>> report = evaluate_regression(torch.zeros(4), torch.tensor([0.0, 0.1, -0.1, 3.0]), variance=torch.ones(4))
        >>> report.scores["coverage_95"], report.scores["rmse"] > 1.5
        (0.75, True)
    """
    options = EvaluationOptions(
        null=NullSettings(num_simulations=num_simulations, seed=seed),
        title=title,
        config=config or {},
        history=history,
        parameter_variance=parameter_variance,
        output_variance=output_variance,
    )
    return regression_report(make_forecast(mean, targets, variance, samples), options, log_prob=log_prob)


def regression_report(forecast: Forecast, options: EvaluationOptions, *, log_prob: Array | None = None) -> Report:
    """The report on checked predictions of real values; see `evaluate_regression`."""
    null = options.null
    sections = error_section(forecast, log_prob) + spread_section(forecast, null)
    sections += prediction_section(forecast) + coverage_section(forecast) + pit_section(forecast, null)
    sections += assessment_section(forecast, sections.scores, null.seed, options.calls)
    sections += stream_sections(options.history, options.parameter_variance, options.output_variance)
    return Report(
        title=options.title or "Evaluation of a regression",
        config=options.printed_config(num_simulations=null.num_simulations, seed=null.seed),
        sections=sections,
        fingerprints={"predictions": fingerprint(forecast.mean), "targets": fingerprint(forecast.targets)},
    )


def make_forecast(mean: Array, targets: Array, variance: Array | None, samples: Array | None) -> Forecast:
    """Checked predictions and targets, all in the shape of the means.

    Raises:
        ValueError: If an array is malformed, or neither `variance` nor `samples` is given.
    """
    if variance is None and samples is None:
        raise ValueError("`variance` or `samples` must be given for the coverage of intervals, got neither.")
    predicted = as_float(mean, "mean")
    if predicted.ndim not in (1, 2):
        raise ValueError(f"`mean` must have shape (N,) or (N, m), got {tuple(predicted.shape)}.")
    observed = _like(as_float(targets, "targets"), predicted)
    check_same_shape(observed, predicted, "mean")
    spread_var = None if variance is None else _like(as_float(variance, "variance"), predicted)
    draws = None if samples is None else as_float(samples, "samples")
    if draws is not None and _is_column(draws, predicted):
        draws = draws.reshape(len(draws), *predicted.shape)
    return Forecast(predicted, observed, spread_var, draws)


def _like(values: Tensor, mean: Tensor) -> Tensor:
    """Values (N,) as (N, 1) or the reverse, if the means have that shape; other values unchanged."""
    is_column = values.shape[:1] == mean.shape[:1] and values.numel() == mean.numel() == mean.shape[0]
    return values.reshape(mean.shape) if is_column else values


def _is_column(draws: Tensor, mean: Tensor) -> bool:
    """Whether draws (S, N) or (S, N, 1) and means (N,) or (N, 1) differ at most in the last axis."""
    return draws.ndim > 1 and draws.shape[1] == mean.shape[0] and draws[0].numel() == mean.numel() == mean.shape[0]
