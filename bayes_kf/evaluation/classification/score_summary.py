"""Calibration scores by name, each beside its null band, and the one that is tested.

Seven errors that each leave their 95 % band by chance in 5 % of data sets leave it together in 14 to 25 %. Therefore
only the smooth error is tested; the others are numbers beside their bands. Of the errors that see every kind of
miscalibration it has the most power (`benchmarks/quality/interval_coverage.py`), and it needs no bins. Spiegelhalter's test has
more against over- and under-confidence, but does not see what leaves the mean Brier score as expected.
"""

from bayes_kf.evaluation.calibration.confidence_profile import Profile
from bayes_kf.evaluation.calibration.intervals import Interval, bounded_interval
from bayes_kf.evaluation.calibration.null_distribution import Calibrated, CalibrationTest, profile_tests
from bayes_kf.evaluation.classification.scores import BrierParts
from bayes_kf.evaluation.resampling.binning import Binning

PRIMARY = "ece_smooth"  # the calibration score that a report tests
LEVEL = 0.95
STATISTICS: dict[str, tuple[str, Binning]] = {  # name of the score to statistic and binning
    "confidence_gap": ("gap", "equal_width"),
    "ece": ("ece", "equal_width"),
    "ece_equal_mass": ("ece", "equal_mass"),
    "ece_debiased": ("debiased", "equal_mass"),
    "ece_smooth": ("smooth", "equal_width"),
    "ks": ("ks", "equal_width"),
    "mce": ("mce", "equal_width"),
}


def calibration_scores(
    profile: Profile, top_k: int, num_bins: int, num_simulations: int, seed: int
) -> dict[str, float]:
    """All scores of a top-label profile; of more than one class together only the ECE, named `ece_top5` and so on."""
    chosen = STATISTICS if top_k == 1 else {f"ece_top{top_k}": STATISTICS["ece"]}
    statistics = tuple(chosen.values())
    tests = profile_tests(profile, statistics, num_bins, num_simulations, seed, LEVEL)
    scores: dict[str, float] = {}
    for name, test in zip(chosen, tests, strict=True):
        scores |= with_chance(name, test)
    if top_k == 1:
        scores |= ends("confidence_gap", _gap_interval(profile))
    return scores


def _gap_interval(profile: Profile) -> Interval:
    """Interval of mean confidence minus accuracy."""
    mean = profile.confidence_sum / profile.counts
    squares = mean * profile.confidence_sum + (1 - 2 * mean) * profile.hits
    total = (profile.confidence_sum - profile.hits).sum().item()
    return bounded_interval(total, squares.sum().item(), profile.num_examples, -1.0, 1.0, LEVEL)


def with_chance(name: str, test: Calibrated) -> dict[str, float]:
    """A score and its band."""
    return {name: test.value} | {f"{name}_{key}": value for key, value in test._asdict().items() if key != "value"}


def ends(name: str, interval: Interval | None) -> dict[str, float]:
    """The interval of a score; nothing where it has none."""
    return {} if interval is None else {f"{name}_low": interval.low, f"{name}_high": interval.high}


def tested(name: str, test: CalibrationTest) -> dict[str, float]:
    """A test's statistic and p-value."""
    return {name: test.statistic, f"{name}_p_value": test.p_value}


def brier_part_scores(parts: BrierParts) -> dict[str, float]:
    """The parts that the Brier score is the sum of."""
    return {f"brier_{name}": value for name, value in parts._asdict().items() if name != "brier"}
