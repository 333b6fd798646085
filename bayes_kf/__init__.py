"""bayes_kf: fine-tuned adapters with honest uncertainty.

The LoRA parameters of a PEFT model, or the trainable tensors of any module, are Gaussian latent states; a guide holds
their mean and covariance, advanced one batch at a time by the extended Kalman filter.
"""

from bayes_kf.evaluation import Report, compare, evaluate
from bayes_kf.inference import (
    Bank,
    DivergenceError,
    KalmanConfig,
    KalmanFilter,
    Posterior,
    Prediction,
    fit,
    merge,
)
from bayes_kf.models import AdapterModel

__version__ = "0.1.0"

__all__ = [
    "AdapterModel",
    "Bank",
    "DivergenceError",
    "KalmanConfig",
    "KalmanFilter",
    "Posterior",
    "Prediction",
    "Report",
    "__version__",
    "compare",
    "evaluate",
    "fit",
    "merge",
]
