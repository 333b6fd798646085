"""bayes_kf: fine-tuned adapters with honest uncertainty.

The LoRA parameters of a PEFT model, or the trainable tensors of any module, are Gaussian latent states; a guide holds
their mean and covariance, advanced one batch at a time by the extended Kalman filter.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayes_kf.evaluation import Report, compare, evaluate
    from bayes_kf.inference import (
        Bank,
        DivergenceError,
        KalmanConfig,
        KalmanFilter,
        KalmanGuide,
        KalmanSVI,
        MixturePosterior,
        Posterior,
        Prediction,
        fit,
        fit_mixture,
        merge,
        rewards,
    )
    from bayes_kf.models import AdapterModel

from bayes_kf._version import __version__

__all__ = [
    "AdapterModel",
    "Bank",
    "DivergenceError",
    "KalmanConfig",
    "KalmanFilter",
    "KalmanGuide",
    "KalmanSVI",
    "MixturePosterior",
    "Posterior",
    "Prediction",
    "Report",
    "__version__",
    "compare",
    "evaluate",
    "fit",
    "fit_mixture",
    "merge",
    "rewards",
]

# Imported on first use, so that `bayes-kf --help` does not wait for PyTorch.
_NAMES = {
    "evaluation": ("Report", "compare", "evaluate"),
    "inference": (
        "Bank",
        "DivergenceError",
        "KalmanConfig",
        "KalmanFilter",
        "KalmanGuide",
        "KalmanSVI",
        "MixturePosterior",
        "Posterior",
        "Prediction",
        "fit",
        "fit_mixture",
        "merge",
        "rewards",
    ),
    "models": ("AdapterModel",),
}
_SUBPACKAGES = ("data", "distributed", "integrations", "serving")  # their names are not repeated here


def __getattr__(name: str) -> Any:
    """Imports a subpackage, or a public name from its subpackage, on first use."""
    if name in _NAMES or name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    for subpackage, names in _NAMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{subpackage}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMES, *_SUBPACKAGES})
