"""The ordinal likelihood: ordered classes by cumulative logits, and the head that makes its outputs from one score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_kf.models.forward import as_matrix
from bayes_kf.models.likelihoods.target_checks import LOG_FLOOR, check_classes
from bayes_kf.validation import check_whole

if TYPE_CHECKING:
    import pyro.distributions as dist

GAP_FLOOR = -60.0  # smallest log gap; a class between cutpoints that close has a probability below 1e-26


@dataclass(frozen=True)
class Ordinal:
    """K ≥ 3 classes in an order, P(y ≤ k) = σ(γ_k) (McCullagh 1980), of K − 1 outputs η.

    γ_0 = η_0 and γ_k = γ_{k−1} + exp η_k: the first output is the log odds of the first class, the others are logs of
    the gaps between cumulative logits. So any outputs are a distribution. In ``OrdinalHead``, which makes them from one
    score s(x), γ_k = c_k − s(x) with one set of cutpoints c for all inputs (proportional odds). log p(y | η) is not
    concave in the log gaps.
    """

    name: str = "ordinal"
    target_kind: ClassVar[str] = "class"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets as int64 (B,) in 0..K−1, or ValueError."""
        if outputs.shape[1] < 2:
            raise ValueError(
                "`likelihood` ordinal needs an output fewer than classes, at least 2, got "
                f"{outputs.shape[1]}; use 'bernoulli' for two classes?"
            )
        return check_classes(outputs, targets, outputs.shape[1] + 1)

    def mean(self, outputs: Tensor) -> Tensor:
        """Class probabilities π, (..., K), from outputs (..., K − 1)."""
        return _log_probs(outputs).exp()

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p(y | η) per example, (..., B)."""
        log_probs = _log_probs(outputs)
        return log_probs.gather(-1, targets.expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The score ∂ log p(y | η)/∂η, (B, K − 1)."""
        index = targets.view(-1, 1, 1).expand(-1, 1, outputs.shape[-1])
        return _scores(outputs).gather(-2, index).squeeze(-2)

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W (B, K − 1, K − 1) and u (B, K − 1), with the Fisher information WᵀW = Σ_k π_k A_k A_kᵀ and Wᵀu = A_y.

        A_k is the score of class k. Of the K rows √π_k A_kᵀ and residuals onehot(y)/√π − √π, a reflection that takes √π
        to an axis leaves K − 1, since Σ_k π_k A_k = 0.
        """
        log_probs = _log_probs(outputs).clamp_min(LOG_FLOOR)
        root = (0.5 * log_probs).exp()
        rows = root.unsqueeze(-1) * _scores(outputs)
        residual = F.one_hot(targets, root.shape[-1]) / root - root
        axis = root.clone()
        axis[..., -1] += 1.0
        axis = F.normalize(axis, dim=-1)
        rows = rows - 2.0 * axis.unsqueeze(-1) * (axis.unsqueeze(-2) @ rows)
        residual = residual - 2.0 * axis * (axis * residual).sum(-1, keepdim=True)
        return rows[..., :-1, :], residual[..., :-1]

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Symmetric Kullback-Leibler divergence Σ (π − π')(log π − log π') of two predictions, (B,), in nats."""
        log_probs, other = _log_probs(outputs), _log_probs(others)
        return ((log_probs.exp() - other.exp()) * (log_probs - other)).sum(-1)

    def output_unit(self, outputs: Tensor) -> Tensor:
        """The change of each output that counts as large: 1, of log odds and log gaps; broadcasts with (B, K − 1)."""
        return outputs.new_ones(())

    def distribution(self, outputs: Tensor) -> dist.Distribution:
        """p(y | η) with batch shape (B,)."""
        import pyro.distributions as dist

        return dist.Categorical(logits=_log_probs(outputs))

    def mixture(self, outputs: Tensor, log_weights: Tensor) -> Tensor:
        """η of the weighted mean of G predictions' π, (B, K − 1), from (G, B, K − 1) and log weights (G,)."""
        log_probs = (_log_probs(outputs) + log_weights[:, None, None]).logsumexp(0)
        below, above = log_probs.logcumsumexp(-1)[..., :-1], log_probs.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
        odds = log_probs[..., 1:-1] - below[..., :-1] - above[..., 1:]  # log (exp gap − 1)
        gaps = F.softplus(odds).clamp_min(torch.finfo(odds.dtype).tiny).log()
        return torch.cat([(below - above)[..., :1], gaps], -1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A class drawn from each of the outputs (..., B, K − 1), (..., B), on the generator's device."""
        probs = self.mean(outputs).to(generator.device)
        drawn = torch.multinomial(probs.flatten(0, -2), 1, replacement=True, generator=generator)
        return drawn.view(probs.shape[:-1])

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the most probable class is the target, (B,), 0 or 1."""
        return (_log_probs(outputs).argmax(-1) == targets).to(outputs.dtype)


class OrdinalHead(nn.Module):
    """Outputs of the likelihood "ordinal" from one score s(x): (c_0 − s, log (c_1 − c_0), …), so P(y ≤ k) = σ(c_k − s).

    The larger the score, the higher the class. The cutpoints c are trainable: c_0 and the logs of the gaps are the bias
    of a Linear layer, in which outputs are linear.

    Args:
        model: returns one score an example, (B, 1), or an object that has it as ``logits``.
        num_classes: K, at least 3.
        frequencies: of the classes, K positive numbers that need not add up to 1. The cutpoints start where a score
            of 0 predicts them; None: equal ones.

    Raises:
        ValueError: for fewer than three classes, or frequencies that are not as many positive numbers.

    Example:
        >>> head = OrdinalHead(nn.Linear(2, 1), num_classes=4)
        >>> head.cutpoints()
        tensor([-1.0986,  0.0000,  1.0986])
        >>> head(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, num_classes: int, frequencies: Sequence[float] | None = None) -> None:
        check_whole("num_classes", num_classes, 3)
        given = [1.0] * num_classes if frequencies is None else [float(one) for one in frequencies]
        if len(given) != num_classes or not all(0.0 < one < float("inf") for one in given):
            raise ValueError(f"`frequencies` must be {num_classes} positive numbers, got {frequencies!r}.")
        super().__init__()
        self.model = model
        shares = torch.tensor(given, dtype=torch.float64).cumsum(0)
        cutpoints = (shares[:-1] / shares[-1]).logit()
        tensors = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        self.ordered = nn.Linear(1, num_classes - 1, dtype=dtype, device=tensors[0].device if tensors else None)
        with torch.no_grad():
            self.ordered.weight.zero_()[0] = -1.0
            self.ordered.bias.copy_(torch.cat([cutpoints[:1], cutpoints.diff().log()]))
        self.ordered.weight.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The outputs, (B, K − 1).

        Raises:
            ValueError: if the model does not return one score an example.
        """
        scores = as_matrix(self.model(*args, **kwargs))
        if scores.shape[1] != 1:
            raise ValueError(f"`model` must return one score an example, got {scores.shape[1]}.")
        outputs: Tensor = self.ordered(scores.to(self.ordered.weight.dtype))
        return outputs

    def cutpoints(self, bias: Tensor | None = None) -> Tensor:
        """c, ascending, (..., K − 1).

        Args:
            bias: of ``ordered``, as a posterior has it in ``mean["ordered.bias"]``, (..., K − 1); None: its own.
        """
        bias = self.ordered.bias.detach() if bias is None else bias
        return torch.cat([bias[..., :1], bias[..., 1:].exp()], -1).cumsum(-1)


def cumulative_logits(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """γ (..., K − 1), and its gaps exp η (..., K − 2)."""
    gaps = outputs[..., 1:].clamp_min(GAP_FLOOR).exp()
    return outputs[..., :1] + F.pad(gaps, (1, 0)).cumsum(-1), gaps


def _log_probs(outputs: Tensor) -> Tensor:
    """log π, (..., K): σ(b) − σ(a) = σ(b) σ(−a) (1 − exp(a − b)), without cancellation."""
    logits, gaps = cumulative_logits(outputs)
    below, above = F.logsigmoid(logits), F.logsigmoid(-logits)
    between = below[..., 1:] + above[..., :-1] + (-torch.expm1(-gaps)).log()
    return torch.cat([below[..., :1], between, above[..., -1:]], -1)


def _scores(outputs: Tensor) -> Tensor:
    """∂ log π_k/∂η for every class, (..., K, K − 1).

    A shift of all γ changes log π_k by σ(−γ_k) − σ(γ_{k−1}). The gap of η_i shifts the γ from i on: for classes above i
    all that matter to them, for class i itself its upper one alone.
    """
    logits, gaps = cumulative_logits(outputs)
    above, below = F.pad((-logits).sigmoid(), (0, 1)), F.pad(logits.sigmoid(), (1, 0))
    shift = above - below  # (..., K)
    size = outputs.shape[-1]
    number = torch.arange(size + 1, device=outputs.device).unsqueeze(-1)  # of a class
    later = (number > torch.arange(1, size, device=outputs.device)).to(outputs.dtype)  # (K, K − 2)
    scores = shift.unsqueeze(-1) * gaps.unsqueeze(-2) * later
    own = above[..., 1:-1] * gaps + gaps / torch.expm1(gaps)  # gaps of at least exp(-60) divide without loss
    scores[..., 1:-1, :] = scores[..., 1:-1, :] + torch.diag_embed(own)
    return torch.cat([shift.unsqueeze(-1), scores], -1)
