"""Answers to questions, chosen among options, with their probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import PosteriorDraws
from bayes_kf.inference.predictive.prediction import LoaderPrediction
from bayes_kf.inference.predictive.text.tokenizing import completions, tokenizer_of
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.language import OptionTexts
from bayes_kf.validation import check_whole


class Predictor(PosteriorDraws, Protocol):
    """A posterior that predicts under other readings of its model."""

    def with_adapter(self, adapter: AdapterModel) -> Self:
        """The same posterior over another reading."""

    def predict_loader(self, loader: Any, method: str = ..., num_samples: int = ...) -> LoaderPrediction:
        """Predictions for batches."""


class Answers(NamedTuple):
    """The options chosen for B questions, and how certain the posterior is of them; entropies in nats.

    Attributes:
        texts: the most probable option of each question.
        probs: of all m options of each question, (B, m).
        entropy: total uncertainty, (B,).
        aleatoric: its part that more data would not take away, (B,); None with the method "mean".
        epistemic: its part that is uncertainty of the adapter, (B,); None with the method "mean".
    """

    texts: list[str]
    probs: Tensor
    entropy: Tensor
    aleatoric: Tensor | None
    epistemic: Tensor | None

    @property
    def confidence(self) -> Tensor:
        """Probability of the chosen options, (B,)."""
        return self.probs.max(-1).values


def answer(
    posterior: Predictor,
    prompts: Sequence[str],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    per_token: bool = False,
    tokenizer: Any = None,
    method: str = "linearized",
    num_samples: int = 64,
    batch_size: int = 8,
) -> Answers:
    """Choices among texts that may follow each prompt.

    An option's logit is the log-likelihood of its tokens. A posterior that was fitted on another reading of the model,
    or on text, gives probabilities that are no better than its model's habit of writing: fit on ``OptionTexts``, or
    ``calibrate`` on questions with answers, where probabilities matter.

    Args:
        posterior: over a causal language model.
        prompts: B texts.
        options: m texts for all prompts, or m for each, with their leading space if they have one.
        per_token: whether a log-likelihood is divided by the option's number of tokens, so that long options can win.
        tokenizer: of the model; by default the one that lies beside its weights.
        method: as for ``predict``.
        num_samples: as for ``predict``.
        batch_size: prompts that are read together.

    Raises:
        ValueError: if an argument is bad, an option has no token, or prompt and option are longer than the context.
    """
    check_whole("batch_size", batch_size)
    if isinstance(options, str) or len(options) < 1:
        raise ValueError(f"`options` must be texts, or a list of texts for each prompt, got {options!r}.")
    each = [
        [str(text) for text in (options if isinstance(options[0], str) else options[number])]
        for number in range(len(prompts) if isinstance(options[0], str) else len(options))
    ]
    if few := [some for some in each if len(some) < 2]:
        raise ValueError(f"`options` must be at least two texts for each prompt, got {few[0]!r}.")
    own = tokenizer_of(posterior.adapter.model, tokenizer)
    completions(own, prompts, each)  # bad texts are told before anything is computed
    batches = [
        completions(own, prompts[start : start + batch_size], each[start : start + batch_size])
        for start in range(0, len(prompts), batch_size)
    ]
    reading = posterior.with_adapter(OptionTexts(posterior.adapter.model, per_token))
    predicted = reading.predict_loader(batches, method, num_samples)
    probs, entropy = predicted.probs, predicted.entropy
    assert probs is not None and entropy is not None  # of a classification  # noqa: PT018
    chosen = [some[int(number)] for some, number in zip(each, probs.argmax(-1), strict=True)]
    return Answers(chosen, probs, entropy, predicted.aleatoric, predicted.epistemic)
