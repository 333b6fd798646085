"""Evaluation of predictions: scores, calibration with null bands, uncertainty, figures and reports.

All functions take tensors or NumPy arrays of probabilities, samples and targets; none needs a model or a filter. They
return numbers as floats and series as float64 tensors on the CPU.
"""

from bayes_kf.evaluation.calibration.calibration_errors import (
    ReliabilityBins,
    confidence_gap,
    debiased_calibration_error,
    expected_calibration_error,
    ks_calibration_error,
    maximum_calibration_error,
    reliability_bins,
    smooth_calibration_error,
)
from bayes_kf.evaluation.calibration.intervals import calibration_interval, mean_interval
from bayes_kf.evaluation.calibration.null_distribution import (
    calibration_null,
    calibration_test,
    reliability_band,
)
from bayes_kf.evaluation.calibration.spiegelhalter import spiegelhalter_test
from bayes_kf.evaluation.classification.comparison import compare_predictions
from bayes_kf.evaluation.classification.corp import CorpReliability, corp_reliability
from bayes_kf.evaluation.classification.corruption_shift import ShiftScores, shift_curve
from bayes_kf.evaluation.classification.decision_curve import DecisionCurve, decision_curve
from bayes_kf.evaluation.classification.entropy import (
    EntropyParts,
    aleatoric_entropy,
    energy,
    entropy,
    entropy_parts,
    epistemic_entropy,
    margin,
    max_probability,
    predictive_entropy,
)
from bayes_kf.evaluation.classification.grouping_loss import GroupingLoss, grouping_loss
from bayes_kf.evaluation.classification.human_agreement import Estimate, HumanAgreement, human_agreement
from bayes_kf.evaluation.classification.ood_detection import (
    DetectionIntervals,
    OODScores,
    detection_intervals,
    error_detection,
    error_detection_intervals,
    ood_scores,
)
from bayes_kf.evaluation.classification.scores import (
    BrierParts,
    accuracy,
    brier_decomposition,
    brier_score,
    negative_log_likelihood,
    ordinal_error,
    ranked_probability_score,
    weighted_kappa,
)
from bayes_kf.evaluation.classification.selective import (
    RiskCoverage,
    SelectiveIntervals,
    accuracy_at_coverage,
    augrc,
    aurc,
    best_risk_coverage,
    excess_aurc,
    ood_risk_coverage,
    rejection_ratio,
    risk_coverage,
    selective_intervals,
    sparsification_error,
)
from bayes_kf.evaluation.classification.streaming_scores import StreamingScores
from bayes_kf.evaluation.classification_report import evaluate_predictions
from bayes_kf.evaluation.comparison_report import compare, report_comparison, report_forecast_comparison
from bayes_kf.evaluation.online.drift_detection import DriftAlarm, DriftDetector, drift_alarm
from bayes_kf.evaluation.online.innovations import InnovationHealth, Whiteness, innovation_health, innovation_whiteness
from bayes_kf.evaluation.online.prequential import (
    moving_average,
    prequential_log_loss,
    prequential_regret,
    running_accuracy,
)
from bayes_kf.evaluation.own_metrics import register_metric, unregister_metric
from bayes_kf.evaluation.plots.comparison import comparison_plot, forest_plot, online_comparison
from bayes_kf.evaluation.plots.human_agreement import human_entropy_plot
from bayes_kf.evaluation.plots.online import innovation_plot, online_curves
from bayes_kf.evaluation.plots.regression import coverage_plot, pit_histogram, prediction_plot, quantile_coverage_plot
from bayes_kf.evaluation.plots.reliability import entropy_curves, reliability_diagram
from bayes_kf.evaluation.plots.selective import risk_coverage_plot, shift_plot
from bayes_kf.evaluation.plots.tensor_variance import output_variance_plot, variance_by_tensor
from bayes_kf.evaluation.posterior_report import evaluate
from bayes_kf.evaluation.protocols import LoaderPrediction, PosteriorLike
from bayes_kf.evaluation.recalibration.abstention import AbstentionRule
from bayes_kf.evaluation.recalibration.conformal_intervals import Bounds, ConformalIntervals
from bayes_kf.evaluation.recalibration.conformal_sets import (
    ConformalSets,
    SetCoverage,
    conformal_coverage_null,
    coverage_and_size,
)
from bayes_kf.evaluation.recalibration.scaling import IsotonicCalibration, Recalibration, TemperatureScaling
from bayes_kf.evaluation.recalibration.vector_scaling import VectorScaling
from bayes_kf.evaluation.regression.crps import crps_gaussian, crps_samples
from bayes_kf.evaluation.regression.ence import (
    SpreadBins,
    ence_test,
    expected_normalized_calibration_error,
    sharpness,
    spread_bins,
)
from bayes_kf.evaluation.regression.pit import pit_gaussian, pit_samples, pit_test
from bayes_kf.evaluation.regression.quantile_calibration import (
    QuantileCoverage,
    quantile_calibration_error,
    quantile_calibration_test,
    quantile_coverage,
)
from bayes_kf.evaluation.regression.quantile_scores import (
    crps_quantiles,
    interval_score,
    pinball_loss,
)
from bayes_kf.evaluation.regression.scores import (
    Coverage,
    coverage_null,
    gaussian_coverage,
    gaussian_log_loss,
    interval_coverage,
    mean_log_loss,
    rmse,
)
from bayes_kf.evaluation.regression_report import evaluate_regression
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import CalibrationNull, CalibrationTest, NullComparison
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.score_comparison import Difference, Rank, ScoreComparison
from bayes_kf.evaluation.text.text_report import evaluate_texts

