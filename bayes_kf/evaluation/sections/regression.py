"""The parts of a report on real values."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector
from bayes_kf.evaluation.plots.regression import coverage_plot, pit_band, pit_histogram, quantile_coverage_plot
from bayes_kf.evaluation.regression.crps import gaussian_crps, sample_crps
from bayes_kf.evaluation.regression.ence import ence_test, expected_normalized_calibration_error, sharpness, spread_bins
from bayes_kf.evaluation.regression.pit import NUM_BINS, ks_null, pit_counts, pit_gaussian, pit_samples, pit_test
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
from bayes_kf.evaluation.report.html_page import table_text
from bayes_kf.evaluation.report.report import FigureSpec, Sections, Table
from bayes_kf.evaluation.sections.verdicts import coverage_verdict, pit_verdict, spread_verdict

FEWEST_IN_BIN = 10  # targets expected in a bin of the PIT histogram; fewer targets get fewer bins


@dataclass(frozen=True)
class Forecast:
    """Checked predictions and what came, all (N,) or all (N, m); draws (S, N) or (S, N, m)."""

    mean: Tensor
    targets: Tensor
    variance: Tensor | None
    samples: Tensor | None

    @property
    def spread_var(self) -> Tensor:
        """The predictive variances, those of the draws where none are given."""
        if self.variance is not None:
            return self.variance
        assert self.samples is not None  # one of them is
        return self.samples.var(dim=0)

    @property
    def num_targets(self) -> int:
        """Number of targets over all examples and outputs."""
        return self.targets.numel()


@dataclass(frozen=True)
class Simulation:
    """How chance is simulated."""

    num_simulations: int
    seed: int


def error_section(forecast: Forecast, log_prob: Array | None) -> Sections:
    """Error, log loss where it is known, and CRPS.

    They have no intervals: squared errors and log densities have no bounds, and every interval that was tried covered
    the true mean in less than 90 % of data sets where errors have heavy tails or outliers.
    """
    mean, targets, variance = forecast.mean, forecast.targets, forecast.variance
    losses = {"rmse": (mean - targets).square()}
    if log_prob is not None:
        joint = -as_vector(log_prob, "log_prob", allow_infinite=True)
        if len(joint) > forecast.num_targets:
            raise ValueError(
                f"`log_prob` must have at most {forecast.num_targets} values, one a target, got {len(joint)}."
            )
        losses["nll"] = joint * (len(joint) / forecast.num_targets)  # of several outputs: divided among them
    elif variance is not None:
        losses["nll"] = gaussian_log_losses(*check_gaussian(mean, variance, targets))
    losses["crps"] = _crps(forecast)
    scores: dict[str, float] = {}
    for name, values in losses.items():
        of_examples = values.reshape(len(values), -1).mean(dim=1)
        value = of_examples.mean().item()
        scores[name] = value**0.5 if name == "rmse" else value
    return Sections(scores=scores, sizes={"examples": len(mean), "outputs": mean[0].numel()})


def spread_section(forecast: Forecast, chance: Simulation) -> Sections:
    """How wide forecasts are, and whether errors are as wide where forecasts are narrow and where they are wide."""
    three = (forecast.mean, forecast.spread_var, forecast.targets)
    section = Sections(scores={"sharpness": sharpness(forecast.spread_var)})
    if forecast.samples is None:
        test = ence_test(*three, num_simulations=chance.num_simulations, seed=chance.seed)
        section.scores |= test.score().flat("ence")
    elif forecast.spread_var.min() <= 0:  # draws that are all alike
        return section
    else:  # draws of any shape: how far chance takes their squared errors is not known
        section.scores["ence"] = expected_normalized_calibration_error(*three)
    sentence = spread_verdict(section.scores)
    section.verdict += [sentence] if sentence else []
    bins = spread_bins(*three)
    rows = [(f"{k + 1}", *row) for k, row in enumerate(zip(*(column.tolist() for column in bins), strict=True))]
    header = ("From surest to least sure", "Targets", "Predicted sd", "Root mean squared error")
    section.tables.append(Table("Predicted spread and error", header, tuple(table_text(row) for row in rows)))
    return section


def coverage_section(forecast: Forecast) -> Sections:
    """Coverage of each interval beside what chance alone would show, and its figure."""
    section, num_targets = Sections(), forecast.num_targets
    coverage = _coverage(forecast)
    low, high = coverage_null(coverage.levels, num_targets)
    for level, share, bottom, top in zip(coverage.levels, coverage.coverage, low, high, strict=True):
        percent = round(100 * level.item())
        found = {"": share, "_null_low": bottom, "_null_high": top}
        section.scores |= {f"coverage_{percent}{suffix}": value.item() for suffix, value in found.items()}
        section.verdict.append(coverage_verdict(section.scores, percent))
    header = ("Level of the interval", "Share of targets inside", "Chance alone")
    section.drawings["coverage"] = FigureSpec(
        title="Coverage of intervals",
        alt=" ".join(section.verdict),
        draw=lambda ax: coverage_plot(coverage, num_targets, ax=ax),
        table=_share_table("Coverage of intervals", header, coverage, low, high),
    )
    return section


def pit_section(forecast: Forecast, chance: Simulation) -> Sections:
    """Where targets fall in their forecasts: test, histogram and quantiles."""
    pit = _pit(forecast, chance.seed).flatten()
    test, (low, high) = pit_test(pit), ks_null(len(pit))
    scores = {
        "pit_ks": test.statistic,
        "pit_ks_null_low": low,
        "pit_ks_null_high": high,
        "pit_ks_p_value": test.p_value,
    }
    sentence = pit_verdict(scores, *_shape(pit))
    num_bins = max(1, min(NUM_BINS, len(pit) // FEWEST_IN_BIN))
    table, outside = _pit_table(pit, num_bins)
    histogram = FigureSpec(
        title="PIT histogram",
        alt=f"{len(pit):,} PIT values in {num_bins} bins, {outside} of them outside the band of chance. {sentence}",
        draw=lambda ax: pit_histogram(pit, num_bins=num_bins, ax=ax),
        table=table,
    )
    section = Sections(scores=scores, verdict=[sentence], drawings={"pit": histogram})
    return section + _quantile_section(pit, chance)


def _quantile_section(pit: Tensor, chance: Simulation) -> Sections:
    """Share of targets below each predicted quantile."""
    test = quantile_calibration_test(pit, num_simulations=chance.num_simulations, seed=chance.seed)
    coverage, num_targets = quantile_coverage(pit), len(pit)
    low, high = coverage_null(coverage.quantiles, num_targets)
    inside = int(((low <= coverage.coverage) & (coverage.coverage <= high)).sum())
    header = ("Level of the quantile", "Share of targets below", "Chance alone")
    figure = FigureSpec(
        title="Coverage of quantiles",
        alt=f"Share of targets below each of {len(low)} predicted quantiles: {inside} lie inside the band of chance; "
        f"off by {test.value:.3f} on average, where chance alone would show up to {test.null_high:.3f}.",
        draw=lambda ax: quantile_coverage_plot(coverage, num_targets, ax=ax),
        table=_share_table("Coverage of quantiles", header, coverage, low, high),
    )
    return Sections(
        scores=test.score().flat("quantile_error"),
        drawings={"quantiles": figure},
    )


def _crps(forecast: Forecast) -> Tensor:
    """CRPS by samples, or by the Gaussian of the two moments."""
    if forecast.samples is not None:
        return sample_crps(forecast.samples, forecast.targets)
    return gaussian_crps(*check_gaussian(forecast.mean, forecast.spread_var, forecast.targets))


def _coverage(forecast: Forecast) -> Coverage:
    """Coverage by samples, or by the Gaussian of the two moments."""
    if forecast.samples is not None:
        return interval_coverage(forecast.samples, forecast.targets)
    return gaussian_coverage(forecast.mean, forecast.spread_var, forecast.targets)


def _pit(forecast: Forecast, seed: int) -> Tensor:
    """PIT values by samples, or by the Gaussian of the two moments."""
    if forecast.samples is not None:
        return pit_samples(forecast.samples, forecast.targets, seed)
    return pit_gaussian(forecast.mean, forecast.spread_var, forecast.targets)


def _shape(pit: Tensor) -> tuple[float, float]:
    """Mean and variance about ½ of PIT values less those of uniform ones, in standard errors."""
    centred = pit - 0.5
    mean_z = centred.mean() * (12 * len(pit)) ** 0.5
    spread_z = (centred.square().mean() - 1 / 12) * (180 * len(pit)) ** 0.5
    return mean_z.item(), spread_z.item()


def _pit_table(pit: Tensor, num_bins: int) -> tuple[Table, int]:
    """The bins of the histogram, and how many of them lie outside the band of chance."""
    counts = pit_counts(pit, num_bins)
    low, high = (round(share * len(pit)) for share in pit_band(len(pit), num_bins))
    rows = [
        (f"{k / num_bins:.2f} to {(k + 1) / num_bins:.2f}", f"{count:,}", f"{low:,} to {high:,}")
        for k, count in enumerate(counts.tolist())
    ]
    table = Table("PIT histogram", ("PIT between", "Targets", "Chance alone"), tuple(rows))
    return table, int(((counts < low) | (counts > high)).sum())


def _share_table(
    caption: str, header: tuple[str, ...], found: Coverage | QuantileCoverage, low: Tensor, high: Tensor
) -> Table:
    """Levels, shares and their bands."""
    columns: Iterable[tuple[float, ...]] = torch.stack([*found, low, high]).T.tolist()
    rows = [(f"{level:.2f}", *table_text((share,)), f"{a:.4f} to {b:.4f}") for level, share, a, b in columns]
    return Table(caption, header, tuple(rows))
