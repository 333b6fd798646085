"""What a posterior over a causal language model can do with text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bayes_kf.inference.predictive.gaussian_posterior import PosteriorDraws
from bayes_kf.inference.predictive.text.scored_text import ScoredText
from bayes_kf.models.batch import Inputs

if TYPE_CHECKING:
    from bayes_kf.inference.predictive.text.answers import Answers, Predictor


class TextPredictions:
    """Text by the posterior predictive: for posteriors over causal language models, whatever they were fitted on."""

    def generate(
        self: PosteriorDraws, inputs: Inputs, max_new_tokens: int | None = None, **settings: Any
    ) -> ScoredText:
        """Write text with its uncertainty; see :func:`.generation.generate`."""
        from bayes_kf.inference.predictive.text import generation  # loads transformers

        return generation.generate(self, inputs, max_new_tokens, **settings)

    def score(self: PosteriorDraws, texts: Sequence[str] | Inputs, *arguments: Any, **settings: Any) -> ScoredText:
        """Probability and uncertainty of text that exists; see :func:`.scoring.score`."""
        from bayes_kf.inference.predictive.text import scoring  # loads transformers

        return scoring.score(self, texts, *arguments, **settings)

    def answer(
        self: Predictor,
        prompts: Sequence[str],
        options: Sequence[str] | Sequence[Sequence[str]],
        **settings: Any,
    ) -> Answers:
        """Choose among texts after each prompt; see :func:`.answers.answer`."""
        from bayes_kf.inference.predictive.text import answers  # loads transformers

        return answers.answer(self, prompts, options, **settings)