Calibrated = NullComparison  # the name of earlier releases

__all__ = [
    "AbstentionRule",
    "Bounds",
    "BrierParts",
    "Calibrated",
    "CalibrationNull",
    "CalibrationTest",
    "ConformalIntervals",
    "ConformalSets",
    "CorpReliability",
    "Coverage",
    "DecisionCurve",
    "DetectionIntervals",
    "Difference",
    "DriftAlarm",
    "DriftDetector",
    "EntropyParts",
    "Estimate",
    "GroupingLoss",
    "HumanAgreement",
    "InnovationHealth",
    "Interval",
    "IsotonicCalibration",
    "LoaderPrediction",
    "NullComparison",
    "OODScores",
    "PosteriorLike",
    "QuantileCoverage",
    "Rank",
    "Recalibration",
    "ReliabilityBins",
    "Report",
    "RiskCoverage",
    "Score",
    "ScoreComparison",
    "SelectiveIntervals",
    "SetCoverage",
    "ShiftScores",
    "SpreadBins",
    "StreamingScores",
    "TemperatureScaling",
    "VectorScaling",
    "Whiteness",
    "accuracy",
    "accuracy_at_coverage",
    "aleatoric_entropy",
    "augrc",
    "aurc",
    "best_risk_coverage",
    "brier_decomposition",
    "brier_score",
    "calibration_interval",
    "calibration_null",
    "calibration_test",
    "compare",
    "compare_predictions",
    "comparison_plot",
    "confidence_gap",
    "conformal_coverage_null",
    "corp_reliability",
    "coverage_and_size",
    "coverage_null",
    "coverage_plot",
    "crps_gaussian",
    "crps_quantiles",
    "crps_samples",
    "debiased_calibration_error",
    "decision_curve",
    "detection_intervals",
    "drift_alarm",
    "ence_test",
    "energy",
    "entropy",
    "entropy_curves",
    "entropy_parts",
    "epistemic_entropy",
    "error_detection",
    "error_detection_intervals",
    "evaluate",
    "evaluate_predictions",
    "evaluate_regression",
    "evaluate_texts",
    "excess_aurc",
    "expected_calibration_error",
    "expected_normalized_calibration_error",
    "forest_plot",
    "gaussian_coverage",
    "gaussian_log_loss",
    "grouping_loss",
    "human_agreement",
    "human_entropy_plot",
    "innovation_health",
    "innovation_plot",
    "innovation_whiteness",
    "interval_coverage",
    "interval_score",
    "ks_calibration_error",
    "margin",
    "max_probability",
    "maximum_calibration_error",
    "mean_interval",
    "mean_log_loss",
    "moving_average",
    "negative_log_likelihood",
    "online_comparison",
    "online_curves",
    "ood_risk_coverage",
    "ood_scores",
    "ordinal_error",
    "output_variance_plot",
    "pinball_loss",
    "pit_gaussian",
    "pit_histogram",
    "pit_samples",
    "pit_test",
    "prediction_plot",
    "predictive_entropy",
    "prequential_log_loss",
    "prequential_regret",
    "quantile_calibration_error",
    "quantile_calibration_test",
    "quantile_coverage",
    "quantile_coverage_plot",
    "ranked_probability_score",
    "register_metric",
    "rejection_ratio",
    "reliability_band",
    "reliability_bins",
    "reliability_diagram",
    "report_comparison",
    "report_forecast_comparison",
    "risk_coverage",
    "risk_coverage_plot",
    "rmse",
    "running_accuracy",
    "selective_intervals",
    "sharpness",
    "shift_curve",
    "shift_plot",
    "smooth_calibration_error",
    "sparsification_error",
    "spiegelhalter_test",
    "spread_bins",
    "unregister_metric",
    "variance_by_tensor",
    "weighted_kappa",
]
