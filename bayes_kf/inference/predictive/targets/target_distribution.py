"""The distribution of a regression's targets under a posterior: quantiles, draws, and the probability below a value.

A target y of the likelihood p(y | η) has the density ∫ p(y | η) p(η) dη, where η is Gaussian, η ~ N(f, C), or one of S
equally likely draws. A quantile is a root of the distribution function. With η ~ N(f, C) that function is of

- Gaussian noise: N(f, C + σ²), exactly.
- Student-t and heteroscedastic noise: a mixture of normal distributions by quadrature (``normal_mixture``).
- counts: quadrature over the log rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws
from bayes_kf.inference.predictive.targets.quantile_search import root, smallest_count
from bayes_kf.models.likelihood import Gaussian, HeteroscedasticGaussian, Poisson, RegressionLikelihood

REACH = 9.0  # standard deviations of an output that the quadrature covers on each side
NUM_NODES = 289  # of the quadrature over a log rate


@dataclass(frozen=True)
class TargetDistribution:
    """The distribution of m targets for each of B examples, output by output.

    Attributes:
        family: the likelihood.
        outputs: f, (B, p), or draws of η, (S, B, p).
        block_cov: C of the k = p/m outputs that belong to each target, (B, m, k, k), float64; None for draws.
        joint_cov: C of all outputs of an example, (B, p, p); None for draws, or if it is not kept.
    """

    family: RegressionLikelihood
    outputs: Tensor
    block_cov: Tensor | None = None
    joint_cov: Tensor | None = None

    @classmethod
    def of_gaussian(cls, family: RegressionLikelihood, outputs: Tensor, output_cov: Tensor) -> TargetDistribution:
        """The distribution for η ~ N(outputs, output_cov), (B, p) and (B, p, p)."""
        covariance = output_cov.double()
        which = _output_blocks(outputs.shape[1], family.outputs_per_target).to(outputs.device)  # (m, k)
        return cls(family, outputs, covariance[:, which[:, :, None], which[:, None, :]], covariance)

    @property
    def is_normal(self) -> bool:
        """Whether every target has a normal distribution."""
        return isinstance(self.family, Gaussian) and (self.block_cov is not None or len(self.outputs) == 1)

    @property
    def is_average_of_normals(self) -> bool:
        """Whether it is an average over several draws of η with Gaussian noise."""
        return isinstance(self.family, Gaussian) and not self.is_normal

    @property
    def is_joint(self) -> bool:
        """Whether the targets of an example can be drawn together."""
        return self.block_cov is None or self.joint_cov is not None or self.block_cov.shape[1] == 1

    def to(self, device: torch.device | str) -> TargetDistribution:
        """The same on another device."""
        moved = [None if cov is None else cov.detach().to(device) for cov in (self.block_cov, self.joint_cov)]
        return TargetDistribution(self.family, self.outputs.detach().to(device), *moved)

    def without_joint(self) -> TargetDistribution:
        """The same without the covariance of different targets of an example."""
        return replace(self, joint_cov=None)

    def cdf(self, values: Tensor) -> Tensor:
        """P(y ≤ value) of each target at values (B, m), (B, m), float64."""
        return self._distribution_function()(values.double())

    def quantile(self, levels: Sequence[float]) -> Tensor:
        """Quantiles of each target, (Q, B, m), float64; for counts the smallest count with P(y ≤ count) ≥ level.

        Args:
            levels: strictly between 0 and 1, Q of them.
        """
        below = self._distribution_function()
        if isinstance(self.family, Poisson):
            most = self._largest_rate()
            return torch.stack([smallest_count(below, level, 2.0 * most + 100.0) for level in levels])
        mean, sd = self._mean_and_sd()
        if self.is_normal:
            z = torch.special.ndtri(torch.tensor(levels, dtype=torch.float64, device=mean.device))
            return mean + sd * z.view(-1, 1, 1)
        odds = [(level / (1.0 - level)) ** 0.5 for level in levels]  # Cantelli's inequality
        limits = [(mean - sd / r, mean + sd * r) for r in odds]
        return torch.stack([root(below, level, *limit) for level, limit in zip(levels, limits, strict=True)])

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of the targets, (S, B, m): the targets of an example are drawn together."""
        if self.block_cov is None:
            chosen = torch.randint(len(self.outputs), (num_samples,), generator=generator, device=generator.device)
            if num_samples == len(self.outputs):
                chosen = torch.arange(num_samples)  # each of them once
            return self._with_noise(self.outputs[chosen.to(self.outputs.device)], generator)
        if self.block_cov.shape[1] == 1:
            return self.marginal_sample(num_samples, generator)
        assert self.joint_cov is not None  # checked by the caller
        outputs = gaussian_draws(self.outputs, self.joint_cov, num_samples, generator)
        return self._with_noise(outputs, generator)

    def marginal_sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draws of the targets, (S, B, m), each from its own distribution: those of an example are independent."""
        if self.block_cov is None:
            return self.sample(num_samples, generator)
        batch, targets, width, _ = self.block_cov.shape
        flat = self._blocks().reshape(-1, width), self.block_cov.reshape(-1, width, width)
        drawn = gaussian_draws(*flat, num_samples, generator).view(num_samples, batch, targets, width)
        return self._with_noise(drawn.transpose(2, 3).flatten(2).to(self.outputs), generator)

    def _with_noise(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return self.family.sample(outputs, generator).to(outputs.device)

    def _blocks(self) -> Tensor:
        """f of the outputs of each target, (B, m, k), float64."""
        which = _output_blocks(self.outputs.shape[-1], self.family.outputs_per_target)
        return self.outputs.double()[:, which.to(self.outputs.device)]

    def _log_rates(self) -> tuple[Tensor, Tensor]:
        """Nodes of the log rates, (K, B, m), and their weights, (K, 1, 1)."""
        assert self.block_cov is not None
        node = torch.linspace(-REACH, REACH, NUM_NODES, dtype=torch.float64, device=self.outputs.device)
        weights = torch.softmax(-0.5 * node.square(), 0).view(-1, 1, 1)
        sd = self.block_cov[..., 0, 0].clamp_min(0.0).sqrt()
        return self.outputs.double() + sd * node.view(-1, 1, 1), weights

    def _mean_and_sd(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of real targets, (B, m) each, float64."""
        outputs, family = self.outputs.double(), self.family
        if self.block_cov is None:
            means = family.mean(outputs)
            variance = means.var(0, correction=0) + family.target_variance(outputs).mean(0)
            return means.mean(0), variance.sqrt()
        variances = self.block_cov.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)  # (B, m, k)
        if isinstance(family, HeteroscedasticGaussian):  # E exp s of a Gaussian s
            outputs = outputs + 0.5 * variances.transpose(1, 2).flatten(1)
        return family.mean(self.outputs.double()), (variances[..., 0] + family.target_variance(outputs)).sqrt()

    def _largest_rate(self) -> Tensor:
        """A rate that a count's own rate hardly exceeds, (B, m), float64."""
        if self.block_cov is None:
            return self.outputs.double().amax(0).exp()
        return self._log_rates()[0][-1].exp()

    def _distribution_function(self) -> Callable[[Tensor], Tensor]:
        """The function from values (B, m) to P(y ≤ value)."""
        if self.block_cov is None:
            draws = self.outputs.double()
            return lambda values: self.family.cdf(draws, values).mean(0)
        if isinstance(self.family, Poisson):
            log_rate, weights = self._log_rates()
            return lambda values: (weights * self.family.cdf(log_rate, values)).sum(0)
        return self.family.normal_mixture(self._blocks(), self.block_cov, REACH).cdf


def concatenate(parts: Sequence[TargetDistribution]) -> TargetDistribution:
    """One distribution from those of consecutive batches."""

    def join(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if len(present) == len(values) else None

    outputs = torch.cat([part.outputs for part in parts], parts[0].outputs.dim() - 2)
    blocks, joint = join([part.block_cov for part in parts]), join([part.joint_cov for part in parts])
    return TargetDistribution(parts[0].family, outputs, blocks, joint)


def _output_blocks(num_outputs: int, per_target: int) -> Tensor:
    """The outputs of each target, (m, k): output j of target i is i + j m."""
    return torch.arange(num_outputs).view(per_target, -1).T
