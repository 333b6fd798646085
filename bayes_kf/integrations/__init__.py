"""Integrations with other libraries: transformers' Trainer."""

from bayes_kf.integrations.kalman_trainer import KalmanTrainer
from bayes_kf.integrations.metrics import calibration_metrics

__all__ = ["KalmanTrainer", "calibration_metrics"]
