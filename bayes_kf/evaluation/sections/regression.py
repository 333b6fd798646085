"""Sections of a report on a regression: errors, spread, coverage of intervals, PIT values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector
from bayes_kf.evaluation.plots.regression import coverage_plot, pit_histogram, prediction_plot, quantile_coverage_plot
from bayes_kf.evaluation.regression.crps import gaussian_crps, sample_crps
from bayes_kf.evaluation.regression.ence import ence_test, expected_normalized_calibration_error, sharpness, spread_bins
from bayes_kf.evaluation.regression.pit import (
    NUM_BINS,
    ks_null,
    pit_band,
    pit_counts,
    pit_gaussian,
    pit_samples,
    pit_test,
)
from bayes_kf.evaluation.regression.quantile_calibration import (
    QuantileCoverage,
    quantile_calibration_test,
    quantile_coverage,
)
from bayes_kf.evaluation.regression.scores import (
    Coverage,
    check_gaussian,
    coverage_null,
    gaussian_coverage,
    gaussian_log_losses,
    interval_coverage,
)
from bayes_kf.evaluation.report.contents import FigureSpec, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, Table, make_table, range_cell
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.verdicts.phrases import percent
from bayes_kf.evaluation.sections.verdicts.regression import coverage_verdict, ence_verdict, pit_verdict

NORMAL_80 = 1.2815515655446004  # 90 % quantile of the standard normal distribution
NUM_PARTS = 10  # of the table of predictions
MIN_TARGETS_PER_BIN = 10  # of the PIT histogram; few targets get few bins


@dataclass(frozen=True)
class Forecast:
    """Checked predictions and targets, all (N,) or all (N, m); samples (S, N) or (S, N, m)."""

    mean: Tensor
    targets: Tensor
    variance: Tensor | None
    samples: Tensor | None

    @property
    def spread_var(self) -> Tensor:
        """The predictive variances; without given ones, the variances of the samples."""
        if self.variance is not None:
            return self.variance
        assert self.samples is not None  # a forecast has a variance or samples
        return self.samples.var(dim=0)

    @property
    def num_targets(self) -> int:
        """Number of targets over all examples and outputs."""
        return self.targets.numel()


def error_section(forecast: Forecast, log_prob: Array | None) -> Sections:
    """RMSE, CRPS and, if it is known, the log loss.

    They have no intervals: squared errors and log densities are unbounded, and with heavy-tailed errors or outliers no
    interval that was tested covers the true mean in 90 % of data sets.
    """
    losses = example_losses(forecast, log_prob)
    scores = {"rmse": Score(losses.pop("mse").mean().item() ** 0.5)}
    scores |= {name: Score(values.mean().item()) for name, values in losses.items()}
    return Sections(scores=scores, sizes={"examples": len(forecast.mean), "outputs": forecast.mean[0].numel()})


def example_losses(forecast: Forecast, log_prob: Array | None) -> dict[str, Tensor]:
    """Squared error, log loss if it is known, and CRPS of each example, the mean over its outputs, (N,)."""
    mean, targets, variance = forecast.mean, forecast.targets, forecast.variance
    losses = {"mse": (mean - targets).square()}
    if log_prob is not None:
        joint = -as_vector(log_prob, "log_prob", allow_infinite=True)
        if len(joint) > forecast.num_targets:
            raise ValueError(
                f"`log_prob` must have at most {forecast.num_targets} values, one a target, got {len(joint)}."
            )
        losses["nll"] = joint * (len(joint) / forecast.num_targets)  # it may be the joint one of several outputs
    elif variance is not None:
        losses["nll"] = gaussian_log_losses(*check_gaussian(mean, variance, targets))
    losses["crps"] = _crps(forecast)
    return {name: values.reshape(len(values), -1).mean(dim=1) for name, values in losses.items()}


def spread_section(forecast: Forecast, settings: NullSettings) -> Sections:
    """Sharpness, and the predicted standard deviations beside the observed errors in bins."""
    section = Sections(scores={"sharpness": Score(sharpness(forecast.spread_var))})
    moments = (forecast.mean, forecast.spread_var, forecast.targets)
    if forecast.samples is None:
        test = ence_test(*moments, num_simulations=settings.num_simulations, seed=settings.seed)
        section.scores["ence"] = test.score()
    elif forecast.spread_var.min() <= 0:  # all samples of a target are equal
        return section
    else:  # the null distribution depends on the shape of the forecasts, which samples do not tell
        section.scores["ence"] = Score(expected_normalized_calibration_error(*moments))
    sentence = ence_verdict(section.scores["ence"])
    section.verdict += [sentence] if sentence else []
    bins = spread_bins(*moments)
    rows = [(k + 1, *row) for k, row in enumerate(zip(*(column.tolist() for column in bins), strict=True))]
    header = ("Bin, by increasing sd", "Targets", "Predicted sd", "Root mean squared error")
    section.tables.append(make_table("Predicted standard deviation and error", header, rows))
    return section


def prediction_section(forecast: Forecast) -> Sections:
    """Targets against predictions, with 80 % intervals."""
    if forecast.samples is not None:
        low, high = (forecast.samples.quantile(level, dim=0) for level in (0.1, 0.9))
    else:
        half = NORMAL_80 * forecast.spread_var.sqrt()
        low, high = forecast.mean - half, forecast.mean + half
    is_inside = (low <= forecast.targets) & (forecast.targets <= high)
    figure = FigureSpec(
        title="Predicted and actual",
        alt=f"Targets against predictions; {percent(is_inside.double().mean().item())} lie in their 80 % intervals.",
        draw=lambda ax: prediction_plot(forecast.mean, forecast.targets, low, high, ax=ax),
        height=4.8,
        table=_prediction_table(forecast, is_inside),
    )
    return Sections(drawings={"predictions": figure})


def _prediction_table(forecast: Forecast, is_inside: Tensor) -> Table:
    """Predictions in order, cut into parts of equal size: mean target, error, and share of targets inside."""
    order = forecast.mean.flatten().argsort(stable=True)
    mean, targets, inside = (values.flatten()[order] for values in (forecast.mean, forecast.targets, is_inside))
    rows = []
    for part in torch.arange(len(order)).tensor_split(min(NUM_PARTS, len(order))):
        own, actual = mean[part], targets[part]
        error = (actual - own).square().mean().sqrt().item()
        shares = (own.mean().item(), actual.mean().item(), error, inside[part].double().mean().item())
        rows.append((range_cell(own[0].item(), own[-1].item()), len(part), *shares))
    header = ("Predictions from", "Targets", "Mean prediction", "Mean target", "Root mean squared error", "Inside 80 %")
    return make_table("Predicted and actual", header, rows)


def coverage_section(forecast: Forecast) -> Sections:
    """Coverage of each interval beside its null band, and its figure."""
    section, num_targets = Sections(), forecast.num_targets
    coverage = _coverage(forecast)
    low, high = coverage_null(coverage.levels, num_targets)
    for level, share, *null_band in zip(coverage.levels, coverage.coverage, low, high, strict=True):
        percent = round(100 * level.item())
        score = Score(share.item(), null_band=Interval(*(end.item() for end in null_band)))
        section.scores[f"coverage_{percent}"] = score
        section.verdict.append(coverage_verdict(score, percent))
    header = ("Level of the interval", "Share of targets inside", "Null band")
    section.drawings["coverage"] = FigureSpec(
        title="Coverage of intervals",
        alt=" ".join(section.verdict),
        draw=lambda ax: coverage_plot(coverage, num_targets, ax=ax),
        table=_share_table("Coverage of intervals", header, coverage, low, high),
    )
    return section


def pit_section(forecast: Forecast, settings: NullSettings) -> Sections:
    """PIT values: test, histogram and quantiles."""
    pit = pit_values(forecast, settings.seed).flatten()
    test = pit_test(pit)
    score = Score(test.statistic, null_band=Interval(*ks_null(len(pit))), p_value=test.p_value)
    sentence = pit_verdict(score, *pit_shape(pit))
    num_bins = max(1, min(NUM_BINS, len(pit) // MIN_TARGETS_PER_BIN))
    table, num_outside = _pit_table(pit, num_bins)
    histogram = FigureSpec(
        title="PIT histogram",
        alt=f"{len(pit):,} PIT values in {num_bins} bins, {num_outside} of them outside their null band. {sentence}",
        draw=lambda ax: pit_histogram(pit, num_bins=num_bins, ax=ax),
        table=table,
    )
    section = Sections(scores={"pit_ks": score}, tested=["pit_ks"], verdict=[sentence], drawings={"pit": histogram})
    return section + _quantile_section(pit, settings)


def _quantile_section(pit: Tensor, settings: NullSettings) -> Sections:
    """Share of targets below each predicted quantile."""
    test = quantile_calibration_test(pit, num_simulations=settings.num_simulations, seed=settings.seed)
    coverage, num_targets = quantile_coverage(pit), len(pit)
    low, high = coverage_null(coverage.quantiles, num_targets)
    num_inside = int(((low <= coverage.coverage) & (coverage.coverage <= high)).sum())
    header = ("Level of the quantile", "Share of targets below", "Null band")
    figure = FigureSpec(
        title="Coverage of quantiles",
        alt=f"Share of targets below each of {len(low)} predicted quantiles; {num_inside} lie inside their null band. "
        f"The mean absolute difference is {test.value:.3f} (null band up to {test.null_high:.3f}).",
        draw=lambda ax: quantile_coverage_plot(coverage, num_targets, ax=ax),
        table=_share_table("Coverage of quantiles", header, coverage, low, high),
    )
    return Sections(scores={"quantile_error": test.score()}, drawings={"quantiles": figure})


def _crps(forecast: Forecast) -> Tensor:
    """CRPS of the samples; without samples, of N(mean, variance)."""
    if forecast.samples is not None:
        return sample_crps(forecast.samples, forecast.targets)
    return gaussian_crps(*check_gaussian(forecast.mean, forecast.spread_var, forecast.targets))


def _coverage(forecast: Forecast) -> Coverage:
    """Interval coverage of the samples; without samples, of N(mean, variance)."""
    if forecast.samples is not None:
        return interval_coverage(forecast.samples, forecast.targets)
    return gaussian_coverage(forecast.mean, forecast.spread_var, forecast.targets)


def pit_values(forecast: Forecast, seed: int) -> Tensor:
    """PIT values of the samples; without samples, of N(mean, variance)."""
    if forecast.samples is not None:
        return pit_samples(forecast.samples, forecast.targets, seed)
    return pit_gaussian(forecast.mean, forecast.spread_var, forecast.targets)


def pit_shape(pit: Tensor) -> tuple[float, float]:
    """Mean, and variance about ½, of PIT values minus those of uniform values, in standard errors."""
    centred = pit - 0.5
    mean_z = centred.mean() * (12 * len(pit)) ** 0.5
    variance_z = (centred.square().mean() - 1 / 12) * (180 * len(pit)) ** 0.5
    return mean_z.item(), variance_z.item()


def _pit_table(pit: Tensor, num_bins: int) -> tuple[Table, int]:
    """The bins of the histogram, and how many of them lie outside their null band."""
    counts = pit_counts(pit, num_bins)
    low, high = (round(share * len(pit)) for share in pit_band(len(pit), num_bins))
    rows = [
        (range_cell(k / num_bins, (k + 1) / num_bins, decimals=2), count, Cell(f"{low:,} to {high:,}", low))
        for k, count in enumerate(counts.tolist())
    ]
    table = make_table("PIT histogram", ("PIT between", "Targets", "Null band"), rows)
    return table, int(((counts < low) | (counts > high)).sum())


def _share_table(
    caption: str, header: tuple[str, ...], coverage: Coverage | QuantileCoverage, low: Tensor, high: Tensor
) -> Table:
    """Levels, shares and their null bands."""
    columns: list[list[float]] = torch.stack([*coverage, low, high]).T.tolist()
    rows = [
        (Cell(f"{level:.2f}", level), share, range_cell(*null_band, decimals=4)) for level, share, *null_band in columns
    ]
    return make_table(caption, header, rows)
