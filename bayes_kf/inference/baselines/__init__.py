"""Optimizers that benchmarks compare with the filters. AdamW, AdaGrad and SGD come from torch."""

from bayes_kf.inference.baselines.kfac import KFAC
from bayes_kf.inference.baselines.reng import RENG
from bayes_kf.inference.baselines.ring import RING
from bayes_kf.inference.baselines.sophia import SophiaG
from bayes_kf.inference.baselines.sparse import SparseOptimization

__all__ = ["KFAC", "RENG", "RING", "SophiaG", "SparseOptimization"]
