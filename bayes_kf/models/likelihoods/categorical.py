"""The categorical likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood
from bayes_kf.models.likelihoods.target_checks import LOG_FLOOR, check_classes

if TYPE_CHECKING:
    import pyro.distributions as dist


@dataclass(frozen=True)
class Categorical(CanonicalLikelihood):
    """Class labels; π = softmax(η)."""

    name: str = "categorical"
    target_kind: ClassVar[str] = "class"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as int64 (B,) in 0..m−1, or ValueError."""
        num_classes = outputs.shape[1]
        if num_classes < 2:
            raise ValueError(f"`likelihood` categorical needs at least 2 outputs, got {num_classes}; use 'bernoulli'?")
        return check_classes(outputs, targets, num_classes)

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

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A class drawn from each of the outputs (..., B, m), (..., B), on the generator's device."""
        probs = self.mean(outputs).to(generator.device)
        drawn = torch.multinomial(probs.flatten(0, -2), 1, replacement=True, generator=generator)
        return drawn.view(probs.shape[:-1])

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the most probable class is the target, (B,), 0 or 1."""
        return (outputs.argmax(-1) == targets).to(outputs.dtype)
