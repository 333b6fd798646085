"""How beliefs move: linearization, noise, covariance structures, the filter, and what is fitted with it."""

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
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.prediction import LoaderPrediction, Prediction

__all__ = [
    "Bank",
    "DivergenceError",
    "FilterState",
    "FitDivergenceError",
    "KalmanConfig",
    "KalmanFilter",
    "LoaderPrediction",
    "MixturePosterior",
    "Posterior",
    "Prediction",
    "UpdateInfo",
    "fit",
    "fit_mixture",
    "merge",
]
