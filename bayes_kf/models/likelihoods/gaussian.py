"""The Gaussian likelihood with a noise variance that does not depend on the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood
from bayes_kf.models.likelihoods.normal_mixture import NormalMixture
from bayes_kf.models.likelihoods.target_checks import check_shape

if TYPE_CHECKING:
    import pyro.distributions as dist


@dataclass(frozen=True)
class Gaussian(CanonicalLikelihood):
    """Real targets y = η + noise of known variance.

    Attributes:
        noise_variance: σ², a scalar or one number per output, (m,), in squared units of the targets.
    """

    noise_variance: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    name: str = "gaussian"
    target_kind: ClassVar[str] = "real"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Finite targets as floats (B, m), or ValueError."""
        return check_shape(outputs, targets)

    def mean(self, outputs: Tensor) -> Tensor:
        """The outputs η, which are the means, (..., m)."""
        return outputs

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = y − η, (B, m)."""
        return targets - outputs

    def variance(self, outputs: Tensor) -> Tensor:
        """∂mean/∂η = I, (B, m, m): the mean parameter is η itself, whatever σ² is."""
        return torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device).expand(len(outputs), -1, -1)

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = I/σ (B, m, m) and u = e/σ (B, m)."""
        noise_sd = self.noise_variance.to(outputs).sqrt().expand(outputs.shape[-1])
        return self.variance(outputs) / noise_sd.unsqueeze(-1), self.residual(outputs, targets) / noise_sd

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log N(y; η, σ²) per example, summed over outputs, (..., B)."""
        return self.distribution(outputs).log_prob(targets)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        return dist.Normal(outputs, self.noise_variance.to(outputs).sqrt()).to_event(1)

    def target_variance(self, outputs: Tensor) -> Tensor:
        """Var(y | η) = σ², (..., m)."""
        return self.noise_variance.to(outputs).expand_as(outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A target drawn from each of the outputs, (..., m), on the generator's device."""
        outputs = outputs.to(generator.device)
        unit = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return outputs + self.noise_variance.to(outputs).sqrt() * unit

    def cdf(self, outputs: Tensor, values: Tensor) -> Tensor:
        """P(y ≤ value | η) of each target, (..., m)."""
        return torch.special.ndtr((values - outputs) / self.noise_variance.to(outputs).sqrt())

    def normal_mixture(self, outputs: Tensor, covariance: Tensor, reach: float) -> NormalMixture:
        """y under η ~ N(outputs, covariance), as a mixture of one normal distribution: N(f, C + σ²)."""
        variance = covariance[..., 0, 0].clamp_min(0.0) + self.target_variance(outputs.squeeze(-1))
        return NormalMixture(outputs.new_zeros(1, 1, 1), outputs.squeeze(-1)[None], variance[None])

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence Σ (η − η')²/σ² of two predictions, (B,), in nats."""
        return ((outputs - others).square() / self.noise_variance.to(outputs)).sum(-1)

    def output_unit(self, outputs: Tensor) -> Tensor:
        """The change of each output that counts as large, σ; broadcasts with (B, m)."""
        return self.noise_variance.to(outputs).sqrt()

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """Weighted mean of G predictions, (B, m), from (G, B, m) and log weights (G,)."""
        return (outputs * log_weights.exp()[:, None, None]).sum(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """None: correctness is not defined for a real target."""
        return None
