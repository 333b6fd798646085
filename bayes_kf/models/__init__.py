"""What is believed: adapters as Gaussian latent states, their priors and likelihoods."""

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, Poisson

__all__ = ["AdapterModel", "Bernoulli", "Categorical", "Gaussian", "Poisson"]
