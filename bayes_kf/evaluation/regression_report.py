"""The report on predictions of real values."""

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.regression.scores import check_same_shape
from bayes_kf.evaluation.report.html_page import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import check_simulation
from bayes_kf.evaluation.sections.online import stream_sections
from bayes_kf.evaluation.sections.regression import (
    Forecast,
    Simulation,
    coverage_section,
    error_section,
    pit_section,
    spread_section,
)

LEVEL = 0.95


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
    """Report on predicted real values, wherever they come from.

    Coverage of the 50, 80 and 95 % intervals, CRPS and PIT values are taken from `samples` where given, else from
    N(mean, variance). The bands of chance take all targets as independent; outputs of one example that err together
    make them too narrow. Without `variance` the spread is that of the samples. Counts need samples: N(mean, variance)
    is not their distribution.

    Args:
        mean: Predictive means, (N,) or (N, m).
        targets: What came, of the same shape; (N,) and (N, 1) count as the same.
        variance: Predictive variances, noise included, of the same shape as the means.
        samples: Draws of the target, noise included, (S, N) or (S, N, m).
        log_prob: Predictive log density of each example's target, (N,). A joint one of m outputs is divided among them.
            Without it the log loss is that of N(mean, variance), where there are variances.
        history: Series of the stream: "log_loss" for each example, "innovation", "dof" for each update.
        parameter_variance: Name to posterior variances of each tensor.
        output_variance: Name to what each tensor contributes to the variance of the outputs.
        config: Settings to print.
        title: Title of the page.
        num_simulations: Number of simulated data sets behind the bands that are simulated, at least 39.
        seed: Seed of the simulation, and of the places that PIT values take among samples.

    Raises:
        ValueError: If an argument is malformed, or neither `variance` nor `samples` is given.

    Example:
        >>> import torch
        >>> report = evaluate_regression(torch.zeros(4), torch.tensor([0.0, 0.1, -0.1, 3.0]), variance=torch.ones(4))
        >>> report.scores["coverage_95"], report.scores["rmse"] > 1.5
        (0.75, True)
    """
    check_simulation(num_simulations, LEVEL)
    forecast, chance = _forecast(mean, targets, variance, samples), Simulation(num_simulations, seed)
    sections = (
        error_section(forecast, log_prob)
        + spread_section(forecast, chance)
        + coverage_section(forecast)
        + pit_section(forecast, chance)
        + stream_sections(history, parameter_variance, output_variance)
    )
    settings = {**(config or {}), **asdict(chance)}
    return Report(
        title=title or "Evaluation of a regression",
        config={name: str(value) for name, value in settings.items()},
        sections=sections,
        fingerprints={"predictions": fingerprint(forecast.mean), "targets": fingerprint(forecast.targets)},
    )


def _forecast(mean: Array, targets: Array, variance: Array | None, samples: Array | None) -> Forecast:
    """All of them in the shape of the means."""
    if variance is None and samples is None:
        raise ValueError("`variance` or `samples` must be given for the coverage of intervals, got neither.")
    predicted = as_float(mean, "mean")
    if predicted.ndim not in (1, 2):
        raise ValueError(f"`mean` must have shape (N,) or (N, m), got {tuple(predicted.shape)}.")
    observed = _like(as_float(targets, "targets"), predicted)
    check_same_shape(observed, predicted, "mean")
    spread_var = None if variance is None else _like(as_float(variance, "variance"), predicted)
    draws = None if samples is None else as_float(samples, "samples")
    if draws is not None and _fits(draws, predicted):
        draws = draws.reshape(len(draws), *predicted.shape)
    return Forecast(predicted, observed, spread_var, draws)


def _like(values: Tensor, mean: Tensor) -> Tensor:
    """Values (N,) as (N, 1), or the reverse, where the means have that shape; else as they are."""
    same = values.shape[:1] == mean.shape[:1] and values.numel() == mean.numel() == mean.shape[0]
    return values.reshape(mean.shape) if same else values


def _fits(draws: Tensor, mean: Tensor) -> bool:
    """Whether (S, N) and (S, N, 1) differ only in the last, single axis."""
    return draws.ndim > 1 and draws.shape[1] == mean.shape[0] and draws[0].numel() == mean.numel() == mean.shape[0]
