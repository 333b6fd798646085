"""How beliefs move: linearization, noise, covariance structures, the filter, and what is fitted with it."""

import importlib
from typing import TYPE_CHECKING, Any

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.fitting.divergence import FitDivergenceError
from bayes_kf.inference.fitting.fit import fit
from bayes_kf.inference.fitting.merging import merge
from bayes_kf.inference.fitting.mixture_fit import fit_mixture
from bayes_kf.inference.fitting.selection.filter_bank import Bank
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.mixture.mixture_rewards import rewards
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.prediction import LoaderPrediction, Prediction
from bayes_kf.inference.predictive.rewards import Rewards

if TYPE_CHECKING:
    from bayes_kf.inference.pyro.horseshoe import Horseshoe
    from bayes_kf.inference.pyro.kalman_guide import KalmanGuide
    from bayes_kf.inference.pyro.kalman_svi import KalmanSVI
    from bayes_kf.inference.pyro.mixture.mixture_guide import MixtureGuide

__all__ = [
    "Bank",
    "DivergenceError",
    "FilterState",
    "FitDivergenceError",
    "Horseshoe",
    "KalmanConfig",
    "KalmanFilter",
    "KalmanGuide",
    "KalmanSVI",
    "LoaderPrediction",
    "MixtureGuide",
    "MixturePosterior",
    "Posterior",
    "Prediction",
    "Rewards",
    "UpdateInfo",
    "fit",
    "fit_mixture",
    "merge",
    "rewards",
]

# Imported on first use, because they load Pyro.
_OF_PYRO = {
    "Horseshoe": "horseshoe",
    "KalmanGuide": "kalman_guide",
    "KalmanSVI": "kalman_svi",
    "MixtureGuide": "mixture.mixture_guide",
}


def __getattr__(name: str) -> Any:
    """Imports a public name that needs Pyro on first use."""
    if name not in _OF_PYRO:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.pyro.{_OF_PYRO[name]}"), name)
    return value
