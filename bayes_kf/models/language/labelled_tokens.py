"""Tokens with a label of their own: token classification and masked language models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import IGNORED, Inputs
from bayes_kf.models.language.learned_tokens import PROBE_SEEDS, LearnedTokens, check_below
from bayes_kf.models.language.logits import check_context, logits_in, mapping
from bayes_kf.models.language.supervised_tokens import SupervisedTokens, transformers_model

NOT_OF_THE_MODEL = ("labels", PROBE_SEEDS)  # names among the inputs that a forward pass does not get


class LabelledTokens(LearnedTokens):
    """The labelled tokens of sequences, each with the class at its own place; see :class:`.LearnedTokens`.

    Inputs are a mapping with ``input_ids`` (B, T), ``labels`` (B, T) with −100 for tokens without a label (special
    tokens, padding, later pieces of a word), and whatever else the model takes. Labels of a masked language model are
    such labels too. Predictions are of N tokens, all those with a label, sequence after sequence: ``probs`` (N, C).
    Without labels they are of all tokens that ``attention_mask`` does not hide.

    Args:
        model: one that returns ``logits`` (B, T, C).
        num_probes: K, backward passes of each batch for the curvature.

    Raises:
        ValueError: for fewer than one probe, or if no tensor is trainable.
    """

    def learned_labels(self, inputs: Inputs) -> Tensor:
        """The labels, (B, T), with −100 for all that are negative.

        Raises:
            ValueError: if ``labels`` and ``input_ids`` are not of one shape (sequences, tokens).
        """
        given = mapping(inputs, "input_ids", "labels")
        return _checked_labels(given["input_ids"], given["labels"])

    def logits_of_columns(self, given: Mapping[str, Tensor], columns: Tensor) -> Tensor:
        """Logits of some tokens of every sequence, (B, K, C)."""
        logits = all_logits(self, given)
        return logits[:, columns.to(logits.device)]

    def predicted_targets(self, inputs: Inputs, targets: Tensor | None) -> Tensor | None:
        """The labels of the N tokens that predictions are of, (N,); None without labels."""
        labels = mapping(inputs, "input_ids").get("labels", targets)
        return None if labels is None else labels[labels >= 0]

    @cached_property
    def logits(self) -> TokenLogits:
        """The reading for predictions: logits of the labelled tokens."""
        return TokenLogits(self.model)


class TokenLogits(AdapterModel):
    """The logits of the N labelled tokens of a batch, (N, C).

    Tokens of a sequence share its inputs, so this reading predicts, but is not one that a filter can learn from.
    """

    rows_are_examples = False

    def run(self, inputs: Inputs) -> Tensor:
        """Logits, (N, C), sequence after sequence."""
        given = mapping(inputs, "input_ids", "labels")
        labels = _checked_labels(given["input_ids"], given["labels"])
        sequence, place = (labels >= 0).nonzero(as_tuple=True)
        logits = all_logits(self, given)
        check_below(labels, logits.shape[-1])
        return logits[sequence.to(logits.device), place.to(logits.device)]


def all_logits(adapter: AdapterModel, given: Mapping[str, Tensor]) -> Tensor:
    """Logits of all tokens, (B, T, C); virtual tokens of a learned prompt have none.

    Raises:
        ValueError: if the model returns none, or the texts are longer than its context.
    """
    own = {name: _moved(value, adapter) for name, value in given.items() if name not in NOT_OF_THE_MODEL}
    size, width = given["input_ids"].shape
    check_context(adapter.model, width)
    with adapter.autocast():
        outputs = adapter.model(**own)
    logits = logits_in(outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or len(logits) != size or logits.shape[1] < width:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` must return logits of shape (sequences, tokens, classes) for labels of tokens, got {got}."
        )
    return logits[:, logits.shape[1] - width :]


def token_reading(model: nn.Module, num_probes: int = 1) -> LearnedTokens:
    """The reading for labels (B, T): of each token's own label, unless the model may be one that continues text.

    Models of transformers that do not generate label tokens. Of other modules nothing is known, so they are taken to be
    causal; :class:`LabelledTokens` around one says that it is not.

    Args:
        model: as for the readings.
        num_probes: as for the readings.

    Raises:
        ValueError: for models with an encoder that generate, and as the readings.
    """
    return LabelledTokens(model, num_probes) if labels_tokens(model) else SupervisedTokens(model, num_probes)


def labels_tokens(model: nn.Module) -> bool:
    """Whether a model is one of transformers that does not generate, whose labels (B, T) are the tokens' own."""
    base = transformers_model(model)
    return base is not None and not base.can_generate()


def _moved(value: Any, adapter: AdapterModel) -> Any:
    """An input on the device of the model, if it is a tensor."""
    return value.to(adapter.device) if isinstance(value, Tensor) else value


def _checked_labels(ids: Tensor, labels: Tensor) -> Tensor:
    """Labels (B, T) with −100 for all that are negative."""
    if ids.ndim != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"`labels` must be of the shape (sequences, tokens) of `input_ids`, {tuple(ids.shape)}, "
            f"got {tuple(labels.shape)}."
        )
    return torch.where(labels >= 0, labels, torch.full_like(labels, IGNORED))
