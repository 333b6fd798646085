"""Optimizers to compare filters with, one a file; AdamW, AdaGrad and SGD are torch's own."""

from bayes_kf.inference.baselines.kfac import KFAC
from bayes_kf.inference.baselines.reng import RENG
from bayes_kf.inference.baselines.ring import RING
from bayes_kf.inference.baselines.sophia import SophiaG
from bayes_kf.inference.baselines.sparse import SparseOptimization

__all__ = ["KFAC", "RENG", "RING", "SophiaG", "SparseOptimization"]
