"""The Student-t likelihood: real targets with outliers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bayes_kf.models.likelihoods.normal_mixture import NormalMixture
from bayes_kf.models.likelihoods.target_checks import check_shape

if TYPE_CHECKING:
    import pyro.distributions as dist

MAX_STEP = 0.35  # of the nodes in log λ; the error of the sum falls as exp(−π²/step)
LOG_FARTHEST = 45.0  # nodes reach residuals of exp(45/2) σ


@dataclass(frozen=True)
class StudentT:
    """Real targets y = η + σ t of Student's t distribution with ν degrees of freedom (Lange, Little and Taylor 1989).

    The score in η is (ν+1) r / (νσ² + r²) for r = y − η: an outlier moves η less the farther off it is. log p(y | η) is
    not concave. Its Fisher information is (ν+1)/((ν+3)σ²).

    Attributes:
        noise_variance: σ², the squared scale, a scalar or one number per output, (m,), in squared units of the targets.
            The variance of the noise is σ²ν/(ν−2).
        dof: ν > 2.
    """

    noise_variance: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    dof: float = 4.0
    name: str = "student_t"
    target_kind: ClassVar[str] = "real"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Finite targets as floats (B, m), or ValueError."""
        return check_shape(outputs, targets)

    def mean(self, outputs: Tensor) -> Tensor:
        """The outputs η, which are the means, (..., m)."""
        return outputs

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The score ∂ log p(y | η)/∂η = (ν+1) r / (νσ² + r²), (B, m)."""
        error = targets - outputs
        return (self.dof + 1.0) * error / (self.dof * self.noise_variance.to(outputs) + error.square())

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = √F (B, m, m) and u = score/√F (B, m), with the Fisher information F = (ν+1)/((ν+3)σ²) I."""
        root = self._information(outputs).sqrt().expand_as(outputs)
        return torch.diag_embed(root), self.residual(outputs, targets) / root

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, summed over outputs, (..., B)."""
        variance, nu = self.noise_variance.to(outputs), self.dof
        constant = math.lgamma(0.5 * (nu + 1.0)) - math.lgamma(0.5 * nu) - 0.5 * math.log(nu * math.pi)
        ratio = (targets - outputs).square() / (nu * variance)
        return (constant - 0.5 * variance.log() - 0.5 * (nu + 1.0) * ratio.log1p()).sum(-1)

    def target_variance(self, outputs: Tensor) -> Tensor:
        """Var(y | η) = σ²ν/(ν−2), (..., m)."""
        return (self.dof / (self.dof - 2.0) * self.noise_variance.to(outputs)).expand_as(outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A target drawn from each of the outputs, (..., m), on the generator's device: √(ν/χ²_ν) times a normal."""
        from scipy.special import gammaincinv

        outputs = outputs.to(generator.device)
        uniform = torch.rand(outputs.shape, generator=generator, dtype=torch.float64, device=outputs.device)
        unit = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device=outputs.device)
        precision = torch.as_tensor(gammaincinv(0.5 * self.dof, uniform.clamp_min(1e-300).cpu().numpy()))
        factor = (0.5 * self.dof / precision.to(unit)).sqrt()
        return outputs + self.noise_variance.to(outputs).sqrt() * (factor * unit).to(outputs)

    def cdf(self, outputs: Tensor, values: Tensor) -> Tensor:
        """P(y ≤ value | η) of each target, (..., m)."""
        from scipy.special import stdtr

        standard = (values - outputs) / self.noise_variance.to(outputs).sqrt()
        return torch.as_tensor(stdtr(self.dof, standard.cpu().numpy())).to(standard)

    def normal_mixture(self, outputs: Tensor, covariance: Tensor, reach: float) -> NormalMixture:
        """y under η ~ N(f, C) as normal distributions N(f, C + σ²/λ), λ ~ Gamma(ν/2, ν/2), by quadrature over log λ.

        Args:
            outputs: f, (B, m, 1), float64.
            covariance: C, (B, m, 1, 1).
            reach: not used: the nodes reach residuals of exp(22) σ.
        """
        log_weights, log_precision = (nodes.to(outputs.device) for nodes in _precision_nodes(self.dof))
        noise_var = self.noise_variance.to(outputs) * (-log_precision).exp().view(-1, 1, 1)
        variance = covariance[..., 0, 0].clamp_min(0.0) + noise_var  # negative only by rounding
        return NormalMixture(log_weights.view(-1, 1, 1), outputs.squeeze(-1)[None], variance)

    def evidence_derivatives(self, output: Tensor, variance: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and negative second derivative of log p(y) in f, () each, for one target with η ~ N(f, c), float64.

        Args:
            output: f, (). With several σ² use :meth:`of_output`.
            variance: c, ().
            target: y, ().
        """
        mixture = self.normal_mixture(output.view(1, 1, 1), variance.view(1, 1, 1, 1), 0.0)
        total, error = mixture.variances.flatten(), target - output
        weights = (mixture.log_weights.flatten() - 0.5 * (total.log() + error.square() / total)).softmax(0)
        score = error / total
        gradient = weights @ score
        return gradient, weights @ (1.0 / total - score.square()) + gradient.square()

    def of_output(self, number: int) -> StudentT:
        """The likelihood of one of the outputs."""
        variance = self.noise_variance.flatten()
        return replace(self, noise_variance=variance[number if len(variance) > 1 else 0])

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence of two predictions to second order, Σ F (η − η')², (B,), in nats."""
        return (self._information(outputs) * (outputs - others).square()).sum(-1)

    def output_unit(self, outputs: Tensor) -> Tensor:
        """The change of each output that counts as large, σ; broadcasts with (B, m)."""
        return self.noise_variance.to(outputs).sqrt()

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        return dist.StudentT(self.dof, outputs, self.noise_variance.to(outputs).sqrt()).to_event(1)

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """Weighted mean of G predictions, (B, m), from (G, B, m) and log weights (G,)."""
        return (outputs * log_weights.exp()[:, None, None]).sum(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """None: correctness is not defined for a real target."""
        return None

    def _information(self, outputs: Tensor) -> Tensor:
        """(ν+1)/((ν+3)σ²), a scalar or (m,)."""
        return (self.dof + 1.0) / ((self.dof + 3.0) * self.noise_variance.to(outputs))


@functools.lru_cache(maxsize=16)
def _precision_nodes(dof: float) -> tuple[Tensor, Tensor]:
    """Log weights and nodes x = log λ of a sum over λ ~ Gamma(ν/2, ν/2), (K,) each; equally spaced in x."""
    step = min(MAX_STEP, 0.6 * (2.0 / (dof + 1.0)) ** 0.5)
    lowest = max(-LOG_FARTHEST - 130.0 / (dof + 1.0), -1500.0 / dof - 2.0)
    node = torch.arange(lowest, math.log(2.0 + 140.0 / dof), step, dtype=torch.float64)
    half = 0.5 * dof
    log_density = half * math.log(half) - math.lgamma(half) + half * (node - node.exp())
    return log_density + math.log(step), node
