"""CORP: reliability without bins, by isotonic regression, and the decomposition of the Brier score of its own."""

from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.classification.ood_detection import as_correct
from bayes_kf.evaluation.inputs import Array, as_vector


class CorpReliability(NamedTuple):
    """Calibrated probabilities of an event and the parts of its Brier score.

    The score is `miscalibration` − `discrimination` + `uncertainty`, all of them non-negative.
    """

    calibrated: Tensor  # (N,), in the order of the forecasts
    brier: float
    miscalibration: float
    discrimination: float
    uncertainty: float


def corp_reliability(confidence: Array, correct: Array) -> CorpReliability:
    """Frequencies of an event by isotonic regression on its forecast probability (pool adjacent violators).

    Args:
        confidence: Forecast probability of the event, (N,), for example the confidence of each prediction.
        correct: Whether the event came, (N,), for example whether the prediction is right.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Dimitriadis, Gneiting, Jordan, *Stable reliability diagrams for probabilistic classifiers*, 2021.

    Example:
        >>> corp_reliability(torch.tensor([0.9, 0.6, 0.4]), torch.tensor([1, 0, 0])).calibrated
        tensor([1., 0., 0.], dtype=torch.float64)
    """
    forecasts = as_vector(confidence, "confidence")
    if forecasts.min() < 0 or forecasts.max() > 1:
        raise ValueError("`confidence` must lie between 0 and 1, got a number outside.")
    events = as_correct(correct, len(forecasts), "confidence").double()
    values, place, counts = forecasts.unique(return_inverse=True, return_counts=True)  # equal forecasts share one value
    means = torch.zeros_like(values).index_add_(0, place, events) / counts
    fitted = scipy.optimize.isotonic_regression(means.numpy(), weights=counts.double().numpy()).x
    calibrated = torch.from_numpy(fitted)[place]
    score, best = ((events - p).square().mean().item() for p in (forecasts, calibrated))
    uncertainty = (events - events.mean()).square().mean().item()
    return CorpReliability(calibrated, score, score - best, uncertainty - best, uncertainty)
