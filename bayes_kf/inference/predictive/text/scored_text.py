"""Text with the probability and the uncertainty of each of its tokens."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

from torch import Tensor

from bayes_kf.evaluation import Report, evaluate_texts

DARKEST = 3.0  # nats of entropy that have the full colour in `to_html`


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

    def report(self, tokenizer: Any, **settings: Any) -> Report:
        """A page on these texts: are the probabilities right, and where not; see ``evaluation.evaluate_texts``.

        Args:
            tokenizer: of the model.
            settings: ``ood``, ``title`` and ``config`` of ``evaluate_texts``.

        Raises:
            ValueError: if no token counts.
        """
        words = [[tokenizer.decode([token]) for token in row] for row in self.tokens.tolist()]
        return evaluate_texts(
            self.log_prob, self.entropy, counted=self.counted, epistemic=self.epistemic, words=words, **settings
        )

    def to_html(self, tokenizer: Any, number: int = 0) -> str:
        """A text as HTML whose tokens have the colour of their entropy, for a notebook or a page.

        A tip on each token has its probability, entropy and epistemic entropy. Tokens that do not count are plain.

        Args:
            tokenizer: of the model.
            number: of the text, below B.
        """
        spans = []
        for place, token in enumerate(self.tokens[number].tolist()):
            text = escape(tokenizer.decode([token]))
            if not bool(self.counted[number, place]):
                spans.append(text)
                continue
            shown = (self.log_prob, self.entropy, self.epistemic)
            log_prob, entropy, epistemic = (float(values[number, place]) for values in shown)
            depth = min(entropy / DARKEST, 1.0)
            tip = f"log p {log_prob:.2f}, entropy {entropy:.2f} nats, of which epistemic {epistemic:.3f}"
            spans.append(f'<span title="{tip}" style="background: rgba(213, 94, 0, {0.85 * depth:.2f})">{text}</span>')
        return f'<p style="white-space: pre-wrap">{"".join(spans)}</p>'
