"""The recursion of the filter: predict, linearize, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig, check_config
from bayes_kf.inference.covariance.block_diagonal import block_sizes
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.filtering import gradient_penalty, prequential_temperature, prior, relinearization
from bayes_kf.inference.filtering.gradient_penalty import PenalizedState
from bayes_kf.inference.filtering.measurement import Measurement, measurement_blocks
from bayes_kf.inference.filtering.measurement_update import check_finite
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.measurement_model.output_directions import (
    num_directions,
    num_rows,
    project_outputs,
    warn_of_many_outputs,
)
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.models.language import LearnedTokens, PreferencePairs, token_reading
from bayes_kf.processes import parameter_sums, shared_work


def _adapter(model: nn.Module | AdapterModel, config: KalmanConfig) -> AdapterModel:
    """The model as a function of its tensors, with the outputs that the likelihood takes.

    Raises:
        ValueError: if an adapter has other outputs.
    """
    is_text, draws = config.likelihood == "tokens", config.curvature_draws
    if is_text and type(model) is AdapterModel:  # no reading yet
        model = model.model
    if not isinstance(model, AdapterModel):
        return token_reading(model, draws) if is_text else AdapterModel(model)
    if is_text != isinstance(model, LearnedTokens):
        needed = "a module, SupervisedTokens or LabelledTokens" if is_text else "another reading or module"
        raise ValueError(
            f"`model` must be {needed} for `likelihood` {config.likelihood!r}, got {type(model).__name__}."
        )
    if isinstance(model, PreferencePairs) and config.likelihood != "bernoulli":
        raise ValueError(f"`likelihood` must be 'bernoulli' for PreferencePairs, got {config.likelihood!r}.")
    if isinstance(model, LearnedTokens) and model.num_probes != draws:
        raise ValueError(f"`num_probes` must be the {draws} `curvature_draws` of the config, got {model.num_probes}.")
    return model


class KalmanFilter:
    """Advances a Gaussian belief over a model's trainable tensors, one batch at a time.

    Args:
        model: a PEFT model or any module with trainable tensors; it is only read.
        config: the settings; ``KalmanConfig()`` by default.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> kf = KalmanFilter(model, KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0))
        >>> state = kf.init()
        >>> state, info = kf.update(state, torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
        >>> kf.marginal_variance(state)  # one observation of the first weight with unit noise halves its variance
        tensor([0.5000, 1.0000])
    """

    posterior_type: ClassVar[type[Any]]  # `Posterior`, set by its module, which imports this one

    def __init__(self, model: nn.Module | AdapterModel, config: KalmanConfig | None = None) -> None:
        self.config = KalmanConfig() if config is None else config
        check_config(self.config)
        self.adapter = _adapter(model, self.config)
        self.linearize = Linearizer(self.adapter, self.config.outputs_per_pass, self.config.bytes_budget)

    def init(self, inputs: Inputs | None = None, mean: Tensor | None = None) -> FilterState:
        """The prior; its variance follows the configured rule.

        Args:
            inputs: a batch to measure the scale of the outputs on, for ``initial_logit_sd``; it needs no targets.
                Without it the filter uses the inputs of the first update.
            mean: of the prior, (n,); None: the model's present tensors.
        """
        mean = self.adapter.vector() if mean is None else mean
        start = DiagonalGaussian(mean, prior.configured_variance(self.config.prior_settings, mean))
        is_scaled = not prior.depends_on_inputs(self.config)
        scores = prequential_temperature.init(mean.device)
        state = FilterState(self._prior_belief(start), start, NoiseState(), scores, is_scaled, 0, 0)
        return state if inputs is None else self.scale_prior(state, inputs)

    def init_from_prior(self, prior: DiagonalGaussian) -> FilterState:
        """The state before the first update under a prior N(μ₀, diag(p₀)), in place of the configured one.

        Args:
            prior: mean (n,) and variance (n,), in the order of ``adapter.names``.
        """
        scores = prequential_temperature.init(prior.mean.device)
        return FilterState(self._prior_belief(prior), prior, NoiseState(), scores, True, 0, 0)

    def scale_prior(self, state: FilterState, inputs: Inputs) -> FilterState:
        """The state with the scale of its prior, measured on ``inputs``; unchanged if it has a scale already."""
        if state.prior_is_scaled:
            return state
        return self._with_prior(state, self._measured_prior(state.prior.mean, inputs))

    def prior(self, inputs: Inputs | None = None) -> DiagonalGaussian | None:
        """The prior of :meth:`init` without its belief; None if its scale is to be measured and there are no inputs."""
        mean = self.adapter.vector()
        if not prior.depends_on_inputs(self.config):
            return DiagonalGaussian(mean, prior.configured_variance(self.config.prior_settings, mean))
        return None if inputs is None else self._measured_prior(mean, inputs)

    def restart(self, state: FilterState) -> FilterState:
        """The prior, for another pass over the same data, without temperature scores; estimated noise stays."""
        noise_state = NoiseState(variance=state.noise.variance, information=state.noise.information)
        scores = prequential_temperature.init(state.belief.mean.device)
        belief = self._prior_belief(state.prior)
        return FilterState(belief, state.prior, noise_state, scores, state.prior_is_scaled, 0, 0)

    def update(
        self,
        state: FilterState,
        inputs: Inputs,
        targets: Tensor,
        *,
        hold_mean: bool = False,
        at: Tensor | None = None,
    ) -> tuple[FilterState, UpdateInfo]:
        """The state after one more batch, and the report of the update. ``state`` is not changed.

        Args:
            state: from :meth:`init` or an earlier update.
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            targets: (B,) class labels, or (B, m) numbers for the other likelihoods.
            hold_mean: whether to update the covariance alone, linearized at the fixed mean (post hoc). An estimated
                noise variance stays that of the first batch's residuals; ``fit`` estimates it again after the pass.
            at: θ to linearize and expand at, (n,), instead of the belief's mean: the mean after an earlier pass over
                the same data, see :meth:`restart`. Such an update has no guard and does not change an estimated noise
                variance. The temperature is scored by the predictions of the belief before the update.

        Raises:
            ValueError: if inputs or targets are malformed, before anything is computed from them; if ``hold_mean``
                or ``at`` is combined with a ``gradient_penalty``.
            DivergenceError: if a mean would not be finite, or a variance not finite and positive.
        """
        start = time.perf_counter()
        batch = Batch.labelled(self.adapter.read(inputs), targets, self.adapter.device)
        shared_work.check_same_batch(batch.inputs, batch.targets, state.belief.mean)
        batch = self.adapter.with_targets(batch, self.config.seed + state.examples)
        if self.config.gradient_penalty and (hold_mean or at is not None):
            raise ValueError(
                "`gradient_penalty` must be 0 if the mean is held or the batch is linearized elsewhere (a trained "
                f"adapter, another pass), got {self.config.gradient_penalty:g}."
            )
        try:
            with self.adapter.full_precision():
                after, info = self.linearize.retry_in_smaller_chunks(
                    lambda: self._update(state, batch, hold_mean, at), batch.size
                )
        except DIVERGED as error:
            raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return after, info._replace(seconds=time.perf_counter() - start)

    def posterior(self, state: FilterState) -> Any:
        """The :class:`~bayes_kf.Posterior` of a state: the same as ``Posterior(kf, state)``."""
        return self.posterior_type(self, state)

    def marginal_variance(self, state: FilterState) -> Tensor:
        """Variance of every parameter, (n,)."""
        return state.belief.marginal_variance()

    def temperature(self, state: FilterState) -> float:
        """Factor on the covariance in predictions: as configured, or chosen by the prequential scores."""
        settings = self.config.predictive_settings
        return prequential_temperature.temperature(settings, state.temperature_scores, state.examples)

    def _update(
        self, state: FilterState, batch: Batch, hold_mean: bool, at: Tensor | None
    ) -> tuple[FilterState, UpdateInfo]:
        started = self._start_update(state, batch)
        point, fitted = (started.unpenalized.belief.mean, hold_mean) if at is None else (at, True)
        return self._update_from(started, point, batch, fitted_point=fitted, hold_mean=hold_mean)

    def _update_from(
        self,
        state: PenalizedState,
        point: Tensor,
        batch: Batch,
        update: relinearization.Update | None = None,
        *,
        fitted_point: bool = False,
        hold_mean: bool = False,
    ) -> tuple[FilterState, UpdateInfo]:
        """The state after a batch that is first linearized at ``point``, and the report.

        Args:
            state: as :meth:`_start_update` returned it.
            point: θ, (n,).
            batch: with targets.
            update: as for :func:`~bayes_kf.inference.filtering.relinearization.update_from_batch`.
            fitted_point: see :class:`~bayes_kf.inference.filtering.measurement.Measurement`.
            hold_mean: as there.
        """

        def measure(now: FilterState, where: slice, mean: Tensor) -> Iterator[Measurement]:
            return self._measure(now, checked[where], mean, fitted_point, hold_mean)

        def outputs_at_point(where: slice) -> Tensor:
            return self.linearize.outputs(point, checked[where])

        targets = self._check_targets(state.unpenalized, batch)  # all of them, before any is used
        checked = batch.with_targets(targets)
        return self._update_measured(state, point, targets, measure, outputs_at_point, update)

    def _update_measured(
        self,
        state: PenalizedState,
        point: Tensor,
        targets: Tensor,
        measure: relinearization.Measure,
        outputs_at_point: Callable[[slice], Tensor],
        update: relinearization.Update | None = None,
    ) -> tuple[FilterState, UpdateInfo]:
        """The state after a batch, and the report; arguments as for ``relinearization.update_from_batch``."""
        before = state.unpenalized
        state, builder, relinearized = relinearization.update_from_batch(
            self.config, state, point, targets, measure, outputs_at_point, update
        )
        after = self._finish_update(before, state)
        step_norm = parameter_sums.norm(after.belief.mean - before.belief.mean)
        return after, builder.build(step_norm, state.precision, relinearized)

    def _start_update(self, state: FilterState, batch: Batch) -> PenalizedState:
        """The state with the scale of its prior, after the prediction step, and the penalized state beside it."""
        self.linearize.prepare(state.belief.mean, batch)
        if not state.prior_is_scaled:
            state = self._with_prior(state, self._prior_at(state.prior.mean, batch))
        state = self._predict(state)
        if self.config.gradient_penalty == 0.0:
            return PenalizedState(state)
        checked = batch.with_targets(self._check_targets(state, batch))
        return gradient_penalty.start_update(self.config, self.linearize, state, checked)

    def _finish_update(self, before: FilterState, state: PenalizedState) -> FilterState:
        """The state with its update counted, since the noise model counts updates, not blocks."""
        after = gradient_penalty.finish_update(self.config, state)
        return after._replace(noise=after.noise._replace(step=before.noise.step + 1), step=before.step + 1)

    def _check_targets(self, state: FilterState, batch: Batch) -> Tensor:
        """The targets as the likelihood takes them, (B,) or (B, m)."""
        shape = batch.size, self.linearize.num_outputs
        outputs = torch.zeros((), dtype=self.adapter.dtype).expand(shape)  # of the shape and type of the true ones
        return noise.likelihood(self.config.noise_settings, state.noise).check(outputs, batch.required_targets)

    def _measure(
        self,
        state: FilterState,
        batch: Batch,
        point: Tensor,
        fitted_point: bool = False,
        hold_mean: bool = False,
    ) -> Iterator[Measurement]:
        """The batch linearized at ``point``, in chunks that fit the memory; its targets have been checked."""
        curvature, num_outputs = self.config.curvature_settings, self.linearize.num_outputs
        directions, rows, most = self._rows_per_example(state, point, batch, num_outputs)
        alike = min(rows) == most
        cuts, seed = [where.stop for where, _ in measurement_blocks(rows)], self.config.seed + state.examples
        for where, chunk in self.linearize.chunks(point, batch, directions, cuts):
            targets = chunk.required_targets
            linearized = self.linearize(point, chunk, rows_per_example=directions[where])
            outputs = linearized.outputs
            check_finite("the outputs", outputs)
            family = noise.likelihood(self.config.noise_settings, state.noise)
            projected = project_outputs(curvature, family, outputs, targets, seed + where.start)
            if projected.directions is None and family.name == "categorical":
                jacobian = linearized.softmax_jacobian()
            else:
                jacobian = linearized.jacobian(projected.directions)
            exact = None if alike or projected.directions is None else projected.directions.rows_per_example
            chunk_rows = rows[where] if exact is None else exact.tolist()  # of this pass, not a forecast
            outputs_at = self._outputs_of(chunk)
            yield Measurement(
                outputs_at, targets, outputs, point, projected, jacobian, chunk_rows, fitted_point, hold_mean
            )

    def _outputs_of(self, batch: Batch) -> Callable[[Tensor, slice], Tensor]:
        """A map from θ and a slice of the examples to their outputs there."""
        return lambda mean, which: self.adapter.outputs(mean, batch[which].inputs)

    def _rows_per_example(
        self, state: FilterState, point: Tensor, batch: Batch, num_outputs: int
    ) -> tuple[list[int], list[int], int]:
        """Directions and rows of each example, and the most rows that one can have.

        "truncated" curvature finds them by a forward pass of its own if that saves backward passes.
        """
        curvature, size = self.config.curvature_settings, batch.size
        count, most = num_directions(curvature, self.config.likelihood, num_outputs), num_rows(curvature, num_outputs)
        alike = [count] * size, [most] * size, most
        if curvature.curvature != "truncated" or self.linearize.fits_one_pass(point, batch, count):
            return alike
        family = noise.likelihood(self.config.noise_settings, state.noise)
        outputs = self.linearize.outputs(point, batch)
        directions = project_outputs(curvature, family, outputs, batch.required_targets).directions
        if directions is None or directions.rows_per_example is None:
            return alike
        rows = directions.rows_per_example.tolist()
        return rows, rows, most

    def _predict(self, state: FilterState) -> FilterState:
        """The prediction step: μ⁻ = μ₀ + κ(μ − μ₀), P⁻ = κ²P/λ + qI + (1 − κ²)P₀, κ = 1 − ``prior_pull``."""
        settings = self.config.dynamics_settings
        keep = 1.0 - settings.prior_pull
        if settings.forgetting == keep == 1.0 and settings.drift_variance == 0.0:
            return state  # without a copy of the belief
        added: float | Tensor = settings.drift_variance
        if keep < 1.0:
            added = added + (1.0 - keep**2) * state.prior.variance
        belief = state.belief.predict(settings.forgetting / keep**2, added)
        if keep < 1.0:
            belief = belief.with_mean(torch.lerp(state.prior.mean, belief.mean, keep))
        return state._replace(belief=belief)

    def _prior_belief(self, start: DiagonalGaussian) -> GaussianBelief:
        """The prior N(μ₀, diag(p₀)) in the configured structure."""
        settings = self.config.covariance_settings
        sizes = block_sizes(self.adapter, settings.blocks)
        return self.config.structure.from_variance(*start, rank=settings.rank, block_sizes=sizes)

    def _measured_prior(self, initial: Tensor, inputs: Inputs) -> DiagonalGaussian:
        """The prior, with its scale measured on inputs of any form; see :meth:`_prior_at`."""
        batch = Batch.checked(self.adapter.read(inputs), device=self.adapter.device)
        batch = self.adapter.part(batch, slice(0, batch.size))
        with self.adapter.full_precision():
            return self.linearize.retry_in_smaller_chunks(lambda: self._prior_at(initial, batch), batch.size)

    def _prior_at(self, initial: Tensor, batch: Batch) -> DiagonalGaussian:
        """The prior: the LoRA factors by the inputs, from an initial mean (n,), the variance by the outputs' change."""
        mean = prior.mean_for_inputs(self.config.prior_settings, self.adapter, initial, batch)
        num_outputs = self.linearize.prepare(mean, batch)
        warn_of_many_outputs(self.config.curvature_settings, self.config.likelihood, num_outputs)
        return DiagonalGaussian(mean, prior.variance_for_inputs(self.config, self.linearize, mean, batch, initial))

    def _with_prior(self, state: FilterState, start: DiagonalGaussian) -> FilterState:
        return state._replace(belief=self._prior_belief(start), prior=start, prior_is_scaled=True)
