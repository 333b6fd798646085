"""Sentences on the agreement of a model with people's answers."""

import math
from collections.abc import Mapping

from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import decimal_range, minus

DETECTABLE_CORRELATION = 0.3


def human_verdict(scores: Mapping[str, Score]) -> str:
    """Log loss of people's answers, divided into their own entropy and the model's divergence from them."""
    nll, entropy, divergence = (scores[f"human_{name}"] for name in ("nll", "entropy", "kl"))
    if not math.isfinite(nll.value):
        return "At least one answer that people gave has predicted probability zero, so their log loss is infinite."
    interval = "" if divergence.interval is None else f" ({decimal_range(divergence.interval)})"
    return (
        f"The log loss of people's answers is {nll.value:.3f} nats: {entropy.value:.3f} are their own entropy and "
        f"{divergence.value:.3f}{interval} the divergence of the model from them."
    )


def entropy_correlation_verdict(correlation: Score) -> str:
    """Whether the model is uncertain about the same examples as people."""
    question = "whether the model is uncertain where people are"
    if math.isnan(correlation.value):
        return (
            "The rank correlation of the model's and people's entropies is not defined: all entropies of one of them "
            "are equal."
        )
    value = minus(f"{correlation.value:.2f}")
    if correlation.interval is None:
        return f"Too few examples to tell {question} (rank correlation {value})."
    low, high = correlation.interval
    numbers = f"rank correlation of the entropies {value}, {decimal_range(correlation.interval, 2)}"
    if low > 0:
        return f"The model is uncertain where people are ({numbers})."
    if high < 0:
        return f"The model is most certain where people are uncertain ({numbers})."
    if (high - low) / 2 * 1.43 > DETECTABLE_CORRELATION:
        return f"Too few examples to tell {question} ({numbers})."
    return f"No evidence that the model is uncertain where people are ({numbers})."
