"""The report on predictions of real values."""

from collections.abc import Mapping

from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_float
from bayes_kf.evaluation.plots import coverage_plot
from bayes_kf.evaluation.regression import (
    Coverage,
    coverage_null,
    gaussian_coverage,
    interval_coverage,
    mean_log_loss,
    rmse,
)
from bayes_kf.evaluation.report import FigureSpec, Report, Sections
from bayes_kf.evaluation.stream_sections import stream_sections
from bayes_kf.evaluation.verdicts import coverage_verdict


def evaluate_regression(
    mean: Array,
    targets: Array,
    *,
    variance: Array | None = None,
    samples: Array | None = None,
    log_prob: Array | None = None,
    history: Mapping[str, Array] | None = None,
    parameter_variance: Mapping[str, Array] | None = None,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
) -> Report:
    """Report on predicted real values, wherever they come from.

    Coverage of the 50, 80 and 95 % intervals is taken from `samples` where given, else from N(mean, variance). Its band
    of chance is binomial over all targets; outputs of one example that err together make it too narrow.

    Args:
        mean: Predictive means, (N,) or (N, m).
        targets: What came, of the same shape; (N,) and (N, 1) count as the same.
        variance: Predictive variances, noise included, of the same shape as the means.
        samples: Draws of the target, noise included, (S, N) or (S, N, m).
        log_prob: Predictive log density of each example's target, (N,).
        history: Series of the stream: "log_loss" for each example, "innovation", "dof" for each update.
        parameter_variance: Name to posterior variances of each tensor.
        config: Settings to print.
        title: Title of the page.

    Raises:
        ValueError: If an argument is malformed, or neither `variance` nor `samples` is given.

    Example:
        >>> import torch
        >>> report = evaluate_regression(torch.zeros(4), torch.tensor([0.0, 0.1, -0.1, 3.0]), variance=torch.ones(4))
        >>> report.scores["coverage_95"], report.scores["rmse"] > 1.5
        (0.75, True)
    """
    predicted = as_float(mean, "mean")
    observed = _like(as_float(targets, "targets"), predicted)
    coverage = _coverage(predicted, observed, variance, samples)
    sections = _error_section(predicted, observed, log_prob) + _coverage_section(coverage, observed.numel())
    return Report(
        title=title or "Evaluation of a regression",
        config={name: str(value) for name, value in (config or {}).items()},
        sections=sections + stream_sections(history, parameter_variance),
    )


def _like(targets: Tensor, mean: Tensor) -> Tensor:
    """Targets (N,) as (N, 1), or the reverse, where the means have that shape; else as they are."""
    same = targets.shape[0] == mean.shape[0] and targets.numel() == mean.numel() == mean.shape[0]
    return targets.reshape(mean.shape) if same else targets


def _coverage(mean: Tensor, targets: Tensor, variance: Array | None, samples: Array | None) -> Coverage:
    """Coverage by samples, or by the Gaussian of the two moments."""
    if samples is not None:
        draws = as_float(samples, "samples")
        return interval_coverage(draws.reshape(len(draws), *mean.shape) if _fits(draws, mean) else draws, targets)
    if variance is None:
        raise ValueError("`variance` or `samples` must be given for the coverage of intervals, got neither.")
    return gaussian_coverage(mean, _like(as_float(variance, "variance"), mean), targets)


def _fits(draws: Tensor, mean: Tensor) -> bool:
    """Whether (S, N) and (S, N, 1) differ only in the last, single axis."""
    return draws.ndim > 1 and draws.shape[1] == mean.shape[0] and draws[0].numel() == mean.numel() == mean.shape[0]


def _error_section(mean: Tensor, targets: Tensor, log_prob: Array | None) -> Sections:
    """Error, and likelihood where it is known."""
    scores = {"rmse": rmse(mean, targets)}
    if log_prob is not None:
        scores["nll"] = mean_log_loss(log_prob)
    num_outputs = mean[0].numel()
    return Sections(scores=scores, sizes={"examples": len(mean), "outputs": num_outputs})


def _coverage_section(coverage: Coverage, num_targets: int) -> Sections:
    """Coverage of each interval beside what chance alone would show, and its figure."""
    section = Sections()
    low, high = coverage_null(coverage.levels, num_targets)
    for level, share, bottom, top in zip(coverage.levels, coverage.coverage, low, high, strict=True):
        percent = round(100 * level.item())
        found = {"": share, "_null_low": bottom, "_null_high": top}
        section.scores |= {f"coverage_{percent}{suffix}": value.item() for suffix, value in found.items()}
        section.verdict.append(coverage_verdict(section.scores, percent))
    section.drawings["coverage"] = FigureSpec(
        title="Coverage of intervals",
        alt=" ".join(section.verdict),
        draw=lambda ax: coverage_plot(coverage, num_targets, ax=ax),
    )
    return section
