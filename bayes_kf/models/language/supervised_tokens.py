"""The learned tokens of text, each predicted from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.batch import IGNORED, Inputs
from bayes_kf.models.language.learned_tokens import LearnedTokens
from bayes_kf.models.language.logits import mapping, token_logits
from bayes_kf.models.peft_adapters.in_use import is_peft


class SupervisedTokens(LearnedTokens):
    """The learned tokens of text, each predicted from those before it; see :class:`.LearnedTokens`.

    Inputs are those of ordinary fine-tuning, as data collators of transformers make them: ``input_ids`` (B, T),
    ``labels`` (B, T) with −100 for tokens that are not learned (prompts, padding), and ``attention_mask`` (B, T) if
    there is padding. Without labels every token that is not masked is learned but the first.

    Args:
        model: a causal language model that returns ``logits`` (B, T, V).
        num_probes: K, backward passes of each batch for the curvature.

    Raises:
        ValueError: for fewer than one probe, a model of transformers that is no causal language model, or if no tensor
            is trainable.
    """

    def __init__(self, model: nn.Module, num_probes: int = 1) -> None:
        check_causal(model)
        super().__init__(model, num_probes)

    def learned_labels(self, inputs: Inputs) -> Tensor:
        """For each column the token that follows and is learned, (B, T − 1); −100 if none is."""
        return following_labels(inputs)

    def logits_of_columns(self, given: Mapping[str, Tensor], columns: Tensor) -> Tensor:
        """Logits of the token after each of some columns, (B, K, V)."""
        return token_logits(self, given, columns)


def check_causal(model: nn.Module) -> None:
    """Raise ValueError for a model of transformers that does not predict the next token."""
    base = transformers_model(model)
    if base is not None and (not base.can_generate() or getattr(base.config, "is_encoder_decoder", False)):
        raise ValueError(
            "`model` must be a causal language model, or one that labels every token, for labels that are tokens, got "
            f"{type(base).__name__}."
        )


def transformers_model(model: nn.Module) -> Any:
    """The model of transformers itself, without PEFT; None for other modules."""
    base: Any = model.get_base_model() if is_peft(model) else model
    return base if hasattr(base, "can_generate") and getattr(base, "config", None) is not None else None


def following_labels(inputs: Inputs) -> Tensor:
    """For each column the token that follows and is learned, (B, T − 1); −100 if none is.

    A token that no token precedes, since it follows padding, is not learned.

    Raises:
        ValueError: if ``labels`` and ``input_ids`` are not of one shape (sequences, tokens).
    """
    given = mapping(inputs, "input_ids")
    ids, labels = given["input_ids"], given.get("labels", given["input_ids"])
    if ids.ndim != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"`labels` must be of the shape (sequences, tokens) of `input_ids`, {tuple(ids.shape)}, "
            f"got {tuple(labels.shape)}."
        )
    following = labels[:, 1:]
    mask = given.get("attention_mask")
    if mask is not None:
        both = mask[:, 1:].bool() & mask[:, :-1].bool()
        following = torch.where(both.to(following.device), following, torch.full_like(following, IGNORED))
    return torch.where(following >= 0, following, torch.full_like(following, IGNORED))
