"""bayes_kf: fine-tuned adapters with honest uncertainty.

The LoRA parameters of a PEFT model, or the trainable tensors of any module, are Gaussian latent states; a guide holds
their mean and covariance, advanced one batch at a time by the extended Kalman filter.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from bayes_kf.evaluation import Report, compare, evaluate

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


def __getattr__(name: str) -> Any:
    """What evaluates, imported when it is first asked for: its libraries take as long as PyTorch itself."""
    if name in ("Report", "compare", "evaluate", "evaluation"):
        evaluation = importlib.import_module("bayes_kf.evaluation")
        return evaluation if name == "evaluation" else getattr(evaluation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
