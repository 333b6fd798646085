"""Whether to believe predictions: scores, calibration with its null band, uncertainty, figures and a report.

Knows tensors (or NumPy arrays) of probabilities, samples and targets, nothing of models or filters. Numbers come back
as floats, series as float64 tensors on the CPU.
"""

from bayes_kf.evaluation.assess import evaluate
from bayes_kf.evaluation.calibration import (
    ReliabilityBins,
    confidence_gap,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_bins,
)
from bayes_kf.evaluation.classification import evaluate_predictions
from bayes_kf.evaluation.drift import DriftAlarm, drift_alarm
from bayes_kf.evaluation.health import InnovationHealth, Whiteness, innovation_health, innovation_whiteness
from bayes_kf.evaluation.null import (
    Calibrated,
    CalibrationNull,
    calibration_null,
    calibration_test,
    reliability_band,
)
from bayes_kf.evaluation.online import moving_average, prequential_log_loss, running_accuracy
from bayes_kf.evaluation.ood import OODScores, ood_scores
from bayes_kf.evaluation.plots import coverage_plot, entropy_histogram, reliability_diagram
from bayes_kf.evaluation.protocols import LoaderPrediction, PosteriorLike
from bayes_kf.evaluation.regression import (
    Coverage,
    coverage_null,
    gaussian_coverage,
    interval_coverage,
    mean_log_loss,
    rmse,
)
from bayes_kf.evaluation.regression_report import evaluate_regression
from bayes_kf.evaluation.report import Report
from bayes_kf.evaluation.scores import accuracy, brier_score, negative_log_likelihood
from bayes_kf.evaluation.stream_plots import innovation_plot, online_curves, variance_by_tensor
from bayes_kf.evaluation.uncertainty import (
    EntropyParts,
    aleatoric_entropy,
    entropy,
    entropy_parts,
    epistemic_entropy,
    predictive_entropy,
)

__all__ = [
    "Calibrated",
    "CalibrationNull",
    "Coverage",
    "DriftAlarm",
    "EntropyParts",
    "InnovationHealth",
    "LoaderPrediction",
    "OODScores",
    "PosteriorLike",
    "ReliabilityBins",
    "Report",
    "Whiteness",
    "accuracy",
    "aleatoric_entropy",
    "brier_score",
    "calibration_null",
    "calibration_test",
    "confidence_gap",
    "coverage_null",
    "coverage_plot",
    "drift_alarm",
    "entropy",
    "entropy_histogram",
    "entropy_parts",
    "epistemic_entropy",
    "evaluate",
    "evaluate_predictions",
    "evaluate_regression",
    "expected_calibration_error",
    "gaussian_coverage",
    "innovation_health",
    "innovation_plot",
    "innovation_whiteness",
    "interval_coverage",
    "maximum_calibration_error",
    "mean_log_loss",
    "moving_average",
    "negative_log_likelihood",
    "online_curves",
    "ood_scores",
    "predictive_entropy",
    "prequential_log_loss",
    "reliability_band",
    "reliability_bins",
    "reliability_diagram",
    "rmse",
    "running_accuracy",
    "variance_by_tensor",
]
