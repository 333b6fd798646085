"""The Gaussian likelihood whose mean and noise variance are both outputs of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bayes_kf.models.likelihoods.normal_mixture import NormalMixture
from bayes_kf.models.likelihoods.target_checks import check_shape

if TYPE_CHECKING:
    import pyro.distributions as dist

NODE_STEP = 0.125  # of the nodes of a log variance, in its standard deviations


@dataclass(frozen=True)
class HeteroscedasticGaussian:
    """Real targets y ~ N(μ, exp s) of 2m outputs: m means μ, then m log variances s (Nix and Weigend 1994).

    With r = y − μ the score is (r/σ², (r²/σ² − 1)/2), σ² = exp s, and the Fisher information is diag(1/σ², 1/2).
    log p(y | η) is not concave.

    Attributes:
        mean_variance: V, (B, m), the variance of an uncertain μ. It adds to r² in the score and in ``log_prob``, which
            is then E log p(y | μ, s) under μ ~ N(η_μ, V); 0 for a known μ.
    """

    mean_variance: Tensor | float = 0.0
    name: str = "heteroscedastic_gaussian"
    target_kind: ClassVar[str] = "real"
    outputs_per_target: ClassVar[int] = 2

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Finite targets as floats (B, m), or ValueError."""
        if outputs.shape[1] % 2:
            raise ValueError(
                "`likelihood` heteroscedastic_gaussian needs two outputs a target, the means and then the log "
                f"variances, got {outputs.shape[1]} outputs."
            )
        return check_shape(outputs, targets, outputs.shape[1] // 2)

    def mean(self, outputs: Tensor) -> Tensor:
        """The means μ, (..., m), from outputs (..., 2m)."""
        return outputs.chunk(2, -1)[0]

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The score ∂ log p(y | η)/∂η = (r/σ², (r²/σ² − 1)/2), (B, 2m)."""
        standard, square, noise_sd = self._standard(outputs, targets)
        return torch.cat([standard / noise_sd, 0.5 * (square - 1.0)], -1)

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = diag(1/σ, 1/√2) (B, 2m, 2m), WᵀW the Fisher information, and u = (r/σ, (r²/σ² − 1)/√2) (B, 2m)."""
        standard, square, noise_sd = self._standard(outputs, targets)
        factor = torch.cat([1.0 / noise_sd, torch.full_like(noise_sd, math.sqrt(0.5))], -1)
        return torch.diag_embed(factor), torch.cat([standard, math.sqrt(0.5) * (square - 1.0)], -1)

    def with_output_cov(self, output_cov: Tensor) -> HeteroscedasticGaussian:
        """The likelihood whose μ has the variances of the outputs' covariance (B, 2m, 2m)."""
        return replace(self, mean_variance=output_cov.diagonal(dim1=-2, dim2=-1).chunk(2, -1)[0].clamp_min(0.0))

    def newton_factor(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W and u with Wᵀu = score, and with the curvature max(1, (r² + V)/σ²)/2 of s, which shortens long steps.

        The negative Hessian (r² + V)/(2σ²) in s exceeds the Fisher information where the target is a surprise.
        """
        standard, square, noise_sd = self._standard(outputs, targets)
        root = (0.5 * square.clamp_min(1.0)).sqrt()
        factor = torch.cat([1.0 / noise_sd, root], -1)
        return torch.diag_embed(factor), torch.cat([standard, 0.5 * (square - 1.0) / root], -1)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log N(y; μ, exp s) per example, summed over targets, (..., B)."""
        _, square, _ = self._standard(outputs, targets)
        log_var = outputs.chunk(2, -1)[1]
        return -0.5 * (square + log_var + math.log(2.0 * math.pi)).sum(-1)

    def target_variance(self, outputs: Tensor) -> Tensor:
        """Var(y | η) = exp s, (..., m)."""
        return outputs.chunk(2, -1)[1].exp()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A target drawn from each of the outputs (..., 2m), (..., m), on the generator's device."""
        mean, log_var = outputs.to(generator.device).chunk(2, -1)
        unit = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + (0.5 * log_var).exp() * unit

    def cdf(self, outputs: Tensor, values: Tensor) -> Tensor:
        """P(y ≤ value | η) of each target, (..., m)."""
        standard, _, _ = self._standard(outputs, values)
        return torch.special.ndtr(standard)

    def normal_mixture(self, outputs: Tensor, covariance: Tensor, reach: float) -> NormalMixture:
        """y under (μ, s) ~ N(f, C) as a mixture of normal distributions, by quadrature over s.

        Given s, y is normal with mean E[μ | s] and variance Var[μ | s] + exp s.

        Args:
            outputs: f of each target, (B, m, 2), float64.
            covariance: C of each target, (B, m, 2, 2).
            reach: standard deviations of s that the nodes cover on each side.
        """
        node = torch.arange(-reach, reach + NODE_STEP, NODE_STEP, dtype=torch.float64, device=outputs.device)
        node = node.view(-1, 1, 1)
        log_weights = -0.5 * (node.square() + math.log(2.0 * math.pi)) + math.log(NODE_STEP)
        mean_var, cross = covariance[..., 0, 0], covariance[..., 0, 1]
        log_sd = covariance[..., 1, 1].clamp_min(0.0).sqrt()  # negative only by rounding
        slope = torch.where(log_sd > 0, cross / log_sd.clamp_min(torch.finfo(log_sd.dtype).tiny), 0.0)
        rest = (mean_var - slope.square()).clamp_min(0.0)  # negative only by rounding
        return NormalMixture(
            log_weights, outputs[..., 0] + slope * node, rest + (outputs[..., 1] + log_sd * node).exp()
        )

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence of two predictions, (B,), in nats, in closed form."""
        (mean, log_var), (other_mean, other_log_var) = outputs.chunk(2, -1), others.chunk(2, -1)
        scales = (log_var - other_log_var).cosh() - 1.0
        prec = 0.5 * ((-log_var).exp() + (-other_log_var).exp())
        return (scales + prec * (mean - other_mean).square()).sum(-1)

    def output_unit(self, outputs: Tensor) -> Tensor:
        """The change of each output that counts as large, (B, 2m): σ for a mean, 1 for a log variance."""
        log_var = outputs.chunk(2, -1)[1]
        return torch.cat([(0.5 * log_var).exp(), torch.ones_like(log_var)], -1)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        mean, log_var = outputs.chunk(2, -1)
        return dist.Normal(mean, (0.5 * log_var).exp()).to_event(1)

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """Mean and log variance of the weighted mixture of G predictions, (B, 2m), from (G, B, 2m) and (G,)."""
        (means, log_vars), weights = outputs.chunk(2, -1), log_weights.exp()[:, None, None]
        mean = (weights * means).sum(0)
        variance = (weights * (log_vars.exp() + (means - mean).square())).sum(0)
        return torch.cat([mean, variance.log()], -1)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """None: correctness is not defined for a real target."""
        return None

    def _standard(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r/σ, (r² + V)/σ² and σ, (..., m) each."""
        mean, log_var = outputs.chunk(2, -1)
        noise_sd = (0.5 * log_var).exp()
        standard = (targets - mean) / noise_sd
        return standard, standard.square() + self.mean_variance / noise_sd.square(), noise_sd
