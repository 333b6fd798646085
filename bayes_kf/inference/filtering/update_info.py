"""The report of an update, and its builder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.models.likelihood import Likelihood


class UpdateInfo(NamedTuple):
    """The report of one update.

    Attributes:
        outputs: η at the mean before the update, (B, m).
        log_loss: −log p(y | η), per example, (B,), in nats, before the update.
        correct: per example, (B,), before the update; None for regression.
        innovation: the normalized innovation squared ν = uᵀS⁻¹u at the prior outputs. If the filter is consistent, its
            mean is about ``degrees_of_freedom``, and it is χ² for Gaussian targets; for classes it has heavier tails.
        degrees_of_freedom: of ν.
        damping: factor ≤ 1 on the observation's precision, chosen by the gate and the guard; usually 1. It is 0 if the
            update left out some examples, because no step toward them lowered the objective (with a warning).
        jitter: relative jitter of the noise covariance; usually 0.
        lumped: largest probability that the lumped classes of an example have together ("truncated" curvature);
            otherwise 0.
        step_norm: Euclidean length of the step of the mean.
        penalty: ρ‖g‖², the precision that a ``gradient_penalty`` adds to every parameter for this update; otherwise 0.
        seconds: wall time.
        relinearized: how often the rest of the batch was linearized again at the mean after its first examples, because
            the linearized outputs were no longer accurate; usually 0, and 0 for linear models.
        linearized_again: examples that took a further forward and backward pass for that reason.
        checked: examples that took a further forward pass, without a graph, to check the linearization.
    """

    outputs: Tensor
    log_loss: Tensor
    correct: Tensor | None
    innovation: float
    degrees_of_freedom: int
    damping: float
    jitter: float
    lumped: float
    step_norm: float
    penalty: float
    seconds: float
    relinearized: int = 0
    linearized_again: int = 0
    checked: int = 0


class UpdateInfoBuilder:
    """Gathers an :class:`UpdateInfo` over the chunks and blocks of a batch.

    Attributes:
        num_examples: examples whose outputs before the update are known.
    """

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._log_losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._innovation, self._degrees_of_freedom, self._damping, self._jitter = 0.0, 0, 1.0, 0.0
        self._lumped, self._num_linearized, self._num_checked = 0.0, 0, 0
        self.num_examples = 0

    def add_outputs(self, outputs: Tensor, targets: Tensor, family: Likelihood) -> None:
        """Add examples with their outputs before the update."""
        self.num_examples += len(outputs)
        self._outputs.append(outputs)
        self._log_losses.append(-family.log_prob(outputs, targets))
        correct = family.correct(outputs, targets)
        if correct is not None:
            self._correct.append(correct)

    def add_linearization(self, num_examples: int, lumped: float) -> None:
        """Add a chunk that was linearized, before the update or during it."""
        self._num_linearized += num_examples
        self._lumped = max(self._lumped, lumped)

    def add_check(self, num_examples: int) -> None:
        """Add a forward pass that linearization does not need."""
        self._num_checked += num_examples

    def add_block(self, innovation: float, degrees_of_freedom: int, damping: float, jitter: float) -> None:
        """Add a block of observations on which the belief was conditioned."""
        self._innovation += innovation
        self._degrees_of_freedom += degrees_of_freedom
        self._damping, self._jitter = min(self._damping, damping), max(self._jitter, jitter)

    def add_parallel_update(self, other: UpdateInfoBuilder) -> None:
        """Add the damping, the jitter and the checks of another update from the same chunks."""
        self._damping, self._jitter = min(self._damping, other._damping), max(self._jitter, other._jitter)
        self._num_checked += other._num_checked

    def build(self, step_norm: float, penalty: float = 0.0, relinearized: int = 0) -> UpdateInfo:
        """The report, without its wall time."""
        return UpdateInfo(
            outputs=torch.cat(self._outputs) if self._outputs else torch.empty(0, 0),
            log_loss=torch.cat(self._log_losses) if self._log_losses else torch.empty(0),
            correct=torch.cat(self._correct) if self._correct else None,
            innovation=self._innovation,
            degrees_of_freedom=self._degrees_of_freedom,
            damping=self._damping,
            jitter=self._jitter,
            lumped=self._lumped,
            step_norm=step_norm,
            penalty=penalty,
            seconds=0.0,
            relinearized=relinearized,
            linearized_again=max(0, self._num_linearized - self.num_examples),
            checked=self._num_checked,
        )
