"""The linearized measurement of one update: a chunk of the batch, and the blocks of it that are solved together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.measurement_model.output_directions import Probes, ProjectedOutputs
from bayes_kf.models.likelihood import Likelihood

MAX_BLOCK_ROWS = 192  # rows of one block; the blocks of a larger batch follow each other (sequential update)


class Measurement(NamedTuple):
    """A chunk of a batch, linearized at a point.

    Attributes:
        outputs_at: from θ (n,) and a slice of the examples to their outputs there.
        targets: as the likelihood's ``check`` returned them.
        outputs: at the point, (B, m).
        point: θ of the linearization, (n,).
        projected: the outputs in the directions of the curvature.
        jacobian: of all directions.
        rows_per_example: rows of each example, at most.
        fitted_point: whether the point was fitted to these targets; the likelihood is then expanded there.
        hold_mean: whether the update changes the covariance alone; nothing is scored then.
    """

    outputs_at: Callable[[Tensor, slice], Tensor]
    targets: Tensor
    outputs: Tensor
    point: Tensor
    projected: ProjectedOutputs
    jacobian: Jacobian
    rows_per_example: list[int]
    fitted_point: bool = False
    hold_mean: bool = False

    def block(self, where: slice, num_rows: int) -> MeasurementBlock:
        """Some of the examples, of which none has more than ``num_rows`` rows."""
        projected = self.projected
        outputs, targets = projected.outputs[where, :num_rows], projected.targets[where]
        directions = self.jacobian.examples(where).rows(num_rows)
        jacobian, probes = directions, None
        if projected.probes is not None:  # the outputs are the first direction alone
            probes = projected.probes.examples(where)
            first = torch.eye(outputs.shape[1], directions.num_rows, dtype=outputs.dtype, device=outputs.device)
            jacobian = directions.left_multiply(first.expand(len(outputs), -1, -1))
        degrees = int(projected.degrees_of_freedom[where].sum())
        return MeasurementBlock(projected.family, outputs, outputs, targets, degrees, jacobian, directions, probes)


class MeasurementBlock(NamedTuple):
    """Examples on which the belief is conditioned together, in the directions of the curvature.

    Attributes:
        family: likelihood of the targets given the projected outputs.
        outputs: the projected outputs at the present mean, (B, c).
        outputs_at_point: those at the point of the linearization, (B, c).
        targets: in terms of them.
        degrees_of_freedom: of the innovation.
        jacobian: of the projected outputs.
        directions: the Jacobian of all directions, which ``probes`` combine into the rows of the covariance.
        probes: None if the covariance uses ``jacobian``.
        exact: whether ``outputs`` are those of a forward pass at the present mean, not of first order.
    """

    family: Likelihood
    outputs: Tensor
    outputs_at_point: Tensor
    targets: Tensor
    degrees_of_freedom: int
    jacobian: Jacobian
    directions: Jacobian
    probes: Probes | None
    exact: bool = True

    def shifted(self, step: Tensor) -> MeasurementBlock:
        """The block with its outputs of first order after a step (n,) from the point of the linearization."""
        return self._replace(outputs=self.outputs_at_point + self.jacobian.matvec(step), exact=False)


class ObservationPair(NamedTuple):
    """The observations on which a belief is conditioned.

    Attributes:
        mean: the observation that updates the mean.
        covariance: the one that updates the covariance; None if it is the same.
    """

    mean: Observation
    covariance: Observation | None

    def update(self, belief: GaussianBelief, precision: float, accumulate: bool) -> GaussianBelief:
        """The belief given both, with their precision multiplied by a number.

        Args:
            belief: before the update.
            precision: the factor.
            accumulate: whether the belief accumulates precision, because its mean is held.
        """
        mean, covariance = self.mean, self.covariance
        if precision != 1.0:
            mean = mean.scaled(precision)
            covariance = None if covariance is None else covariance.scaled(precision)
        return belief.accumulate(mean, covariance) if accumulate else belief.condition(mean, covariance)


def next_block(rows_per_example: Sequence[int], first: int = 0) -> tuple[slice, int]:
    """The examples from ``first`` on that fit in one block of ``MAX_BLOCK_ROWS`` rows, and the rows of each."""
    num_rows = 0
    for number in range(first, len(rows_per_example)):
        wider = max(num_rows, rows_per_example[number])
        if number > first and (number + 1 - first) * wider > MAX_BLOCK_ROWS:
            return slice(first, number), num_rows
        num_rows = wider
    return slice(first, len(rows_per_example)), num_rows


def measurement_blocks(rows_per_example: Sequence[int]) -> list[tuple[slice, int]]:
    """All blocks of a batch, one after the other; see :func:`next_block`."""
    blocks = [next_block(rows_per_example)]
    while blocks[-1][0].stop < len(rows_per_example):
        blocks.append(next_block(rows_per_example, blocks[-1][0].stop))
    return blocks
