"""The report on a language model's probabilities of text that exists."""

from collections.abc import Mapping, Sequence

import torch

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.report.provenance import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.text.text_section import text_sections
from bayes_kf.evaluation.text.token_scores import TokenScores


def evaluate_texts(
    log_prob: Array,
    entropy: Array,
    *,
    counted: Array | None = None,
    epistemic: Array | None = None,
    words: Sequence[Sequence[str]] | None = None,
    ood: Mapping[str, Array] | None = None,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
) -> Report:
    """Report on the probabilities of the tokens of B texts, such as `posterior.score(texts)` gives.

    If the predicted distributions are right, the mean loss of a token is its entropy. The report tests that over texts,
    whose own tokens may depend on each other. `ScoredText.report(tokenizer)` calls this.

    Args:
        log_prob: Log probability of each token, (B, T), nats.
        entropy: Of the predicted distribution of each token, (B, T), nats.
        counted: Whether each token counts, (B, T); by default all do.
        epistemic: The part of the entropy that is disagreement, (B, T).
        words: The tokens of each text as strings, to show texts in the colour of their entropy.
        ood: Name to mean entropy a token of texts of another kind, (M,): `scored.sequence_entropy`.
        config: Settings to print.
        title: Title of the page.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 2 * torch.randn(20, 30, 5, generator=generator)
        >>> tokens = torch.distributions.Categorical(logits=logits)
        >>> report = evaluate_texts(tokens.log_prob(logits.argmax(-1)), tokens.entropy())
        >>> report.scores["surprise_gap"] < 0, report.sections.cards[0].answer
        (True, 'no')
    """
    tokens = TokenScores.of(log_prob, entropy, counted, epistemic, words)
    return Report(
        title=title or "Evaluation of a language model",
        config={name: str(value) for name, value in (config or {}).items()},
        sections=text_sections(tokens, ood or {}),
        fingerprints={"losses and entropies": fingerprint(torch.stack([tokens.loss, tokens.entropy], dim=1))},
    )
