"""The learned tokens of sequences, as one observation for each sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import IGNORED, Batch, Inputs
from bayes_kf.models.language.logits import mapping, token_logits
from bayes_kf.models.language.token_scores import token_scores
from bayes_kf.models.peft_adapters.in_use import is_peft


class SupervisedTokens(AdapterModel):
    """The log-likelihood of each sequence's learned tokens, and K probes of its curvature (:mod:`.token_scores`).

    For the likelihood "tokens". Inputs are those of ordinary fine-tuning, as data collators of transformers make them:
    ``input_ids`` (B, T), ``labels`` (B, T) with −100 for tokens that are not learned (prompts, padding), and
    ``attention_mask`` (B, T) if there is padding. Targets are the labels again. Without labels every token that is not
    masked is learned but the first.

    Args:
        model: a causal language model that returns ``logits`` (B, T, V).
        num_probes: K, backward passes of each batch for the curvature.

    Raises:
        ValueError: for fewer than one probe, a model of transformers that is no causal language model, or if no tensor
            is trainable.
    """

    def __init__(self, model: nn.Module, num_probes: int = 1) -> None:
        if num_probes < 1:
            raise ValueError(f"`num_probes` must be at least 1, got {num_probes}.")
        check_causal(model)
        super().__init__(model)
        self.num_probes = num_probes

    def with_targets(self, batch: Batch, seed: int = 0) -> Batch:
        """The batch with its targets among the inputs, and with seeds of its probes, ``seed`` and following."""
        inputs = mapping(batch.inputs, "input_ids")
        if batch.targets is not None and batch.targets.ndim == 2:
            inputs["labels"] = batch.targets
        inputs["probe_seeds"] = seed + torch.arange(batch.size, device=batch.device)
        return Batch(inputs, batch.targets, batch.size)

    def run(self, inputs: Inputs) -> Tensor:
        """The statistics of the likelihood "tokens" and zeros for the probes, (B, 5 + K)."""
        given = mapping(inputs, "input_ids")
        labels = following_labels(given)
        columns = (labels >= 0).any(0).nonzero().squeeze(-1)
        if not len(columns):
            raise ValueError("`labels` must have a token to learn, got −100 everywhere.")
        logits = token_logits(self, given, columns)
        if int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"`labels` must be below the vocabulary's {logits.shape[-1]}, got {int(labels.max())}.")
        seeds = given.get("probe_seeds", torch.arange(len(labels)))
        return token_scores(logits, labels[:, columns].to(logits.device), seeds, self.num_probes)


def check_causal(model: nn.Module) -> None:
    """Raise ValueError for a model of transformers that does not predict the next token."""
    base: Any = model.get_base_model() if is_peft(model) else model
    config = getattr(base, "config", None)
    if not hasattr(base, "can_generate") or config is None:  # not of transformers
        return
    if not base.can_generate() or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`model` must be a causal language model for labels that are tokens, got {type(base).__name__}."
        )


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
