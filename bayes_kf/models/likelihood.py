"""Likelihoods p(y | η) of targets given raw outputs: mean, residual, variance, whitening factor, density.

Every likelihood is an exponential family in its canonical link. With raw outputs η, mean π = h(η) and variance
V = ∂π/∂η, the gradient of log p(y | η) is the residual e = y − π and the Fisher information is V. ``whiten`` returns W
and u with WᵀW = V and Wᵀu = e, *exactly*, without a matrix inverse. To add a likelihood, write a class with the same
methods and enter it in ``LIKELIHOODS``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pyro.distributions as dist

LOG_FLOOR = -60.0  # smallest log-probability in `whiten`; it changes V by less than 1e-26


@dataclass(frozen=True)
class Categorical:
    """Class labels; π = softmax(η)."""

    name: str = "categorical"

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as int64 (B,) in 0..m−1, or ValueError."""
        batch, num_classes = outputs.shape
        if num_classes < 2:
            raise ValueError(f"`likelihood` categorical needs at least 2 outputs, got {num_classes}; use 'bernoulli'?")
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"`targets` must be integer class labels, got dtype {targets.dtype}.")
        if targets.shape != (batch,):
            raise ValueError(f"`targets` must have shape ({batch},), got {tuple(targets.shape)}.")
        if batch and (int(targets.min()) < 0 or int(targets.max()) >= num_classes):
            low, high = int(targets.min()), int(targets.max())
            raise ValueError(
                f"`targets` must lie in 0..{num_classes - 1} for {num_classes} outputs, got {low}..{high}."
            )
        return targets.long()

    def mean(self, outputs: Tensor) -> Tensor:
        """Class probabilities π, (..., m)."""
        return outputs.softmax(-1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = onehot(y) − π, (B, m)."""
        onehot = torch.nn.functional.one_hot(targets, outputs.shape[-1])
        return onehot.to(outputs.dtype) - outputs.softmax(-1)

    def variance(self, outputs: Tensor) -> Tensor:
        """V = diag(π) − ππᵀ, (B, m, m)."""
        probs = self.mean(outputs)
        return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = Cᵀ (B, m, m), C = diag(√π) − π√πᵀ, and u = e/√π (B, m)."""
        log_probs = outputs.log_softmax(-1).clamp_min(LOG_FLOOR)
        root = (0.5 * log_probs).exp()  # √π
        probs = log_probs.exp()
        factor = torch.diag_embed(root) - root.unsqueeze(-1) * probs.unsqueeze(-2)  # Cᵀ
        onehot = torch.nn.functional.one_hot(targets, outputs.shape[-1])
        return factor, onehot / root - root

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, (..., B) for outputs (..., B, m)."""
        log_probs = outputs.log_softmax(-1)
        return log_probs.gather(-1, targets.expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,)."""
        import pyro.distributions as dist

        return dist.Categorical(logits=outputs)

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """η of the weighted mean of G predictions' π, (B, m), from (G, B, m) and log weights (G,)."""
        return (outputs.log_softmax(-1) + log_weights[:, None, None]).logsumexp(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the most probable class is the target, (B,), 0 or 1."""
        return (outputs.argmax(-1) == targets).to(outputs.dtype)


@dataclass(frozen=True)
class Bernoulli:
    """m independent yes/no answers per example; π = sigmoid(η)."""

    name: str = "bernoulli"

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as floats (B, m) of 0 and 1, or ValueError."""
        targets = _check_shape(outputs, targets)
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise ValueError(f"`targets` must be 0 or 1 for a Bernoulli likelihood, got {_some(targets, (0, 1))}.")
        return targets

    def mean(self, outputs: Tensor) -> Tensor:
        """Probabilities of a one, (..., m)."""
        return outputs.sigmoid()

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = y − π, (B, m)."""
        return targets - self.mean(outputs)

    def variance(self, outputs: Tensor) -> Tensor:
        """V = diag(π(1 − π)), (B, m, m)."""
        return torch.diag_embed(outputs.sigmoid() * (-outputs).sigmoid())

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = diag(√V) (B, m, m) and u = e/√V (B, m)."""
        log_variance = torch.nn.functional.logsigmoid(outputs) + torch.nn.functional.logsigmoid(-outputs)
        root = (0.5 * log_variance.clamp_min(LOG_FLOOR)).exp()
        return torch.diag_embed(root), self.residual(outputs, targets) / root

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, summed over its m answers, (..., B)."""
        return (targets * outputs - torch.nn.functional.softplus(outputs)).sum(-1)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        return dist.Bernoulli(logits=outputs).to_event(1)

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """η of the weighted mean of G predictions' π, (B, m), from (G, B, m) and log weights (G,)."""
        yes, no = torch.nn.functional.logsigmoid(outputs), torch.nn.functional.logsigmoid(-outputs)
        return (yes + log_weights[:, None, None]).logsumexp(0) - (no + log_weights[:, None, None]).logsumexp(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of the m answers that are correct, (B,)."""
        return ((outputs > 0) == (targets > 0.5)).to(outputs.dtype).mean(-1)


@dataclass(frozen=True)
class Gaussian:
    """Real targets y = η + noise of known variance.

    Attributes:
        noise_variance: σ², a scalar or one number per output, (m,), in squared units of the targets.
    """

    noise_variance: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    name: str = "gaussian"

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Finite targets as floats (B, m), or ValueError."""
        return _check_shape(outputs, targets)

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

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """Weighted mean of G predictions, (B, m), from (G, B, m) and log weights (G,)."""
        return (outputs * log_weights.exp()[:, None, None]).sum(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """None: correctness is not defined for a real target."""
        return None


@dataclass(frozen=True)
class Poisson:
    """Counts; the outputs are log rates, π = λ = exp(η)."""

    name: str = "poisson"

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as floats (B, m) of whole numbers ≥ 0, or ValueError."""
        targets = _check_shape(outputs, targets)
        if bool((targets < 0).any()) or bool((targets != targets.round()).any()):
            raise ValueError("`targets` must be whole numbers >= 0 for a Poisson likelihood, got others.")
        return targets

    def mean(self, outputs: Tensor) -> Tensor:
        """Rates λ, (..., m)."""
        return outputs.exp()

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """e = y − λ, (B, m)."""
        return targets - outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        """V = diag(λ), (B, m, m)."""
        return torch.diag_embed(outputs.exp())

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W = diag(√λ) (B, m, m) and u = (y − λ)/√λ (B, m)."""
        root = (0.5 * outputs.clamp_min(LOG_FLOOR)).exp()
        return torch.diag_embed(root), self.residual(outputs, targets) / root

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, summed over outputs, (..., B); −inf for a rate that overflows, never NaN."""
        return (targets * outputs - outputs.exp() - torch.lgamma(targets + 1.0)).sum(-1)

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,) and event shape (m,)."""
        import pyro.distributions as dist

        return dist.Poisson(outputs.exp()).to_event(1)

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """The log of the weighted mean of G predictions' rates, (B, m), from (G, B, m) and log weights (G,)."""
        return (outputs + log_weights[:, None, None]).logsumexp(0)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """None: correctness is not defined for a count."""
        return None


Likelihood = Categorical | Bernoulli | Gaussian | Poisson

LIKELIHOODS = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian, "poisson": Poisson}


def _check_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Finite targets in the outputs' shape and dtype, or ValueError; (B,) becomes (B, 1) for one output."""
    if targets.shape == outputs.shape[:1] and outputs.shape[1] == 1:
        targets = targets.unsqueeze(-1)
    if targets.shape != outputs.shape:
        raise ValueError(f"`targets` must have shape {tuple(outputs.shape)}, got {tuple(targets.shape)}.")
    targets = targets.to(outputs.dtype)
    if not bool(torch.isfinite(targets).all()):
        raise ValueError(
            f"`targets` must be finite, got {int((~torch.isfinite(targets)).sum())} NaN or infinite values."
        )
    return targets


def _some(values: Tensor, allowed: tuple[float, ...]) -> str:
    """A value outside ``allowed``, for an error message."""
    outside = values[~torch.isin(values, torch.tensor(allowed, dtype=values.dtype, device=values.device))]
    return f"{outside.flatten()[0].item():g}"
