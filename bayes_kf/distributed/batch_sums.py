"""The sums over examples that the information form takes from a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.processes.process_group import Group


class BatchSums(NamedTuple):
    """Sums over the examples of one process, or of all processes.

    Attributes:
        precision: diag(JᵀVJ), (n,).
        gradient: Jᵀ(y − π), (n,).
        log_prob: Σ log p(y | μ).
        temperature_scores: log losses by temperature and their squared differences.
        examples: the number of examples.
    """

    precision: Tensor
    gradient: Tensor
    log_prob: Tensor
    temperature_scores: TemperatureState
    examples: int

    @classmethod
    def zeros(cls, mean: Tensor) -> BatchSums:
        """The sums over no example, for a belief with this mean, (n,)."""
        zero, log_prob = torch.zeros_like(mean), torch.zeros((), dtype=torch.float64, device=mean.device)
        return cls(zero, zero, log_prob, prequential_temperature.init(mean.device), 0)

    def over_processes(self, group: Group, examples: int) -> BatchSums:
        """The sums over the examples of all processes, of which there are ``examples``."""
        size = len(prequential_temperature.GRID)
        numbers = [self.log_prob.view(1), self.temperature_scores.total, self.temperature_scores.differences.flatten()]
        log_prob, total, differences = group.all_reduce(torch.cat(numbers)).split([1, size, size**2])
        scores = TemperatureState(0, total, differences.view(size, size))
        precision, gradient = group.all_reduce(self.precision), group.all_reduce(self.gradient)
        return BatchSums(precision, gradient, log_prob[0], scores, examples)

    def added_scores(self, scores: TemperatureState) -> TemperatureState:
        """The scores of earlier batches with those of this batch."""
        differences = scores.differences + self.temperature_scores.differences
        return TemperatureState(scores.updates + 1, scores.total + self.temperature_scores.total, differences)
