"""Names of scores for readers, each with a remark."""

import re
from typing import NamedTuple


class ScoreLabel(NamedTuple):
    """Name of a score as readers know it, and a remark on its unit, range or direction."""

    name: str
    remark: str = ""


LABELS = {
    "accuracy": ScoreLabel("Accuracy", "share of correct predictions"),
    "nll": ScoreLabel("Negative log-likelihood", "nats per target; lower is better"),
    "brier": ScoreLabel("Brier score", "0 to 2; lower is better"),
    "brier_miscalibration": ScoreLabel(
        "… its miscalibration part", "probability against frequency, bin by bin; lower is better"
    ),
    "brier_resolution": ScoreLabel(
        "… its resolution part (subtracted)", "variance of the frequencies over bins; higher is better"
    ),
    "brier_uncertainty": ScoreLabel("… its uncertainty part", "Brier score of the overall class frequencies"),
    "brier_within": ScoreLabel("… its within-bin part", "contribution of differences inside the bins"),
    "rps": ScoreLabel("Ranked probability score", "0 to classes − 1; lower is better"),
    "ordinal_error": ScoreLabel("Distance from the median class", "in classes, mean; lower is better"),
    "weighted_kappa": ScoreLabel("Weighted kappa", "quadratic weights; 1 is perfect, 0 is chance"),
    "confidence": ScoreLabel("Mean confidence", "probability of the predicted class"),
    "confidence_gap": ScoreLabel("Confidence − accuracy", "positive: over-confident"),
    "ece": ScoreLabel("ECE", "top label, bins of equal width"),
    "ece_equal_mass": ScoreLabel("ECE, equal mass", "top label, bins of equal counts"),
    "ece_classwise": ScoreLabel("ECE, classwise", "mean over the classes"),
    "mce": ScoreLabel("MCE", "largest error of any bin, however small"),
    "ece_debiased": ScoreLabel(
        "Calibration error, debiased", "root mean square, bins of equal counts, sampling bias removed"
    ),
    "ece_smooth": ScoreLabel("ECE, smooth", "kernel smoothing in place of bins; the width equals the error"),
    "ks": ScoreLabel("Calibration error, KS", "largest difference of cumulative confidence and accuracy"),
    "spiegelhalter": ScoreLabel("Spiegelhalter's z", "Brier score minus its expectation, in standard deviations"),
    "entropy": ScoreLabel("Predictive entropy", "nats, mean"),
    "margin": ScoreLabel("Margin", "difference of the two largest probabilities, mean"),
    "aleatoric": ScoreLabel("Aleatoric entropy", "nats, mean; more data cannot reduce it"),
    "epistemic": ScoreLabel("Epistemic entropy", "nats, mean; more data would reduce it"),
    "aurc": ScoreLabel("AURC", "area under the risk-coverage curve; lower is better"),
    "aurc_excess": ScoreLabel(
        "Excess AURC", "AURC minus that of the best possible order; zero if confidence ranks every error last"
    ),
    "accuracy_at_80": ScoreLabel("Accuracy at 80 % coverage", "of the most confident 80 %"),
    "accuracy_at_90": ScoreLabel("Accuracy at 90 % coverage", "of the most confident 90 %"),
    "accuracy_at_95": ScoreLabel("Accuracy at 95 % coverage", "of the most confident 95 %"),
    "error_entropy_auroc": ScoreLabel("Errors by entropy: AUROC", "0.5 is random, 1 is perfect"),
    "error_entropy_aupr": ScoreLabel("Errors by entropy: AUPR", "random is the share of errors"),
    "error_entropy_fpr95": ScoreLabel(
        "Errors by entropy: FPR@95", "correct predictions flagged with 95 % of the errors; lower is better"
    ),
    "error_confidence_auroc": ScoreLabel("Errors by 1 − confidence: AUROC", "0.5 is random, 1 is perfect"),
    "error_confidence_aupr": ScoreLabel("Errors by 1 − confidence: AUPR", "random is the share of errors"),
    "error_confidence_fpr95": ScoreLabel(
        "Errors by 1 − confidence: FPR@95",
        "correct predictions flagged with 95 % of the errors; lower is better",
    ),
    "recalibrated_accuracy": ScoreLabel("Recalibrated: accuracy", "share of correct predictions"),
    "recalibrated_nll": ScoreLabel("Recalibrated: negative log-likelihood", "nats per target; lower is better"),
    "recalibrated_nll_change": ScoreLabel(
        "Recalibrated: change of the negative log-likelihood", "nats; negative: the recalibration lowers the loss"
    ),
    "recalibrated_brier": ScoreLabel("Recalibrated: Brier score", "0 to 2; lower is better"),
    "recalibrated_ece": ScoreLabel("Recalibrated: ECE", "top label, bins of equal width"),
    "conformal_coverage": ScoreLabel("Conformal sets: coverage", "share of labels in their set"),
    "conformal_size": ScoreLabel("Conformal sets: mean size", "classes in a set; smaller is better at equal coverage"),
    "conformal_empty": ScoreLabel("Conformal sets: share empty", "sets without a class"),
    "perplexity": ScoreLabel("Perplexity", "exponential of the loss of a token; lower is better"),
    "surprise_gap": ScoreLabel("Log loss − entropy", "nats a token; positive: too sure"),
    "surprise_spearman": ScoreLabel("Entropy and loss, Spearman", "rank correlation over the tokens; 0 is random"),
    "mse": ScoreLabel("Mean squared error", "in the target's unit squared; lower is better"),
    "rmse": ScoreLabel("RMSE", "in the target's unit; lower is better"),
    "crps": ScoreLabel("CRPS", "in the target's unit; lower is better"),
    "sharpness": ScoreLabel("Sharpness", "root mean predictive variance, in the target's unit"),
    "ence": ScoreLabel("ENCE", "predicted against observed standard deviation, relative error, mean over bins"),
    "spread_spearman": ScoreLabel("Predicted sd and error, Spearman", "rank correlation; 0 is random"),
    "pit_ks": ScoreLabel("PIT, Kolmogorov-Smirnov", "distance of the PIT values from a uniform distribution"),
    "quantile_error": ScoreLabel(
        "Quantile calibration error", "share of targets below a quantile minus its level, mean absolute value"
    ),
    "human_nll": ScoreLabel("Log loss of people's answers", "nats per answer; lower is better"),
    "human_entropy": ScoreLabel("… its entropy part", "nats; the minimum over all models"),
    "human_kl": ScoreLabel("… its divergence part", "nats; zero if the model predicts the shares of people's answers"),
    "human_tv": ScoreLabel("Total variation to people's answers", "0 to 1; lower is better"),
    "human_entropy_spearman": ScoreLabel("Entropy of people and model, Spearman", "rank correlation"),
    "human_entropy_pearson": ScoreLabel("Entropy of people and model, Pearson", "linear correlation"),
    "online_accuracy": ScoreLabel("Online accuracy", "each example predicted before its update"),
    "prequential_log_loss": ScoreLabel("Prequential log loss", "nats per example; lower is better"),
    "innovation_ratio": ScoreLabel("Innovation² / degrees of freedom", "1 for a consistent filter"),
    "innovation_whiteness_p": ScoreLabel("Whiteness of innovations, p value", "small if large ones come in runs"),
}
OWN_LABELS: dict[str, ScoreLabel] = {}  # of metrics that users register
OOD_LABELS = {
    "auroc": ScoreLabel("AUROC", "0.5 is random, 1 is perfect"),
    "aupr": ScoreLabel("AUPR", "random is the share of OOD inputs"),
    "fpr95": ScoreLabel("FPR@95", "in-distribution inputs flagged with 95 % of the OOD inputs; lower is better"),
}


