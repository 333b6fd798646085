"""Text with the probability and the uncertainty of each of its tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScoredText(NamedTuple):
    """Tokens of B texts and how certain several adapters, drawn from a posterior, are of each.

    p̄ is the average of the adapters' distributions of a token. All but ``tokens`` and ``counted`` are 0 where a token
    does not count, and in nats.

    Attributes:
        tokens: (B, T).
        counted: whether each token counts, (B, T): a written text counts with its end, a prompt and padding do not.
        log_prob: log p̄ of each token, (B, T).
        entropy: H(p̄), (B, T), the total uncertainty of each token before it is known.
        epistemic: the part of it that is disagreement of the adapters, the mutual information, (B, T).
    """

    tokens: Tensor
    counted: Tensor
    log_prob: Tensor
    entropy: Tensor
    epistemic: Tensor

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the adapters' distributions, (B, T)."""
        return self.entropy - self.epistemic

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each text that count, (B,)."""
        return self.counted.sum(1)

    @property
    def sequence_log_prob(self) -> Tensor:
        """Log-probability with which draws of the tokens, one after the other, make each text, (B,)."""
        return self.log_prob.sum(1)

    @property
    def sequence_entropy(self) -> Tensor:
        """Mean entropy of a text's tokens, (B,)."""
        return self.entropy.sum(1) / self.lengths.clamp_min(1)

    @property
    def sequence_epistemic(self) -> Tensor:
        """Mean epistemic entropy of a text's tokens, (B,)."""
        return self.epistemic.sum(1) / self.lengths.clamp_min(1)

    @property
    def sequence_aleatoric(self) -> Tensor:
        """Mean aleatoric entropy of a text's tokens, (B,)."""
        return self.sequence_entropy - self.sequence_epistemic
