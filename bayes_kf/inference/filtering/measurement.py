"""What travels through one update: a piece of the batch, a part of it that is solved together, what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.filtering.state import UpdateInfo
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.measurement_model.output_directions import Probes, Seen
from bayes_kf.models.likelihood import Likelihood


class Batch(NamedTuple):
    """A piece of a batch, linearized.

    Attributes:
        outputs_at: from θ (n,) and which of its examples to their outputs there.
        targets: as the likelihood's ``check`` returned them.
        outputs: where it is linearized, (B, m).
        start: θ there, (n,).
        seen: what the curvature sees of the outputs.
        jacobian: of what is seen, with all directions.
        widths: the most rows that each of its examples has.
        known: whether ``start`` has seen the targets: the likelihood is then expanded there.
        hold_mean: whether only the covariance learns; nothing is scored then.
    """

    outputs_at: Callable[[Tensor, slice], Tensor]
    targets: Tensor
    outputs: Tensor
    start: Tensor
    seen: Seen
    jacobian: Jacobian
    widths: list[int]
    known: bool = False
    hold_mean: bool = False


class Part(NamedTuple):
    """Examples that are conditioned on together, as the curvature sees them.

    Attributes:
        family: the likelihood of what is seen.
        outputs: that at the present mean, (B, c).
        start: that where the batch was linearized, (B, c).
        targets: in terms of it.
        degrees: of freedom of the innovation.
        jacobian: of it.
        pulled: the Jacobian of all directions, whose combinations by ``probes`` the covariance learns from.
        probes: None where it learns from ``jacobian``.
        exact: whether ``outputs`` are those of a forward pass at the present mean, not to first order about ``start``.
    """

    family: Likelihood
    outputs: Tensor
    start: Tensor
    targets: Tensor
    degrees: int
    jacobian: Jacobian
    pulled: Jacobian
    probes: Probes | None
    exact: bool = True

    @classmethod
    def of(cls, seen: Seen, pulled: Jacobian, where: slice, width: int) -> Part:
        """Some examples of a piece, of which none has more than ``width`` rows."""
        outputs, jacobian, probes = seen.outputs[where, :width], pulled.examples(where).rows(width), None
        own = jacobian
        if seen.probes is not None:
            probes = seen.probes.examples(where)
            first = torch.eye(outputs.shape[1], jacobian.num_rows, dtype=outputs.dtype, device=outputs.device)
            own = jacobian.left_multiply(first.expand(len(outputs), -1, -1))
        degrees = int(seen.degrees[where].sum())
        return cls(seen.family, outputs, outputs, seen.targets[where], degrees, own, jacobian, probes)

    def moved(self, step: Tensor) -> Part:
        """The same after a step of the parameters, (n,), from where the batch was linearized, to first order."""
        return self._replace(outputs=self.start + self.jacobian.matvec(step), exact=False)


class Evidence(NamedTuple):
    """What a belief is conditioned on.

    Attributes:
        mean: the observation that moves the mean.
        covariance: the one that the covariance learns from; None where it is the same.
    """

    mean: Observation
    covariance: Observation | None

    def condition(self, belief: GaussianBelief, precision: float, accumulate: bool) -> GaussianBelief:
        """The belief after it, its precision multiplied by a number; by ``accumulate`` where the mean is held."""
        mean, covariance = (o if o is None or precision == 1.0 else o.scaled(precision) for o in self)
        assert mean is not None
        return belief.accumulate(mean, covariance) if accumulate else belief.condition(mean, covariance)


class Tally:
    """What an update reports, gathered over its pieces and parts."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._log_losses: list[Tensor] = []
        self._correct: list[Tensor | None] = []
        self._innovation, self._dof, self._damping, self._jitter, self._lumped = 0.0, 0, 1.0, 0.0, 0.0
        self._linearized, self._checked = 0, 0

    @property
    def examples(self) -> int:
        """How many examples' outputs before the update are known."""
        return sum(map(len, self._outputs))

    def piece(self, outputs: Tensor, targets: Tensor, family: Likelihood) -> None:
        """Take in examples as they were before the update."""
        self._outputs.append(outputs)
        self._log_losses.append(-family.log_prob(outputs, targets))
        self._correct.append(family.correct(outputs, targets))

    def linearized(self, batch: Batch) -> None:
        """Take in a piece that was linearized, there or elsewhere."""
        self._linearized += len(batch.targets)
        self._lumped = max(self._lumped, batch.seen.lumped)

    def checked(self, examples: int) -> None:
        """Take in a forward pass that linearizing would not have taken."""
        self._checked += examples

    def part(self, observation: Observation, damping: float, jitter: float) -> None:
        """Take in a part that was conditioned on."""
        self._innovation += observation.innovation
        self._dof += observation.degrees_of_freedom
        self._damping, self._jitter = min(self._damping, damping), max(self._jitter, jitter)

    def also(self, other: Tally) -> None:
        """Take in how another update from the same pieces was damped, the jitter that it took, and its checks."""
        self._damping, self._jitter = min(self._damping, other._damping), max(self._jitter, other._jitter)
        self._checked += other._checked

    def info(self, step_norm: float, penalty: float = 0.0, relinearized: int = 0) -> UpdateInfo:
        """The report, but for its time."""
        correct = [c for c in self._correct if c is not None]
        return UpdateInfo(
            outputs=torch.cat(self._outputs) if self._outputs else torch.empty(0, 0),
            log_loss=torch.cat(self._log_losses) if self._log_losses else torch.empty(0),
            correct=torch.cat(correct) if correct else None,
            innovation=self._innovation,
            degrees_of_freedom=self._dof,
            damping=self._damping,
            jitter=self._jitter,
            lumped=self._lumped,
            step_norm=step_norm,
            penalty=penalty,
            seconds=0.0,
            relinearized=relinearized,
            linearized_again=max(0, self._linearized - self.examples),
            checked=self._checked,
        )
