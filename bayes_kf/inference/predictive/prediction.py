"""A predictive distribution for a batch, or for all batches of a loader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.predictive.targets import target_mixture
from bayes_kf.inference.predictive.targets.target_distribution import TargetDistribution
from bayes_kf.inference.predictive.targets.target_mixture import TargetMixture
from bayes_kf.validation import check_inside_unit_interval, check_whole

METHODS = ("linearized", "probit", "sampled", "mean")


class PredictiveInterval(NamedTuple):
    """Limits of an interval for each target, (B, m) each."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, repr=False)
class Prediction:
    """Predictions for B examples of m targets.

    Attributes:
        mean: predictive mean of the target, (B, m): class probabilities, probabilities of a one, real values or rates.
        probs: ``mean`` again for categorical and Bernoulli likelihoods; None for regression and counts.
        samples: draws of the likelihood's mean under the posterior, (S, B, m), without the noise of the targets; None
            for "mean" and "probit". :meth:`target_samples` draws targets, with noise.
        variance: predictive variance of the target, (B, m), aleatoric plus epistemic; None for classification.
        entropy: total predictive entropy in nats, (B,); a sum over the outputs of a Bernoulli likelihood. For Gaussian
            targets that of the predictive Gaussian (with "sampled": a sum over outputs). None for counts, Student-t and
            heteroscedastic targets.
        aleatoric: classification: mean entropy over draws in nats, (B,); None without draws. Otherwise the mean
            of the noise variances, (B, m).
        epistemic: classification: entropy − aleatoric (mutual information) in nats, (B,). Otherwise the variance of
            the means, (B, m).
        log_prob: log predictive density of the targets in nats, (B,); None if no targets were given.
        distribution: of each target, for :meth:`interval`, :meth:`quantile` and :meth:`target_samples`; None for
            classification, and for Gaussian targets of a loader by "sampled" without ``keep_samples``.
    """

    mean: Tensor
    probs: Tensor | None = None
    samples: Tensor | None = None
    variance: Tensor | None = None
    entropy: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    log_prob: Tensor | None = None
    distribution: TargetDistribution | TargetMixture | None = None

    def interval(self, level: float) -> PredictiveInterval:
        """The central interval of each target, ``lower`` and ``upper`` (B, m), in units of the targets.

        It lies between the quantiles (1 − level)/2 and (1 + level)/2: a target falls into it with probability
        ``level``, noise included. For counts the limits are counts, and the probability is at least ``level``. Targets
        of several outputs have an interval each, not a joint one.

        Args:
            level: strictly between 0 and 1.

        Raises:
            ValueError: if the level is not, or the prediction has no ``distribution``.

        Example:
            >>> import bayes_kf as bkf
            >>> data = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(5)]
            >>> config = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated")
            >>> prediction = bkf.fit(torch.nn.Linear(3, 1), data, config, progress=False).predict(torch.randn(6, 3))
            >>> lower, upper = prediction.interval(0.9)
            >>> lower.shape, bool((lower < prediction.mean).all() and (prediction.mean < upper).all())
            (torch.Size([6, 1]), True)
        """
        check_inside_unit_interval("level", level)
        lower, upper = self._quantiles("interval", [0.5 * (1.0 - level), 0.5 * (1.0 + level)])
        return PredictiveInterval(lower, upper)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Quantiles of each target, noise included, in units of the targets.

        Exact for Gaussian targets. For Student-t and heteroscedastic targets the distribution function is a sum over
        quadrature nodes, whose error is below 1e-6; for counts a quantile is the smallest count whose probability, with
        all smaller ones, is at least q. "sampled" averages over its draws.

        Args:
            q: a number strictly between 0 and 1, or several, (Q,).

        Returns:
            (B, m) for a number, (Q, B, m) for several.

        Raises:
            ValueError: if a number is not strictly between 0 and 1, or the prediction has no ``distribution``.
        """
        levels = torch.as_tensor(q, dtype=torch.float64)
        if levels.ndim > 1 or levels.numel() == 0:
            raise ValueError(f"`q` must be a number or several, got shape {tuple(levels.shape)}.")
        for level in levels.flatten().tolist():
            check_inside_unit_interval("q", level)
        quantiles = self._quantiles("quantile", levels.flatten().tolist())
        return quantiles if levels.ndim else quantiles[0]

    @property
    def is_normal(self) -> bool:
        """Whether N(mean, variance) is the distribution of each target, or no other distribution is known."""
        return self.distribution is None or self.distribution.is_normal

    def target_samples(
        self, num_samples: int = 64, generator: torch.Generator | None = None, *, joint: bool = True
    ) -> Tensor:
        """Draws of the targets y, noise included, (S, B, m).

        ``samples`` are draws of their mean, without noise. Counts are whole numbers.

        Args:
            num_samples: S.
            generator: source of the draws; by default a new one seeded with 0.
            joint: whether the targets of one example are drawn together, with their correlation. False: each from its
                own distribution.

        Raises:
            ValueError: if ``num_samples`` is not a whole number above 0, or the prediction has no ``distribution``, or
                not the covariance of several outputs that joint draws need.
        """
        check_whole("num_samples", num_samples)
        distribution = self._known_distribution("target_samples")
        generator = generator or torch.Generator(device=self.mean.device).manual_seed(0)
        if not joint:
            return distribution.marginal_sample(num_samples, generator)
        if not distribution.is_joint:
            raise ValueError(
                "`target_samples` of several outputs needs their covariance, which `predict_loader` keeps with "
                "`keep_samples=True`, or `joint=False`, got a prediction without it."
            )
        return distribution.sample(num_samples, generator)

    def _quantiles(self, name: str, levels: Sequence[float]) -> Tensor:
        """Quantiles (Q, B, m) in the mean's dtype."""
        return self._known_distribution(name).quantile(levels).to(self.mean.dtype)

    def _known_distribution(self, name: str) -> TargetDistribution | TargetMixture:
        """The distribution, or ValueError that names the method."""
        if self.probs is not None:
            raise ValueError(f"`{name}` needs targets that are numbers, got a prediction of classes.")
        if self.distribution is None:
            raise ValueError(
                f"`{name}` needs the draws of a loader's prediction by 'sampled', which `keep_samples=True` keeps, got "
                "a prediction without them."
            )
        return self.distribution

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in values.items() if isinstance(v, Tensor))
        return f"{type(self).__name__}({shapes})"


@dataclass(frozen=True, repr=False)
class LoaderPrediction(Prediction):
    """Predictions for all N examples of a loader, on the CPU.

    Attributes:
        targets: targets of the loader, (N,) or (N, m); None if it has none.
    """

    targets: Tensor | None = None


def concatenate(parts: Sequence[Prediction]) -> Prediction:
    """One prediction from those of consecutive batches; its type is that of the first."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if any(value is None for value in values):
            joined[field.name] = None
        elif field.name == "distribution":
            joined[field.name] = target_mixture.concatenate(values)
        else:
            joined[field.name] = torch.cat(values, 1 if field.name == "samples" else 0)
    return type(parts[0])(**joined)
