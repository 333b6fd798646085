"""How beliefs move: linearization, noise, covariance structures, the filter, and what is fitted with it."""

from bayes_kf.inference.bank import Bank
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filter import KalmanFilter
from bayes_kf.inference.fit import fit
from bayes_kf.inference.merge import merge
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.prediction import LoaderPrediction, Prediction
from bayes_kf.inference.state import DivergenceError, FilterState, UpdateInfo

__all__ = [
    "Bank",
    "DivergenceError",
    "FilterState",
    "KalmanConfig",
    "KalmanFilter",
    "LoaderPrediction",
    "Posterior",
    "Prediction",
    "UpdateInfo",
    "fit",
    "merge",
]
