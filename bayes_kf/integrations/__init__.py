"""Integrations with other libraries: transformers' Trainer."""

from bayes_kf.integrations.metrics import calibration_metrics
from bayes_kf.integrations.trainer import KalmanTrainer

__all__ = ["KalmanTrainer", "calibration_metrics"]
