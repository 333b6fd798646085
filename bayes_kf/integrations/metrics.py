"""Calibration metrics for transformers' evaluation loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bayes_kf.evaluation import accuracy, brier_score, calibration_test, entropy
from bayes_kf.models.batch import IGNORED


def calibration_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy, log loss, Brier score, mean entropy and ECE with its null band, of a classifier.

    For ``Trainer(compute_metrics=calibration_metrics)``.

    Args:
        prediction: transformers' ``EvalPrediction``: ``predictions`` are logits or log probabilities (N, m), or of
            tokens (B, T, m), or a tuple whose first item they are; ``label_ids`` are labels (N,) or (B, T), of which
            −100 does not count.

    Returns:
        ``accuracy``, ``log_loss`` and ``entropy`` (nats), ``brier``, ``ece``, and the ends of its 95 % null band,
        ``ece_null_low`` and ``ece_null_high``: the ECE of a perfectly calibrated model with the same confidences.

    Raises:
        ValueError: if the shapes are others, or no label counts.

    Example:
        >>> from transformers import EvalPrediction
        >>> metrics = calibration_metrics(EvalPrediction(np.zeros((4, 2)), np.array([0, 1, 0, 1])))
        >>> round(metrics["log_loss"], 4), round(metrics["ece"], 4)
        (0.6931, 0.0)
    """
    outputs = prediction.predictions
    outputs = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    labels = np.asarray(prediction.label_ids)
    if outputs.ndim in (2, 3) and labels.shape == outputs.shape[:-1]:
        counted = labels != IGNORED
        if not counted.any():
            raise ValueError(f"`prediction` must hold a label that counts, got {IGNORED} everywhere.")
        outputs, labels = outputs[counted], labels[counted]
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
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
    }
