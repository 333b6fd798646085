"""Scores, calibration and the report of predicted real values: independent answers, levels and bands by simulation."""

import itertools
import json
import math
import re
import warnings

import numpy as np
import pytest
import scoringrules
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from real_data import real_file
from scipy.integrate import quad
from scipy.stats import binom, chi2, kstest, norm
from sklearn.linear_model import BayesianRidge

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.regression import scores
from bayes_kf.evaluation.regression.pit import ks_null, pit_band, pit_counts
from bayes_kf.evaluation.regression.quantile_calibration import QUANTILES

with warnings.catch_warnings():  # it holds escapes that newer Pythons warn of
    warnings.simplefilter("ignore")
    import uncertainty_toolbox

REPETITIONS = 2000
SIZES = (100, 1000, 10_000)
LEVEL_ERROR = 4 * (0.05 * 0.95 / REPETITIONS) ** 0.5  # four standard errors of a share of 5 %


def forecast(shape: tuple[int, ...], seed: int = 0, decimals: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right Gaussian forecasts of very different spread; few decimals make ties."""
    rng = np.random.default_rng(seed)
    mean, variance = rng.normal(size=shape).round(decimals), np.exp(rng.normal(size=shape)).round(decimals) + 0.1
    return mean, variance, rng.normal(mean, np.sqrt(variance)).round(decimals)


CASES = [((1,), 6), ((7,), 0), ((200,), 6), ((200,), 0), ((60, 1), 1), ((50, 3), 1)]


@pytest.mark.parametrize(("shape", "decimals"), CASES)
def test_gaussian_log_loss_is_scipys(shape, decimals):
    mean, variance, targets = forecast(shape, 1, decimals)
    expected = -norm.logpdf(targets, mean, np.sqrt(variance)).mean()
    assert ev.gaussian_log_loss(mean, variance, targets) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("z", [-9.0, -1.3, 0.0, 0.4, 6.0])
@pytest.mark.parametrize("sd", [1e-3, 1.0, 40.0])
def test_gaussian_crps_is_the_integral_that_defines_it(z, sd):
    def squared(t: float) -> float:
        return (norm.cdf(t) if t < z else norm.sf(t)) ** 2

    places = [-40, *sorted({-8.0, z, 8.0}), 40]
    parts = [quad(squared, a, b, epsabs=1e-13, epsrel=1e-13)[0] for a, b in itertools.pairwise(places)]
    result = ev.crps_gaussian(np.array([2.0]), np.array([sd**2]), np.array([2.0 + z * sd]))
    assert result == pytest.approx(sd * sum(parts), rel=1e-9)


@pytest.mark.parametrize(("shape", "decimals"), CASES)
@pytest.mark.parametrize("num_samples", [2, 3, 40])
def test_sample_crps_is_the_double_sum(shape, decimals, num_samples, monkeypatch):
    mean, variance, targets = forecast(shape, 2, decimals)
    draws = np.random.default_rng(3).normal(mean, np.sqrt(variance), (num_samples, *shape)).round(decimals)
    pairs = np.abs(draws[:, None] - draws[None]).sum((0, 1)) / (num_samples * (num_samples - 1))
    expected = (np.abs(draws - targets).mean(0) - pairs / 2).mean()
    assert ev.crps_samples(draws, targets) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(scores, "BLOCK", 5 * num_samples)  # five targets at a time
    assert ev.crps_samples(torch.as_tensor(draws), torch.as_tensor(targets)) == pytest.approx(expected, abs=1e-12)


def test_sample_crps_of_large_targets_keeps_its_precision():
    mean, variance, targets = forecast((200,), 6)
    draws = np.random.default_rng(7).normal(mean, np.sqrt(variance), (30, 200))
    draws, targets = draws.round(6), targets.round(6)  # so that the shift costs little by itself
    assert ev.crps_samples(draws + 1e6, targets + 1e6) == pytest.approx(ev.crps_samples(draws, targets), abs=1e-9)


@pytest.mark.parametrize("num_samples", [2, 5])
def test_sample_crps_averages_to_that_of_the_distribution(num_samples):
    mean, variance, targets = forecast((40_000,), 4)
    draws = np.random.default_rng(5).normal(mean, np.sqrt(variance), (num_samples, 40_000))
    each = np.array([ev.crps_samples(d, t) for d, t in zip(np.split(draws, 40, 1), np.split(targets, 40), strict=True)])
    standard_error = each.std(ddof=1) / 40**0.5
    assert abs(each.mean() - ev.crps_gaussian(mean, variance, targets)) < 5 * standard_error


@pytest.mark.parametrize(("shape", "decimals"), CASES)
def test_scores_are_those_of_other_libraries(shape, decimals):
    three = forecast(shape, 28, decimals)
    mean, variance, targets = (values.ravel() for values in three)
    sd = np.sqrt(variance)
    assert ev.gaussian_log_loss(*three) == pytest.approx(scoringrules.logs_normal(targets, mean, sd).mean(), abs=1e-9)
    assert ev.gaussian_log_loss(*three) == pytest.approx(uncertainty_toolbox.nll_gaussian(mean, sd, targets), abs=1e-9)
    assert ev.crps_gaussian(*three) == pytest.approx(uncertainty_toolbox.crps_gaussian(mean, sd, targets), abs=1e-9)
    assert ev.sharpness(three[1]) == pytest.approx(uncertainty_toolbox.sharpness(sd), abs=1e-9)
    draws = np.random.default_rng(29).normal(three[0], np.sqrt(three[1]), (30, *shape)).round(decimals)
    fair = scoringrules.crps_ensemble(targets, draws.reshape(30, -1), m_axis=0, estimator="fair").mean()  # O(S²)
    assert ev.crps_samples(draws, three[2]) == pytest.approx(fair, abs=1e-9)
    grid = np.linspace(0, 1, 41)  # its ends, which no forecast can miss, count there
    # there targets count that lie at or above a quantile: at or below it once all signs are changed
    error = uncertainty_toolbox.mean_absolute_calibration_error(-mean, sd, -targets, num_bins=41, prop_type="quantile")
    result = ev.quantile_calibration_error(ev.pit_gaussian(*three), grid[1:-1])
    assert result * 39 / 41 == pytest.approx(error, abs=1e-9)


def plain_ence(mean: np.ndarray, variance: np.ndarray, targets: np.ndarray, num_bins: int) -> tuple[float, list[int]]:
    """Bins and their errors written out: equal variances stay together with the first of them."""
    rows = sorted(zip(variance.ravel(), (targets - mean).ravel() ** 2, strict=True))
    starts = sorted({rows[k * len(rows) // num_bins][0] for k in range(num_bins)})
    bins: list[list[tuple[float, float]]] = [[] for _ in starts]
    for row in rows:
        bins[sum(start <= row[0] for start in starts) - 1].append(row)
    gaps = []
    for members in bins:
        predicted, result = (math.sqrt(sum(column) / len(members)) for column in zip(*members, strict=True))
        gaps.append(abs(predicted - result) / predicted)
    return sum(gaps) / len(gaps), [len(members) for members in bins]


@pytest.mark.parametrize(("shape", "decimals"), CASES)
@pytest.mark.parametrize("num_bins", [1, 3, 10])
def test_ence_is_the_one_written_out(shape, decimals, num_bins):
    mean, variance, targets = forecast(shape, 6, decimals)
    expected, counts = plain_ence(mean, variance, targets, num_bins)
    assert ev.expected_normalized_calibration_error(mean, variance, targets, num_bins) == pytest.approx(expected)
    assert ev.spread_bins(mean, variance, targets, num_bins).counts.tolist() == counts


def test_one_variance_for_all_is_one_bin():
    mean, _, targets = forecast((50,), 7)
    result = ev.expected_normalized_calibration_error(mean, np.full(50, 4.0), targets)
    assert result == pytest.approx(abs(1 - ev.rmse(mean, targets) / 2), abs=1e-12)


def test_sharpness_by_hand():
    assert ev.sharpness(np.array([[0.0, 4.0], [4.0, 8.0]])) == 2


@pytest.mark.parametrize("size", SIZES)
def test_ence_band_and_level(size):
    """Variances over four orders of magnitude; the band depends on them alone, so that it is made once."""
    rng = np.random.default_rng(8)
    variance = np.sort(np.exp(2 * rng.normal(size=size)))
    bins = variance.reshape(10, -1)  # sorted and without ties: the bins of equal mass
    noise = rng.normal(size=(REPETITIONS, size)).reshape(REPETITIONS, 10, -1)
    result = np.sqrt((bins * noise**2).mean(2) / bins.mean(1))
    ence = np.abs(1 - result).mean(1)
    zeros = np.zeros(size)
    band = ev.ence_test(zeros, variance, np.sqrt(variance) * noise[0].ravel())
    assert band.value == pytest.approx(ence[0], rel=1e-9)
    assert 0.93 <= ((band.null_low <= ence) & (ence <= band.null_high)).mean() <= 0.97
    assert band.null_mean == pytest.approx(ence.mean(), rel=0.03)
    p_values = [
        ev.ence_test(zeros, variance, np.sqrt(variance) * noise[r].ravel(), num_simulations=199).p_value
        for r in range(300)
    ]
    assert (np.array(p_values) <= 0.05).mean() == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 300) ** 0.5)


@pytest.mark.parametrize(("shape", "decimals"), CASES)
def test_gaussian_pit_is_the_distribution_function(shape, decimals):
    mean, variance, targets = forecast(shape, 9, decimals)
    result = ev.pit_gaussian(mean, variance, targets)
    assert result.shape == shape
    np.testing.assert_allclose(result, norm.cdf(targets, mean, np.sqrt(variance)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "decimals"), CASES)
def test_sample_pit_lies_between_the_ranks(shape, decimals, monkeypatch):
    mean, variance, targets = forecast(shape, 10, decimals)
    draws = np.random.default_rng(11).normal(mean, np.sqrt(variance), (9, *shape)).round(decimals)
    below, up_to = (draws < targets).sum(0) / 10, ((draws <= targets).sum(0) + 1) / 10
    result = ev.pit_samples(draws, targets).numpy()
    assert result.shape == shape
    assert ((below <= result) & (result <= up_to)).all()
    assert np.array_equal(result, ev.pit_samples(draws, targets).numpy())
    if result.size > 1:
        assert not np.array_equal(result, ev.pit_samples(draws, targets, seed=1).numpy())
    monkeypatch.setattr(scores, "BLOCK", 45)
    blocks = ev.pit_samples(draws, targets).numpy()
    assert ((below <= blocks) & (blocks <= up_to)).all()


@pytest.mark.parametrize("num_samples", [1, 4, 60])
@pytest.mark.parametrize("kind", ["gaussian", "counts"])
def test_sample_pit_of_right_forecasts_is_uniform_whatever_the_number_of_draws(num_samples, kind):
    rng = np.random.default_rng(12)
    size = (num_samples + 1, 100_000)
    values = rng.normal(size=size) if kind == "gaussian" else rng.poisson(1.5, size)
    counts = pit_counts(ev.pit_samples(values[1:], values[0]), 20).numpy()
    statistic = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2.sf(statistic, 19) > 1e-3


def test_pit_tests_are_those_of_scipy():
    pit = np.random.default_rng(13).beta(1.2, 1, 150)
    result, expected = ev.pit_test(pit), kstest(pit, "uniform")
    assert result == (pytest.approx(expected.statistic, abs=1e-12), pytest.approx(expected.pvalue, abs=1e-12))
    counts = np.histogram(pit, 10, (0, 1))[0]
    statistic = ((counts - 15) ** 2 / 15).sum()
    result = ev.pit_test(pit, "chi2", num_bins=10)
    assert result == (pytest.approx(statistic, abs=1e-12), pytest.approx(chi2.sf(statistic, 9), abs=1e-12))


@pytest.mark.parametrize("size", SIZES)
def test_pit_band_and_levels(size):
    """Values in order give the largest distances, counts of bins the χ² statistic: both written out for all at once."""
    uniform = np.sort(np.random.default_rng(14).random((REPETITIONS, size)), axis=1)
    steps = np.arange(size + 1) / size
    distance = np.maximum((steps[1:] - uniform).max(1), (uniform - steps[:-1]).max(1))
    low, high = ks_null(size)
    assert 0.93 <= ((low <= distance) & (distance <= high)).mean() <= 0.97
    counts = np.stack([np.histogram(row, 20, (0, 1))[0] for row in uniform])
    share_low, share_high = pit_band(size, 20)
    inside = (share_low * size - 1e-9 <= counts) & (counts <= share_high * size + 1e-9)
    assert 0.93 <= inside.mean() <= 0.97
    p_values = {method: [ev.pit_test(row, method).p_value for row in uniform[:400]] for method in ("ks", "chi2")}
    for method, values in p_values.items():
        error = 4 * (0.05 * 0.95 / 400) ** 0.5
        assert (np.array(values) < 0.05).mean() == pytest.approx(0.05, abs=error), method
    exact = [kstest(row, "uniform").statistic for row in uniform[:3]]
    assert distance[:3] == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_coverage_bands_hold_95_percent_as_near_as_whole_numbers_allow(size):
    """Exactly, from the binomial distribution, for every quantile, interval and bin of the report."""
    levels = np.array([*QUANTILES, *scores.LEVELS])
    low, high = (np.round(bound.numpy() * size) for bound in ev.coverage_null(levels, size))
    inside = binom.cdf(high, size, levels) - binom.cdf(low - 1, size, levels)
    assert (inside >= 0.93).all()
    assert (inside <= 0.97).all()


@pytest.mark.parametrize(("shape", "decimals"), CASES)
def test_quantile_coverage_counts_targets_below_their_quantiles(shape, decimals):
    mean, variance, targets = forecast(shape, 15, decimals)
    levels = np.linspace(0.01, 0.99, 50)
    result = ev.quantile_coverage(ev.pit_gaussian(mean, variance, targets), levels)
    below = [(targets <= norm.ppf(q, mean, np.sqrt(variance))).mean() for q in levels]
    assert result.quantiles.tolist() == levels.tolist()
    assert result.coverage.tolist() == pytest.approx(below, abs=1e-12)
    error = ev.quantile_calibration_error(ev.pit_gaussian(mean, variance, targets), levels)
    assert error == pytest.approx(np.abs(below - levels).mean(), abs=1e-12)


def test_quantile_coverage_of_samples_counts_targets_below_order_statistics():
    """Of 99 draws the k-th in order is the k/100-quantile."""
    mean, variance, targets = forecast((500,), 16)
    draws = np.random.default_rng(17).normal(mean, np.sqrt(variance), (99, 500))
    result = ev.quantile_coverage(ev.pit_samples(draws, targets))
    ordered = np.sort(draws, axis=0)
    expected = [(targets <= ordered[round(100 * q) - 1]).mean() for q in QUANTILES]
    assert result.coverage.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_quantile_calibration_band_and_level(size):
    uniform = np.random.default_rng(18).random((REPETITIONS, size))
    cells = np.stack([np.histogram(row, 20, (0, 1))[0] for row in uniform])
    errors = np.abs(cells.cumsum(1)[:, :-1] / size - np.array(QUANTILES)).mean(1)
    band = ev.quantile_calibration_test(uniform[0])
    assert band.value == pytest.approx(errors[0], abs=1e-12)
    assert 0.93 <= ((band.null_low <= errors) & (errors <= band.null_high)).mean() <= 0.97
    assert band.null_mean == pytest.approx(errors.mean(), rel=0.06)
    rejected = [ev.quantile_calibration_test(row, num_simulations=199).p_value <= 0.05 for row in uniform[:400]]
    assert np.mean(rejected) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 400) ** 0.5)


def test_quantiles_may_come_in_any_order_and_twice():
    pit = np.random.default_rng(19).random(200)
    once, mixed = ev.quantile_calibration_test(pit, (0.2, 0.7)), ev.quantile_calibration_test(pit, (0.7, 0.2, 0.2, 0.7))
    assert mixed.value == pytest.approx(once.value, abs=1e-12)
    assert mixed.null_high == pytest.approx(once.null_high, rel=0.1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "No deviation of the PIT values from uniform detected"),
        ({"spread": 4.0}, "forecasts are too wide"),
        ({"spread": 0.25}, "forecasts are too narrow"),
        ({"shift": 1.0}, "upper half of their forecasts, so the forecasts are too low"),
        ({"shift": -1.0}, "lower half of their forecasts, so the forecasts are too high"),
    ],
)
def test_verdict_says_in_which_way_forecasts_are_wrong(change, sentence):
    mean, variance, targets = forecast((2000,), 20)
    report = ev.evaluate_regression(mean - change.get("shift", 0), targets, variance=change.get("spread", 1) * variance)
    said = report.sections.verdict
    assert sum(bool(re.search(sentence, line)) for line in said) == 1
    assert (report.scores["pit_ks"] > report.scores["pit_ks_null_high"]) == bool(change)
    assert (report.scores["ence"] > report.scores["ence_null_high"]) == bool(change)


@pytest.mark.parametrize("shape", [(300,), (300, 1), (150, 2)])
@pytest.mark.parametrize("by_samples", [False, True])
def test_report_holds_the_scores_of_the_functions(shape, by_samples):
    mean, variance, targets = forecast(shape, 21)
    draws = np.random.default_rng(22).normal(mean, np.sqrt(variance), (99, *shape)) if by_samples else None
    report = ev.evaluate_regression(mean, targets, variance=variance, samples=draws, num_simulations=200)
    scores = report.scores
    assert scores["rmse"] == pytest.approx(ev.rmse(mean, targets))
    assert scores["nll"] == pytest.approx(ev.gaussian_log_loss(mean, variance, targets))
    assert scores["sharpness"] == pytest.approx(ev.sharpness(variance))
    assert scores["ence"] == pytest.approx(ev.expected_normalized_calibration_error(mean, variance, targets))
    crps = ev.crps_samples(draws, targets) if by_samples else ev.crps_gaussian(mean, variance, targets)
    assert scores["crps"] == pytest.approx(crps)
    for name in ("rmse", "nll", "crps"):
        assert f"{name}_low" not in scores  # no interval of theirs covers where errors have heavy tails
    pit = ev.pit_samples(draws, targets) if by_samples else ev.pit_gaussian(mean, variance, targets)
    assert (scores["pit_ks"], scores["pit_ks_p_value"]) == ev.pit_test(pit)
    quantiles = ev.quantile_calibration_test(pit, num_simulations=200)
    assert [scores[f"quantile_error{s}"] for s in ("", "_null_mean", "_null_low", "_null_high", "_p_value")] == list(
        quantiles
    )
    assert ("ence_null_high" in scores) == (not by_samples)
    assert set(report.sections.drawings) == {"predictions", "coverage", "pit", "quantiles"}
    assert report.sections.sizes == {"examples": shape[0], "outputs": shape[-1] if len(shape) == 2 else 1}
    json.loads(report.to_json())


def test_report_takes_vectors_for_single_columns():
    mean, variance, targets = forecast((200, 1), 23)
    expected = ev.evaluate_regression(mean, targets, variance=variance).scores
    assert ev.evaluate_regression(mean, targets[:, 0], variance=variance[:, 0]).scores == expected
    assert ev.evaluate_regression(mean[:, 0], targets, variance=variance).scores == expected


def test_joint_log_probabilities_are_divided_among_the_outputs():
    mean, variance, targets = forecast((80, 3), 24)
    joint = norm.logpdf(targets, mean, np.sqrt(variance)).sum(1)
    result = ev.evaluate_regression(mean, targets, variance=variance, log_prob=joint).scores
    plain = ev.evaluate_regression(mean, targets, variance=variance).scores
    assert result["nll"] == pytest.approx(plain["nll"])


def test_a_report_of_samples_alone_has_no_log_loss_and_takes_draws_that_are_all_alike():
    draws, targets = np.zeros((50, 20)), np.zeros(20)
    scores = ev.evaluate_regression(np.zeros(20), targets, samples=draws).scores
    assert scores["crps"] == scores["sharpness"] == 0
    assert not {"nll", "ence"} & set(scores)
    assert "nll" not in ev.evaluate_regression(np.zeros(20), targets, samples=draws + np.arange(50)[:, None]).scores


def test_one_target_has_a_report():
    html = ev.evaluate_regression(np.zeros(1), np.ones(1), variance=np.ones(1)).to_html()
    assert "PIT histogram" in html


def test_figures_stand_in_tables_too():
    mean, variance, targets = forecast((400,), 25)
    report = ev.evaluate_regression(mean, targets, variance=variance)
    drawn = [spec.table for spec in report.sections.drawings.values()]
    tables = {table.caption: table for table in (*report.sections.tables, *drawn) if table is not None}
    assert set(tables) == {
        "Predicted standard deviation and error",
        "Predicted and actual",
        "Coverage of intervals",
        "PIT histogram",
        "Coverage of quantiles",
    }
    pit = ev.pit_gaussian(mean, variance, targets)
    assert [row[1].value for row in tables["PIT histogram"].rows] == pit_counts(pit, 20).tolist()
    assert {row[2].text for row in tables["PIT histogram"].rows} == {"12 to 28"}  # of Binomial(400, 1/20)
    shares = [row[1].value for row in tables["Coverage of quantiles"].rows]
    assert shares == ev.quantile_coverage(pit).coverage.tolist()
    bins = ev.spread_bins(mean, variance, targets)
    errors = [row[3].value for row in tables["Predicted standard deviation and error"].rows]
    assert errors == bins.found_sd.tolist()


@pytest.fixture
def ax() -> Axes:
    return Figure().subplots()


def test_pit_histogram_draws_densities_and_band(ax):
    pit = np.random.default_rng(26).random(400)
    assert ev.pit_histogram(pit, num_bins=8, ax=ax) is ax
    assert [bar.get_height() for bar in ax.containers[0]] == pytest.approx((pit_counts(pit, 8) / 50).tolist())
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    low, high = pit_band(400, 8)
    assert (heights.min(), heights.max()) == (pytest.approx(8 * low), pytest.approx(8 * high))
    assert ax.collections[0].get_hatch()


def test_quantile_coverage_plot_draws_shares_and_band(ax):
    coverage = ev.QuantileCoverage(torch.tensor([0.25, 0.5]), torch.tensor([0.3, 0.4]))
    ev.quantile_coverage_plot(coverage, 200, ax=ax)
    assert ax.get_lines()[0].get_ydata() == pytest.approx([0.3, 0.4])
    low, high = ev.coverage_null(coverage.quantiles, 200)
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(low[0].item()), pytest.approx(high[1].item()))


BAD = [
    (lambda m, v, t: ev.crps_gaussian(m, -v, t), r"^`variance` must be positive, got -"),
    (
        lambda m, v, t: ev.gaussian_log_loss(m, v[:2], t),
        r"^`targets` must have the shape of `variance`, \(2,\), got \(4,\)\.$",
    ),
    (lambda m, v, t: ev.pit_gaussian(m, v, t * math.nan), r"^`targets` must be finite, got 4 bad of 4 values\.$"),
    (lambda m, v, t: ev.sharpness(-v), r"^`variance` must not be negative, got -"),
    (lambda m, v, t: ev.crps_samples(m[None], t), r"^`samples` must hold at least 2 draws .*, got shape \(1, 4\)\.$"),
    (
        lambda m, v, t: ev.pit_samples(m[None, :3], t),
        r"^`targets` must have the shape of `samples\[0\]`, \(3,\), got \(4,\)",
    ),
    (
        lambda m, v, t: ev.crps_samples(np.stack([m, m * np.inf]), t),
        r"^`samples` must be finite, got 4 bad of 8 values",
    ),
    (lambda m, v, t: ev.pit_test(m), r"^`pit` must lie in 0\.\.1, got values in -"),
    (lambda m, v, t: ev.pit_test(v / v.max(), "ad"), r"^`method` must be one of ks, chi2, got 'ad'\.$"),
    (
        lambda m, v, t: ev.pit_test(np.full(99, 0.5), "chi2"),
        r"^`num_bins` must be 2 to 19, so that 5 of 99 values .*, got 20",
    ),
    (
        lambda m, v, t: ev.quantile_coverage(np.ones(1), (0.5, 1.0)),
        r"^`quantiles` must lie strictly between 0 and 1, got",
    ),
    (lambda m, v, t: ev.quantile_coverage(np.ones(0)), r"^`pit` must not be empty, got shape \(0,\)\.$"),
    (
        lambda m, v, t: ev.quantile_calibration_test(np.ones(1), num_simulations=9),
        r"^`num_simulations` must be at least 39",
    ),
    (lambda m, v, t: ev.spread_bins(m, v, t, 0), r"^`num_bins` must be a positive integer, got 0\.$"),
    (
        lambda m, v, t: ev.coverage_null(np.array([1.5]), 10),
        r"^`levels` must lie in 0\.\.1, got values in 1\.5\.\.1\.5\.$",
    ),
    (
        lambda m, v, t: ev.evaluate_regression(m[0], t, variance=v),
        r"^`mean` must have shape \(N,\) or \(N, m\), got \(\)\.$",
    ),
    (
        lambda m, v, t: ev.evaluate_regression(m, t[:3], variance=v),
        r"^`targets` must have the shape of `mean`, \(4,\), got",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    mean, variance, targets = forecast((4,), 27)
    with pytest.raises(ValueError, match=message):
        call(mean, variance, targets)


@pytest.mark.real
@pytest.mark.parametrize("name", ["yacht", "concrete"])
def test_bayesian_linear_regression_on_uci(name):
    """Twenty splits each; scores are those of other libraries, and the report is made."""
    with np.load(real_file("uci-regression/uci.npz")) as data:
        x, y, splits = (
            data[f"{name}.{part}"].astype(np.int64 if part == "test" else float) for part in ("x", "y", "test")
        )
    predictions = []
    for test in splits:
        train = np.setdiff1d(np.arange(len(y)), test)
        scaled = (x - x[train].mean(0)) / x[train].std(0)
        mean, sd = BayesianRidge().fit(scaled[train], y[train]).predict(scaled[test], return_std=True)
        predictions.append((mean, sd**2, y[test]))
    for mean, variance, targets in predictions:
        sd = np.sqrt(variance)
        log_loss = scoringrules.logs_normal(targets, mean, sd).mean()
        crps = uncertainty_toolbox.crps_gaussian(mean, sd, targets)
        assert ev.gaussian_log_loss(mean, variance, targets) == pytest.approx(log_loss, rel=1e-9)
        assert ev.crps_gaussian(mean, variance, targets) == pytest.approx(crps, rel=1e-9)
        assert ev.sharpness(variance) == pytest.approx(uncertainty_toolbox.sharpness(sd), rel=1e-9)
        error = uncertainty_toolbox.mean_absolute_calibration_error(
            -mean, sd, -targets, num_bins=21, prop_type="quantile"
        )
        assert ev.quantile_calibration_error(ev.pit_gaussian(mean, variance, targets)) * 19 / 21 == pytest.approx(error)
        expected, _ = plain_ence(mean, variance, targets, 10)
        assert ev.expected_normalized_calibration_error(mean, variance, targets) == pytest.approx(expected, rel=1e-9)
    pooled = np.concatenate([mean - targets for mean, _, targets in predictions])
    assert 0 < np.sqrt(np.mean(pooled**2)) < 0.7 * y.std()  # better than no regression at all
    mean, variance, targets = predictions[0]
    report = ev.evaluate_regression(mean, targets, variance=variance, title=name)
    assert report.scores["rmse"] == pytest.approx(np.sqrt(np.mean((mean - targets) ** 2)))
    assert "PIT histogram" in report.to_html()


def test_more_log_probabilities_than_targets_are_refused():
    with pytest.raises(ValueError, match=r"^`log_prob` must have at most 6 values, one a target, got 12\.$"):
        ev.evaluate_regression(
            torch.zeros(6), torch.arange(6.0), variance=torch.ones(6), log_prob=-torch.ones(12), num_simulations=39
        )
