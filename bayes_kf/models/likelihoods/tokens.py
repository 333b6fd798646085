"""The likelihood of the learned tokens of a sequence, from statistics of their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from torch import Tensor

LOG_PROB, UNCERTAINTY, SPREAD, HITS, COUNT = range(5)
STATISTICS = 5
"""The outputs of a sequence before its K probes, sums over its learned tokens y with probabilities π.

log π(y); the odds (1 − π(y))/π(y) against y; the trace 1 − |π|² of the Fisher information of the logits; whether y is
the most probable token; and 1.
"""
LEAST_ODDS = 1e-12  # against the labels of a sequence, which are 0 where none is learned


@dataclass(frozen=True)
class Tokens:
    """The learned tokens of sequences, each of the vocabulary's V; their product is one observation of a sequence.

    Its outputs, (B, 5 + K), come from ``models.language.SupervisedTokens``: no (tokens, vocabulary) matrix reaches the
    filter. Targets are labels (B, T), −100 where no token is learned, which the model reads among its inputs.
    """

    name: str = "tokens"
    target_kind: ClassVar[str] = "tokens"
    outputs_per_target: ClassVar[int] = 1

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Labels as int64 (B, T), or ValueError."""
        if targets.ndim != 2 or len(targets) != len(outputs) or targets.is_floating_point():
            raise ValueError(
                f"`labels` must be token ids of shape ({len(outputs)}, tokens), got {targets.dtype} of shape "
                f"{tuple(targets.shape)}."
            )
        if bool((targets < 0).all()):
            raise ValueError("`labels` must have a token to learn, got −100 everywhere.")
        return targets.long()

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """log p of the learned tokens of each sequence, (..., B)."""
        return outputs[..., LOG_PROB]

    def whiten(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """W (B, 1, 1) and u (B, 1) for the row g = ∂ log p/∂θ of each sequence, so that (Wg)ᵀu = g exactly.

        A token whose label has probability π informs on its log odds with precision c = π/(1 − π) in units of its own
        gradient. The sum of all whitened tokens, weighted so that the gradient is exact, is one observation along g
        with precision 1/Σ_t 1/c_t: at most the information that the tokens have in that direction.
        """
        odds = targets.clamp_min(LEAST_ODDS).unsqueeze(-1)
        return odds.rsqrt().unsqueeze(-1), odds.sqrt()

    def divergence(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Twice the difference of two log-likelihoods of each sequence, (B,): to second order, a divergence."""
        return 2.0 * (outputs[..., LOG_PROB] - others[..., LOG_PROB]).abs()

    def output_unit(self, outputs: Tensor) -> Tensor:
        """1 nat."""
        return outputs.new_ones(())

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of the learned tokens that are the most probable ones, (B,)."""
        return outputs[..., HITS] / outputs[..., COUNT].clamp_min(1.0)

    def mean(self, *_: Any) -> NoReturn:
        """Not defined: predictions of text need logits."""
        raise ValueError(
            "a posterior over text has no predictive distribution of a whole batch: use `score` or `generate`, or "
            "`with_adapter` with a reading such as NextToken."
        )

    residual = variance = sample = distribution = mixture = mean
