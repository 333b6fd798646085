"""Calibration scores by name, each beside what chance alone would show and how exactly it is known."""

from bayes_kf.evaluation.binning import Binning
from bayes_kf.evaluation.bootstrap import Interval, profile_intervals
from bayes_kf.evaluation.null import Calibrated, CalibrationTest, profile_tests
from bayes_kf.evaluation.profile import Profile
from bayes_kf.evaluation.scores import BrierParts

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
    intervals = profile_intervals(profile, statistics, num_bins, LEVEL, num_simulations, seed)
    scores: dict[str, float] = {}
    for name, test, interval in zip(chosen, tests, intervals, strict=True):
        scores |= with_chance(name, test) | ends(name, interval)
    return scores


def with_chance(name: str, test: Calibrated) -> dict[str, float]:
    """A score and its band."""
    return {name: test.value} | {f"{name}_{key}": value for key, value in test._asdict().items() if key != "value"}


def ends(name: str, interval: Interval) -> dict[str, float]:
    """The interval of a score."""
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}


def tested(name: str, test: CalibrationTest) -> dict[str, float]:
    """A test's statistic and p-value."""
    return {name: test.statistic, f"{name}_p_value": test.p_value}


def brier_part_scores(parts: BrierParts) -> dict[str, float]:
    """The parts that the Brier score is the sum of."""
    return {f"brier_{name}": value for name, value in parts._asdict().items() if name != "brier"}
