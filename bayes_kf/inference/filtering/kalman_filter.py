"""The recursion: predict, linearize, learn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.covariance.block_diagonal import block_sizes
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.filtering import gradient_penalty, prior, relinearization, tempering
from bayes_kf.inference.filtering.measurement import Batch
from bayes_kf.inference.filtering.measurement_update import check_finite, parts
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState, UpdateInfo
from bayes_kf.inference.linearization import parameter_sums
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.measurement_model.output_directions import num_directions, num_rows, see, warn_of_many
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, check_inputs, some_examples, to_device

if TYPE_CHECKING:
    from bayes_kf.inference.posterior import Posterior


class KalmanFilter:
    """Advances a Gaussian belief over a model's trainable tensors, one batch at a time.

    Args:
        model: a PEFT model or any module with trainable tensors; only read.
        config: the settings; defaults to ``KalmanConfig()``.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> kf = KalmanFilter(model, KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0))
        >>> state = kf.init()
        >>> state, info = kf.update(state, torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
        >>> kf.marginal_variance(state)  # one unit-noise look at the first weight halves its variance
        tensor([0.5000, 1.0000])
    """

    def __init__(self, model: nn.Module | AdapterModel, config: KalmanConfig | None = None) -> None:
        self.adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
        self.config = KalmanConfig() if config is None else config
        check_config(self.config)
        self.linearize = Linearizer(self.adapter, self.config.outputs_per_pass, self.config.bytes_budget)

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """The prior: its mean the model's present tensors, its variance by the configured rule.

        Args:
            inputs: a batch to measure the scale of the outputs on, for ``initial_logit_sd``; no targets are needed.
                Without it the first update's inputs serve.
        """
        mean = self.adapter.vector()
        start = DiagonalGaussian(mean, prior.unscaled(self.config, mean))
        scaled = not prior.depends_on_inputs(self.config)
        scores = tempering.init(mean.device)
        state = FilterState(self._belief(start), start, NoiseState(), scores, scaled, 0, 0)
        if inputs is None or scaled:
            return state
        check_inputs(inputs)
        given = to_device(inputs, self.adapter.device)
        with self.adapter.full_precision():
            return self.linearize.retry_in_smaller_chunks(lambda: self._scale(state, given), batch_size(given))

    def restart(self, state: FilterState) -> FilterState:
        """The prior again, for another pass over the same data, with nothing scored; estimated noise stays."""
        again = NoiseState(variance=state.noise.variance, information=state.noise.information)
        scores = tempering.init(state.belief.mean.device)
        return FilterState(self._belief(state.prior), state.prior, again, scores, state.scaled, 0, 0)

    def update(
        self,
        state: FilterState,
        inputs: Inputs,
        targets: Tensor,
        *,
        hold_mean: bool = False,
        at: Tensor | None = None,
    ) -> tuple[FilterState, UpdateInfo]:
        """The belief after one more batch, and what was seen on the way. ``state`` is not changed.

        Args:
            state: from :meth:`init` or an earlier update.
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            targets: (B,) class labels, or (B, m) numbers for the other likelihoods.
            hold_mean: whether only the covariance learns, linearized at a mean that stays (post hoc). An estimated
                noise variance stays that of the first batch's residuals; ``fit`` estimates it again after the pass.
            at: θ to linearize and expand at, (n,), instead of the belief's mean: the mean that an earlier pass over the
                same data ended with, see :meth:`restart`. Such an update is not guarded, and leaves an estimated noise
                variance as it is. The temperature is scored by what the belief predicts before it.

        Raises:
            ValueError: for inputs or targets that do not fit, before anything is computed from them; for ``hold_mean``
                or ``at`` with a ``gradient_penalty``.
            DivergenceError: when the update would leave the finite or the positive; ``state`` is kept.
        """
        start = time.perf_counter()
        check_inputs(inputs)
        if not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor, got {type(targets).__name__}.")
        if self.config.gradient_penalty and (hold_mean or at is not None):
            raise ValueError(
                "`gradient_penalty` must be 0 where the mean is held or linearized elsewhere (a trained adapter,"
                f" another pass), got {self.config.gradient_penalty:g}."
            )
        device = self.adapter.device
        try:
            with self.adapter.full_precision():
                inputs, targets = to_device(inputs, device), targets.to(device)
                after, info = self.linearize.retry_in_smaller_chunks(
                    lambda: self._update(state, inputs, targets, hold_mean, at), batch_size(inputs)
                )
        except DIVERGED as error:
            raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return after, info._replace(seconds=time.perf_counter() - start)

    def marginal_variance(self, state: FilterState) -> Tensor:
        """Variance of every parameter, (n,)."""
        return state.belief.marginal_variance()

    def posterior(self, state: FilterState) -> Posterior:
        """The posterior of a state, to predict with and to save."""
        from bayes_kf.inference.posterior import Posterior  # which is built on filters

        return Posterior(self, state)

    def temperature(self, state: FilterState) -> float:
        """Factor on the covariance in predictions: as configured, or chosen by the prequential score."""
        return tempering.temperature(self.config.temperature, state.scores)

    def _update(
        self, state: FilterState, inputs: Inputs, targets: Tensor, hold_mean: bool, at: Tensor | None
    ) -> tuple[FilterState, UpdateInfo]:
        sides = self._begun(state, inputs, targets)
        start, known = (sides.plain.belief.mean, hold_mean) if at is None else (at, True)
        return self._through(sides, start, inputs, targets, known=known, hold_mean=hold_mean)

    def _through(
        self,
        sides: gradient_penalty.Sides,
        start: Tensor,
        inputs: Inputs,
        targets: Tensor,
        learn: relinearization.Learn | None = None,
        *,
        known: bool = False,
        hold_mean: bool = False,
    ) -> tuple[FilterState, UpdateInfo]:
        """The state after a batch that is linearized at ``start`` first, and the report; ``learn`` as there."""
        size = batch_size(inputs)

        def observe(now: FilterState, where: slice, mean: Tensor) -> Iterator[Batch]:
            for batch in self._observed(now, some_examples(inputs, where, size), targets[where], mean):
                yield batch._replace(known=known, hold_mean=hold_mean)

        def outputs(where: slice) -> Tensor:
            return self._outputs(start, some_examples(inputs, where, size))

        self._checked(sides.plain, inputs, targets)  # all of them, before any is learned
        return self._learned(sides, start, targets, observe, outputs, learn)

    def _learned(
        self,
        sides: gradient_penalty.Sides,
        start: Tensor,
        targets: Tensor,
        observe: relinearization.Observe,
        outputs: Callable[[slice], Tensor],
        learn: relinearization.Learn | None = None,
    ) -> tuple[FilterState, UpdateInfo]:
        """The state after a batch, and the report; arguments as for :func:`relinearize.learn_batch`."""
        before = sides.plain
        sides, tally, again = relinearization.learn_batch(self.config, sides, start, targets, observe, outputs, learn)
        after = self._ended(before, sides)
        return after, tally.info(parameter_sums.norm(after.belief.mean - before.belief.mean), sides.precision, again)

    def _begun(self, state: FilterState, inputs: Inputs, targets: Tensor) -> gradient_penalty.Sides:
        """The state with the scale of its prior settled and its belief moved on by the dynamics, ready to learn."""
        self.linearize.prepare(state.belief.mean, inputs)
        state = self._predicted(state if state.scaled else self._scale(state, inputs))
        if self.config.gradient_penalty == 0.0:
            return gradient_penalty.Sides(state)
        return gradient_penalty.begin(self.config, self.linearize, state, inputs, self._checked(state, inputs, targets))

    def _ended(self, before: FilterState, sides: gradient_penalty.Sides) -> FilterState:
        """The state with its update counted: noise counts updates, not parts of batches."""
        state = gradient_penalty.end(self.config, sides)
        return state._replace(noise=state.noise._replace(step=before.noise.step + 1), step=before.step + 1)

    def _checked(self, state: FilterState, inputs: Inputs, targets: Tensor) -> Tensor:
        """The targets as the likelihood takes them."""
        shaped = _shaped(inputs, self.linearize.num_outputs, self.adapter.dtype)
        return noise.likelihood(self.config, state.noise).check(shaped, targets)

    def _observed(self, state: FilterState, inputs: Inputs, targets: Tensor, start: Tensor) -> Iterator[Batch]:
        """The batch linearized at ``start``, in pieces that fit the memory."""
        num_outputs = self.linearize.num_outputs
        targets = self._checked(state, inputs, targets)
        needed, widths = self._needed(state, start, inputs, targets, num_outputs)
        alike = min(widths) == num_rows(self.config, num_outputs)  # the most that there can be
        cuts, seed = [part.stop for part, _ in parts(widths)], self.config.seed + state.examples
        for where, piece in self.linearize.chunks(start, inputs, needed, cuts):
            linearized = self.linearize(start, piece, rows_per_example=needed[where])
            outputs = linearized.outputs
            check_finite("the outputs", outputs)
            family = noise.likelihood(self.config, state.noise)
            seen = see(self.config, family, outputs, targets[where], seed + where.start)
            if seen.directions is None and family.name == "categorical":
                jacobian = linearized.softmax_jacobian()
            else:
                jacobian = linearized.jacobian(seen.directions)
            found = None if alike or seen.directions is None else seen.directions.rows_per_example
            rows = widths[where] if found is None else found.tolist()  # as this pass sees them, not a forecast
            yield Batch(self._outputs_of(piece.inputs), targets[where], outputs, start, seen, jacobian, rows)

    def _outputs_of(self, inputs: Inputs) -> Callable[[Tensor, slice], Tensor]:
        """From θ and which examples to their outputs there."""
        size = batch_size(inputs)
        return lambda mean, which: self.adapter.outputs(mean, some_examples(inputs, which, size))

    def _outputs(self, mean: Tensor, inputs: Inputs) -> Tensor:
        """Outputs at θ, (B, m), as many examples at once as fit the memory."""
        step, size = self.linearize.max_chunk_size(mean, inputs), batch_size(inputs)
        pieces = [some_examples(inputs, slice(first, first + step), size) for first in range(0, size, step)]
        return torch.cat([self.adapter.outputs(mean, piece) for piece in pieces])

    def _needed(
        self, state: FilterState, start: Tensor, inputs: Inputs, targets: Tensor, num_outputs: int
    ) -> tuple[list[int], list[int]]:
        """Directions of each example, and its rows; by a forward pass of its own where that saves passes."""
        count, size = num_directions(self.config, num_outputs), len(targets)
        alike = [count] * size, [num_rows(self.config, num_outputs)] * size
        if self.config.curvature != "truncated" or self.linearize.fits_one_pass(start, inputs, count):
            return alike
        outputs = self._outputs(start, inputs)
        directions = see(self.config, noise.likelihood(self.config, state.noise), outputs, targets).directions
        if directions is None or directions.rows_per_example is None:
            return alike
        known = directions.rows_per_example.tolist()
        return known, known

    def _predicted(self, state: FilterState) -> FilterState:
        """The state with its belief moved on by one step of the dynamics."""
        settings, keep = self.config, 1.0 - self.config.prior_pull
        if settings.forgetting == keep == 1.0 and settings.drift_variance == 0.0:
            return state  # without a copy of the belief
        added: float | Tensor = settings.drift_variance
        if keep < 1.0:
            added = added + (1.0 - keep**2) * state.prior.variance
        belief = state.belief.predict(settings.forgetting / keep**2, added)
        if keep < 1.0:
            belief = belief.with_mean(torch.lerp(state.prior.mean, belief.mean, keep))
        return state._replace(belief=belief)

    def _belief(self, start: DiagonalGaussian) -> GaussianBelief:
        sizes = block_sizes(self.adapter, self.config.blocks)
        return self.config.structure.from_variance(*start, rank=self.config.rank, block_sizes=sizes)

    def _scale(self, state: FilterState, inputs: Inputs) -> FilterState:
        """The state with its prior variance set, or bounded, by how strongly the outputs for ``inputs`` react."""
        warn_of_many(self.config, self.linearize.prepare(state.prior.mean, inputs))
        start = DiagonalGaussian(state.prior.mean, prior.fitted(self.config, self.linearize, state.prior.mean, inputs))
        return state._replace(belief=self._belief(start), prior=start, scaled=True)


def _shaped(inputs: Inputs, num_outputs: int, dtype: torch.dtype) -> Tensor:
    """Something of the shape that the outputs for ``inputs`` will have."""
    return torch.zeros((), dtype=dtype).expand(batch_size(inputs), num_outputs)
