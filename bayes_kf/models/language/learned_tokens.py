"""The learned tokens of sequences, as one observation for each sequence; whatever a label is a label of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.models.language.logits import mapping
from bayes_kf.models.language.token_scores import token_scores
from bayes_kf.processes import shared_work

PROBE_SEEDS = "probe_seeds"  # among the inputs, beside `labels`


class LearnedTokens(AdapterModel):
    """The log-likelihood of each sequence's learned tokens, and K probes of its curvature (:mod:`.token_scores`).

    For the likelihood "tokens". Targets are labels (B, T), −100 where no token is learned, which are inputs too.

    Args:
        model: one that returns ``logits`` (B, T, V).
        num_probes: K, backward passes of each batch for the curvature.

    Raises:
        ValueError: for fewer than one probe, or if no tensor is trainable.
    """

    def __init__(self, model: nn.Module, num_probes: int = 1) -> None:
        if num_probes < 1:
            raise ValueError(f"`num_probes` must be at least 1, got {num_probes}.")
        super().__init__(model)
        self.num_probes = num_probes

    def with_probes(self, num_probes: int) -> LearnedTokens:
        """The same reading with another number of probes."""
        return type(self)(self.model, num_probes)

    @abstractmethod
    def learned_labels(self, inputs: Inputs) -> Tensor:
        """The label that the logits of each column are about, (B, columns); −100 where none is learned."""

    @abstractmethod
    def logits_of_columns(self, given: Mapping[str, Tensor], columns: Tensor) -> Tensor:
        """Logits of the model at some columns of :meth:`learned_labels`, (B, K, V)."""

    def with_targets(self, batch: Batch, seed: int = 0) -> Batch:
        """The batch with its targets among the inputs, and with seeds of its probes, ``seed`` and following."""
        inputs = mapping(batch.inputs, "input_ids")
        if batch.targets is not None and batch.targets.ndim == 2:
            inputs["labels"] = batch.targets
        if shared_work.present_group() is not None and not bool((self.learned_labels(inputs) >= 0).any()):
            raise ValueError("`labels` must have a token to learn, got −100 everywhere.")
        inputs[PROBE_SEEDS] = seed + torch.arange(batch.size, device=batch.device)
        return Batch(inputs, batch.targets, batch.size)

    def part(self, batch: Batch, where: slice) -> Batch:
        """Some sequences of a batch, each with the seed of its probes."""
        inputs = mapping(batch.inputs, "input_ids")
        if PROBE_SEEDS not in inputs:
            inputs[PROBE_SEEDS] = torch.arange(batch.size, device=batch.device)
        return Batch(inputs, batch.targets, batch.size)[where]

    def run(self, inputs: Inputs) -> Tensor:
        """The statistics of the likelihood "tokens" and zeros for the probes, (B, 5 + K)."""
        given = mapping(inputs, "input_ids")
        labels = self.learned_labels(given)
        columns = (labels >= 0).any(0).nonzero().squeeze(-1)
        if not len(columns):
            if shared_work.present_group() is None:
                raise ValueError("`labels` must have a token to learn, got −100 everywhere.")
            columns = torch.zeros(1, dtype=torch.int64, device=labels.device)  # other processes may have some
        logits = self.logits_of_columns(given, columns)
        check_below(labels, logits.shape[-1])
        seeds = given.get(PROBE_SEEDS, torch.arange(len(labels)))
        return token_scores(logits, labels[:, columns].to(logits.device), seeds, self.num_probes)


def check_below(labels: Tensor, number: int) -> None:
    """Raise ValueError for labels that have no logit."""
    if labels.numel() and int(labels.max()) >= number:
        raise ValueError(f"`labels` must be below the model's {number} logits, got {int(labels.max())}.")
