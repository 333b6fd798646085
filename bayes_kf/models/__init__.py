"""Latent states: adapters as vectors θ, their priors and their likelihoods."""

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Poisson, StudentT

__all__ = [
    "AdapterModel",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Poisson",
    "StudentT",
]