def known_label(name: str) -> ScoreLabel | None:
    """Label of a score, None if the score is unknown."""
    data_set, _, measure = name.removeprefix("ood_").rpartition("_")
    if name.startswith("ood_") and measure in OOD_LABELS:
        label = OOD_LABELS[measure]
        return label._replace(name=f"OOD “{data_set}”: {label.name}")
    if coverage := re.fullmatch(r"coverage_(\d+)", name):
        return ScoreLabel(f"Coverage of {coverage[1]} % intervals", "share of targets inside")
    if top := re.fullmatch(r"ece_top(\d+)", name):
        return ScoreLabel(f"ECE, top {top[1]}", f"label among the {top[1]} most probable classes, bins of equal width")
    return LABELS.get(name) or OWN_LABELS.get(name)


def size_label(name: str) -> str:
    """Label of a size: the name, in which the JSON key "foreign examples" of earlier versions reads "OOD examples".

    Example:
        >>> size_label("examples"), size_label("foreign examples, noise")
        ('examples', 'OOD examples, noise')
    """
    return re.sub("^foreign examples, ", "OOD examples, ", name)


def label_of(name: str) -> ScoreLabel:
    """Label of a score; the label of an unknown score is its name.

    Example:
        >>> label_of("coverage_95").name, label_of("mine")
        ('Coverage of 95 % intervals', ScoreLabel(name='mine', remark=''))
    """
    return known_label(name) or ScoreLabel(name)
