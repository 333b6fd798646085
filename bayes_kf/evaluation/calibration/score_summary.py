"""Calibration scores by name, each with its null band, and the one that a report tests.

Each of seven calibration errors leaves its own 95 % band in 5 % of data sets of a calibrated model, but one of the
seven does so in 14 to 25 %. A report therefore tests only the smooth calibration error; the other errors are shown with
their bands and are not tested. Among the errors that respond to every kind of miscalibration, the smooth one has the
most power (`benchmarks/quality/interval_coverage.py`), and it needs no bins. Spiegelhalter's test has more power
against over- and under-confidence, but none against miscalibration that leaves the mean Brier score as expected.
"""

from bayes_kf.evaluation.calibration.confidence_profile import Profile
from bayes_kf.evaluation.calibration.intervals import bounded_interval
from bayes_kf.evaluation.calibration.null_distribution import profile_tests
from bayes_kf.evaluation.resampling.binning import Binning
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.score import Interval, Score

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


def calibration_scores(profile: Profile, top_k: int, settings: NullSettings) -> dict[str, Score]:
    """Calibration scores of a profile with null bands: all of the top label, for larger k only the ECE (`ece_top5`)."""
    selected = STATISTICS if top_k == 1 else {f"ece_top{top_k}": STATISTICS["ece"]}
    tests = profile_tests(profile, tuple(selected.values()), settings, LEVEL)
    intervals = {"confidence_gap": _gap_interval(profile)}
    return {name: test.score(intervals.get(name)) for name, test in zip(selected, tests, strict=True)}


def _gap_interval(profile: Profile) -> Interval:
    """Interval of mean confidence minus accuracy."""
    mean = profile.confidence_sum / profile.counts
    squares = mean * profile.confidence_sum + (1 - 2 * mean) * profile.hits
    total = (profile.confidence_sum - profile.hits).sum().item()
    return bounded_interval(total, squares.sum().item(), profile.num_examples, -1.0, 1.0, LEVEL)
