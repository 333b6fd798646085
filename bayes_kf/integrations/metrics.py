"""Calibration as a metric of transformers' evaluation loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bayes_kf.evaluation import accuracy, brier_score, calibration_test, entropy


def calibration_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy, log loss, Brier score, ECE with what chance alone would show, and mean entropy of a classifier.

    Args:
        prediction: transformers' ``EvalPrediction``: ``predictions`` are logits or log probabilities (N, m), or a tuple
            that begins with them; ``label_ids`` are labels (N,).

    Returns:
        ``accuracy``, ``log_loss`` and ``entropy`` (nats), ``brier``, ``ece``, and ``ece_chance_low`` and
        ``ece_chance_high``, which hold 95 % of the ECE of a perfectly calibrated model with the same confidences.

    Raises:
        ValueError: when there are not N labels for predictions (N, m).

    Example:
        >>> from transformers import EvalPrediction
        >>> found = calibration_metrics(EvalPrediction(np.zeros((4, 2)), np.array([0, 1, 0, 1])))
        >>> round(found["log_loss"], 4), round(found["ece"], 4)
        (0.6931, 0.0)
    """
    outputs = prediction.predictions
    outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    labels = np.asarray(prediction.label_ids)
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"`prediction` must hold predictions (N, classes) and labels (N,), got {outputs.shape} and {labels.shape}."
        )
    log_probs = torch.from_numpy(outputs).double().log_softmax(1)
    probs, targets = log_probs.exp(), torch.from_numpy(labels).long()
    ece = calibration_test(probs, targets, "ece")
    return {
        "accuracy": accuracy(probs, targets),
        "log_loss": -float(log_probs.gather(1, targets.unsqueeze(1)).mean()),
        "brier": brier_score(probs, targets),
        "entropy": float(entropy(probs).mean()),
        "ece": ece.value,
        "ece_chance_low": ece.null_low,
        "ece_chance_high": ece.null_high,
    }
