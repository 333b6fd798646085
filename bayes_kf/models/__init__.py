"""Latent states: adapters as vectors θ, their priors and their likelihoods."""

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.likelihood import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Ordinal,
    Poisson,
    StudentT,
)
from bayes_kf.models.likelihoods.ordinal import OrdinalHead

__all__ = [
    "AdapterModel",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Ordinal",
    "OrdinalHead",
    "Poisson",
    "StudentT",
]
