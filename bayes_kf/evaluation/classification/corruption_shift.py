"""Calibration under distribution shift: the same model on increasingly corrupted inputs."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from bayes_kf.evaluation.calibration.null_distribution import calibration_test
from bayes_kf.evaluation.classification.entropy import entropy
from bayes_kf.evaluation.classification.scores import accuracy, brier_score, negative_log_likelihood
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.resampling.binning import Binning
from bayes_kf.evaluation.resampling.null_test import NullComparison


class ShiftScores(NamedTuple):
    """Scores at one severity."""

    severity: float
    num_examples: int
    accuracy: float
    nll: float
    brier: float
    ece: NullComparison
    entropy: float  # mean predictive entropy in nats


def shift_curve(
    sets: Mapping[float, tuple[Array, Array]],
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
    num_simulations: int = 1000,
    seed: int = 0,
) -> tuple[ShiftScores, ...]:
    """Accuracy, losses, ECE with its null band, and predictive entropy at each severity, in increasing order.

    A model that stays calibrated under shift has an ECE inside the band while its accuracy falls.

    Args:
        sets: Severity (0 for clean inputs) to class probabilities, (N, C), and class indices, (N,).
        num_bins: Number of bins of the top-label ECE.
        binning: "equal_width" or "equal_mass".
        num_simulations: Number of simulated data sets for each null band, at least 39.
        seed: Seed of the simulation.

    Raises:
        ValueError: If there is no set, a severity is not a finite number, or an argument is malformed.

    Reference: Ovadia et al., *Can you trust your model's uncertainty?*, 2019.

    Example:
        >>> import torch
        >>> probs, targets = torch.tensor([[0.9, 0.1]] * 20), torch.tensor([0] * 18 + [1] * 2)
        >>> curve = shift_curve({0: (probs, targets), 3: (probs, 1 - targets)})
        >>> [(row.severity, round(row.ece.value, 3), row.ece.p_value < 0.05) for row in curve]
        [(0.0, 0.0, False), (3.0, 0.8, True)]
    """
    if not sets:
        raise ValueError("`sets` must hold at least one severity, got none.")
    for severity in sets:
        if isinstance(severity, bool) or not isinstance(severity, (int, float)) or not math.isfinite(severity):
            raise ValueError(f"`sets` must have finite numbers as severities, got {severity!r}.")
    rows = []
    for severity in sorted(sets):
        values, labels = sets[severity]
        probs = as_probs(values, f"sets[{severity!r}]")
        targets = as_targets(labels, probs)
        ece = calibration_test(
            probs, targets, num_bins=num_bins, binning=binning, num_simulations=num_simulations, seed=seed
        )
        scores = accuracy(probs, targets), negative_log_likelihood(probs, targets), brier_score(probs, targets)
        rows.append(ShiftScores(float(severity), len(probs), *scores, ece, entropy(probs).mean().item()))
    return tuple(rows)
