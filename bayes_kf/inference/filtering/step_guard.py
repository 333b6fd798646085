"""The guard: a step is used only if it lowers the objective that it was computed from by linearization."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bayes_kf.inference.config_groups import NoiseSettings
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.filtering.linearization_check import TRUST_RADIUS, is_small_change
from bayes_kf.inference.filtering.measurement import Measurement, MeasurementBlock
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.measurement_model import noise
from bayes_kf.processes import parameter_sums

DAMPING_STEP = 0.25  # an update that the guard refuses is solved again with this much of the precision
MAX_DAMPINGS = 8
MIN_BLOCK_EXAMPLES = 16  # blocks are halved down to this size if they are too large for one step
OBJECTIVE_RTOL = 1e-4  # relative rise of the objective that counts as rounding


class StepGuard:
    """Accepts a step if it lowers −log p(y | μ) + ½ δᵀP⁻¹δ, the objective that conditioning solves by linearization.

    A step that changes no output by more than ``TRUST_RADIUS`` is accepted without a forward pass.

    Attributes:
        last_mean: the mean of the last forward pass; None before the first.
        last_outputs: the outputs there.
    """

    def __init__(
        self,
        settings: NoiseSettings,
        state: FilterState,
        measurement: Measurement,
        where: slice,
        block: MeasurementBlock,
    ) -> None:
        self._family = noise.likelihood(settings, state.noise)
        self._belief, self._block, self._where = state.belief, block, where
        self._outputs_at, self._targets = measurement.outputs_at, measurement.targets[where]
        self._objective_before: Tensor | None = None
        self.max_dampings = MAX_DAMPINGS if len(block.targets) < 2 * MIN_BLOCK_EXAMPLES else 0  # otherwise halve first
        self.last_mean: Tensor | None = None
        self.last_outputs: Tensor | None = None

    def accepts(self, after: GaussianBelief) -> bool:
        """Whether the step to the mean of ``after`` is accepted."""
        if not parameter_sums.all_shards_agree(bool(torch.isfinite(after.mean).all())):
            return False
        step = after.mean - self._belief.mean
        change = self._block.jacobian.matvec(step)
        if is_small_change(change, self._family, self._block.outputs, TRUST_RADIUS):
            return True
        penalty = 0.5 * self._belief.quadratic(step)
        del step
        if self._objective_before is None:
            self._objective_before = self._log_loss_before()
        allowed = self._objective_before + OBJECTIVE_RTOL * (1.0 + self._objective_before.abs())
        self.last_mean, self.last_outputs = after.mean, self._outputs_at(after.mean, self._where)
        if not bool(torch.isfinite(self.last_outputs).all()):
            return False
        log_loss = -self._family.log_prob(self.last_outputs, self._targets).sum()
        return bool(log_loss + penalty <= allowed)

    def _log_loss_before(self) -> Tensor:
        """−log p(y | μ) of the block at the mean before the update."""
        block = self._block
        if block.exact:
            return -block.family.log_prob(block.outputs, block.targets).sum()
        self.last_mean, self.last_outputs = self._belief.mean, self._outputs_at(self._belief.mean, self._where)
        return -self._family.log_prob(self.last_outputs, self._targets).sum()


def warn_of_refused_steps() -> None:
    """Warn that an update left out some examples."""
    warnings.warn(
        "no step toward some examples lowered −log p(y | μ) + ½ δᵀP⁻¹δ, not even with "
        f"{DAMPING_STEP**MAX_DAMPINGS:.1g} of their precision: the update left them out (`damping` is 0 in its info). "
        "The model is far from linear within the belief; a narrower prior may help.",
        stacklevel=2,
    )
