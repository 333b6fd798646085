"""A filter in Lightning's loop (``pip install bayes-kf[lightning]``)."""

from bayes_kf.integrations.lightning.kalman_module import KalmanModule

__all__ = ["KalmanModule"]
