"""Likelihoods p(y | η) of targets given raw outputs η: mean, score, whitening factor, density, draws.

With the Fisher information F of η, ``whiten`` returns W and u with WᵀW = F and Wᵀu = e, the gradient of log p(y | η),
*exactly*, without a matrix inverse. Most are exponential families in their canonical link: with mean π = h(η), the
gradient is the residual e = y − π and F is ∂π/∂η. ``student_t``, ``heteroscedastic_gaussian`` and ``ordinal`` are not:
their log density is not concave in η, and updates treat them apart (``inference.measurement_model``). For real targets
``normal_mixture`` is the distribution of a target under η ~ N(f, C).

To add a likelihood, write a file in ``likelihoods`` with a class of the same methods, and enter it here.
"""

from __future__ import annotations

from bayes_kf.models.likelihoods.bernoulli import Bernoulli
from bayes_kf.models.likelihoods.categorical import Categorical
from bayes_kf.models.likelihoods.gaussian import Gaussian
from bayes_kf.models.likelihoods.heteroscedastic_gaussian import HeteroscedasticGaussian
from bayes_kf.models.likelihoods.ordinal import Ordinal
from bayes_kf.models.likelihoods.poisson import Poisson
from bayes_kf.models.likelihoods.student_t import StudentT
from bayes_kf.models.likelihoods.target_checks import LOG_FLOOR
from bayes_kf.models.likelihoods.tokens import Tokens

__all__ = [
    "LIKELIHOODS",
    "LOG_FLOOR",
    "NUMERIC",
    "ONE_OF_CLASSES",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Ordinal",
    "Poisson",
    "RealLikelihood",
    "RegressionLikelihood",
    "StudentT",
    "Tokens",
]

RealLikelihood = Gaussian | StudentT | HeteroscedasticGaussian
"""Likelihoods of real targets, which have ``normal_mixture``."""
RegressionLikelihood = RealLikelihood | Poisson
"""Likelihoods of real targets and of counts, which have ``target_variance`` and ``cdf``."""
Likelihood = Categorical | Ordinal | Bernoulli | RegressionLikelihood | Tokens

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "ordinal": Ordinal,
    "gaussian": Gaussian,
    "poisson": Poisson,
    "student_t": StudentT,
    "heteroscedastic_gaussian": HeteroscedasticGaussian,
    "tokens": Tokens,
}
NUMERIC = tuple(name for name, family in LIKELIHOODS.items() if family.target_kind not in ("class", "tokens"))
"""The likelihoods whose targets are numbers, not classes or text."""
ONE_OF_CLASSES = ("categorical", "ordinal")
"""The likelihoods whose targets are one of several classes, with probabilities that add up to 1."""
