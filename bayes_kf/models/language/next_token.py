"""The next token after one place of each sequence, as a class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import IGNORED, Inputs
from bayes_kf.models.language.logits import logits_at, mapping


class NextToken(AdapterModel):
    """The next token after one position of each sequence; every token of the vocabulary is a class.

    Inputs are a mapping with ``input_ids`` (B, T), ``place`` (B,), the index of the last token of the context, and
    ``attention_mask`` (B, T) if there is padding. Targets are token ids (B,). For large vocabularies use
    ``KalmanConfig(curvature="sampled")``. :func:`next_token_examples` makes such batches from sequences.

    Args:
        model: a causal language model, called with ``input_ids`` and ``attention_mask``, that returns ``logits``
            (B, T, V).

    Raises:
        ValueError: if no tensor is trainable.
    """

    def run(self, inputs: Inputs) -> Tensor:
        """Logits of the next token, (B, V)."""
        given = mapping(inputs, "input_ids", "place")
        return logits_at(self, given, given["place"])


class Examples(NamedTuple):
    """A batch for one of the classes above."""

    inputs: dict[str, Tensor]
    targets: Tensor


def next_token_examples(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Iterator[Examples]:
    """One batch for each sequence: the sequence is repeated for each of its tokens that has a label.

    A sequence is cut after the last token that its labels need, so no padding follows it.

    Args:
        input_ids: (B, T).
        labels: (B, T): the tokens to learn, and -100 for prompts and padding.
        attention_mask: (B, T), for padding on the left; None if there is no padding.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> [batch] = next_token_examples(ids, torch.tensor([[-100, -100, 7, 8]]))
        >>> batch.inputs["place"].tolist(), batch.targets.tolist(), batch.inputs["input_ids"].tolist()
        ([1, 2], [7, 8], [[5, 6, 7], [5, 6, 7]])
    """
    if labels.shape != input_ids.shape or input_ids.ndim != 2:
        raise ValueError(
            "`input_ids` and `labels` must be of one shape (sequences, tokens), got "
            f"{tuple(input_ids.shape)} and {tuple(labels.shape)}."
        )
    for number, (tokens, wanted) in enumerate(zip(input_ids, labels, strict=True)):
        place = (wanted[1:] != IGNORED).nonzero().squeeze(-1)
        if not len(place):
            continue
        cut = int(place.max()) + 1
        inputs = {"input_ids": tokens[:cut].expand(len(place), cut).clone(), "place": place}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask[number, :cut].expand(len(place), cut).clone()
        yield Examples(inputs, wanted[place + 1])
