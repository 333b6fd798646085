"""The recursion: predict, linearize, whiten, gate, condition, guard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor, nn

from bayes_kf.inference import block_diagonal, diagonal, noise, prior, tempering
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.curvature import num_directions, num_rows, odds_length, see
from bayes_kf.inference.evidence import Batch, Evidence, Part, Tally
from bayes_kf.inference.jacobian import blocks, both_sides
from bayes_kf.inference.linearize import Linearizer, some_examples
from bayes_kf.inference.mode import expand_at_mode
from bayes_kf.inference.observation import Observation, whitened
from bayes_kf.inference.state import DivergenceError, FilterState, UpdateInfo
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size, check_inputs, to_device
from bayes_kf.models.likelihood import Gaussian

DAMPING_STEP = 0.25  # an update that fails its check is solved again with this much of the precision
MAX_DAMPINGS = 8
PART_ROWS = 192  # rows that are solved for together; with more, parts of a batch follow each other
TRUSTED = 1.0  # change of an output (a logit, or the sd of a Gaussian's noise) up to which a step is not checked
ROUNDING = 1e-4  # relative change of the objective below which a step is never called worse


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
        self.config = config or KalmanConfig()
        self.linearize = Linearizer(self.adapter, self.config.outputs_per_pass, self.config.bytes_budget)

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """The prior: its mean the model's present tensors, its variance by the configured rule.

        Args:
            inputs: a batch to measure the scale of the outputs on, for ``initial_logit_sd``; no targets are needed.
                Without it the first update's inputs serve.
        """
        mean = self.adapter.vector()
        start = diagonal.init(mean, prior.unscaled(self.config, mean))
        scaled = self.config.initial_variance is not None
        scores = tempering.init(mean.device)
        state = FilterState(self._belief(start), start, noise.State(), scores, scaled, 0, 0)
        if inputs is None or scaled:
            return state
        check_inputs(inputs)
        with self.adapter.full_precision():
            return self._scale(state, to_device(inputs, self.adapter.device))

    def restart(self, state: FilterState) -> FilterState:
        """The prior again, for another pass over the same data; the temperature's scores stay those of the first."""
        return FilterState(self._belief(state.prior), state.prior, noise.State(), state.scores, state.scaled, 0, 0)

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
            hold_mean: whether only the covariance learns, linearized at a mean that stays (post hoc).
            at: θ to linearize and expand at, (n,), instead of the belief's mean: the mean that an earlier pass over the
                same data ended with, see :meth:`restart`. Such an update is neither guarded nor scored.

        Raises:
            ValueError: for inputs or targets that do not fit, before anything is computed from them.
            DivergenceError: when the update would leave the finite or the positive; ``state`` is kept.
        """
        start = time.perf_counter()
        check_inputs(inputs)
        if not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor, got {type(targets).__name__}.")
        device = self.adapter.device
        try:
            with self.adapter.full_precision():
                after, info = self._update(state, to_device(inputs, device), targets.to(device), hold_mean, at)
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return after, info._replace(seconds=time.perf_counter() - start)

    def marginal_variance(self, state: FilterState) -> Tensor:
        """Variance of every parameter, (n,)."""
        return self.config.structure.marginal_variance(state.belief)

    def temperature(self, state: FilterState) -> float:
        """Factor on the covariance in predictions: as configured, or chosen by the prequential score."""
        setting = self.config.temperature
        return tempering.choose(state.scores) if isinstance(setting, str) else setting

    def _update(
        self, state: FilterState, inputs: Inputs, targets: Tensor, hold_mean: bool, at: Tensor | None
    ) -> tuple[FilterState, UpdateInfo]:
        tally, state = Tally(), self._begun(state, inputs)
        start, known = (state.belief.mean, hold_mean) if at is None else (at, True)
        before = state
        for batch in self._observed(state, inputs, targets, start):
            tally.piece(batch, noise.likelihood(self.config, state.noise))
            state = self._learn(state, batch._replace(known=known, hold_mean=hold_mean), tally)
        return self._ended(before, state), tally.info(float((state.belief.mean - before.belief.mean).norm()))

    def _begun(self, state: FilterState, inputs: Inputs) -> FilterState:
        """The state with the scale of its prior settled and its belief moved on by the dynamics."""
        self.linearize.prepare(state.belief.mean, inputs)
        return self._predicted(state if state.scaled else self._scale(state, inputs))

    def _ended(self, before: FilterState, state: FilterState) -> FilterState:
        """The state with its update counted: noise counts updates, not parts of batches."""
        return state._replace(noise=state.noise._replace(step=before.noise.step + 1), step=before.step + 1)

    def _observed(self, state: FilterState, inputs: Inputs, targets: Tensor, start: Tensor) -> Iterator[Batch]:
        """The batch linearized at ``start``, in pieces that fit the memory."""
        num_outputs = self.linearize.num_outputs
        targets = noise.likelihood(self.config, state.noise).check(_shaped(inputs, num_outputs), targets)
        needed, widths = self._needed(state, start, inputs, targets, num_outputs)
        cuts, seed = [part.stop for part, _ in _parts(widths)], self.config.seed + state.examples
        for where, piece in self.linearize.pieces(start, inputs, needed, cuts):
            linearized = self.linearize(start, piece, needed=needed[where])
            outputs = linearized.outputs
            _finite("the outputs", outputs)
            family = noise.likelihood(self.config, state.noise)
            seen = see(self.config, family, outputs, targets[where], seed + where.start)
            if seen.directions is None and family.name == "categorical":
                jacobian = linearized.pull_differences()
            else:
                jacobian = linearized.pull(seen.directions)
            yield Batch(piece, targets[where], outputs, start, seen, jacobian, widths[where])

    def _needed(
        self, state: FilterState, start: Tensor, inputs: Inputs, targets: Tensor, num_outputs: int
    ) -> tuple[list[int], list[int]]:
        """Directions of each example, and its rows; by a forward pass of its own where that saves passes."""
        count, size = num_directions(self.config, num_outputs), len(targets)
        alike = [count] * size, [num_rows(self.config, num_outputs)] * size
        if self.config.curvature != "truncated" or self.linearize.in_one_pass(start, inputs, count):
            return alike
        step = self.linearize.examples_at_once(start, inputs)
        parts = [some_examples(inputs, slice(first, first + step), size) for first in range(0, size, step)]
        outputs = torch.cat([self.adapter.outputs(start, part) for part in parts])
        directions = see(self.config, noise.likelihood(self.config, state.noise), outputs, targets).directions
        if directions is None or directions.needed is None:
            return alike
        known = directions.needed.tolist()
        return known, known

    def _predicted(self, state: FilterState) -> FilterState:
        """The state with its belief moved on by one step of the dynamics."""
        settings, keep = self.config, 1.0 - self.config.prior_pull
        if settings.forgetting == keep == 1.0 and settings.drift_variance == 0.0:
            return state  # without a copy of the belief
        added: float | Tensor = settings.drift_variance
        if keep < 1.0:
            added = added + (1.0 - keep**2) * state.prior.variance
        belief = settings.structure.predict(state.belief, settings.forgetting / keep**2, added)
        if keep < 1.0:
            belief = belief._replace(mean=torch.lerp(state.prior.mean, belief.mean, keep))
        return state._replace(belief=belief)

    def _learn(self, state: FilterState, batch: Batch, tally: Tally) -> FilterState:
        """Condition on a piece of a batch, in parts of at most ``PART_ROWS`` rows."""
        state = state._replace(noise=noise.begin(self.config, state.noise, batch.outputs, batch.targets))
        if batch.seen.directions is None:  # what noise it has may have become known just now
            batch = batch._replace(seen=batch.seen._replace(family=noise.likelihood(self.config, state.noise)))
        for where, width in _parts(batch.widths):
            part = Part.of(batch.seen, batch.jacobian, where, width)
            if state.belief.mean is not batch.start:
                part = part.moved(state.belief.mean - batch.start)
            state = self._learn_part(state, batch, where, part, tally)
        return state._replace(examples=state.examples + len(batch.targets))

    def _learn_part(self, state: FilterState, batch: Batch, where: slice, part: Part, tally: Tally) -> FilterState:
        belief = state.belief
        joint = self.config.structure.joint_output_covariance(belief, part.jacobian)
        _finite("the output covariance", joint)
        output_cov = blocks(joint, len(part.targets)).to(part.outputs.dtype)
        scores = state.scores if batch.known else self._scores(state, batch, where, part, output_cov)
        evidence, noise_state, jitter = self._evidence(state, part, joint, output_cov, batch.known)
        accepts = None
        if self.config.damping and not batch.known:
            accepts = self._objective(
                state, part, some_examples(batch.inputs, where, len(batch.targets)), batch.targets[where]
            )
        after, damping = self._condition(belief, evidence, accepts)
        after = after._replace(mean=belief.mean) if batch.hold_mean else after
        if noise_state.variance is not None:
            residual = batch.targets[where] - part.outputs
            noise_state = noise.absorb(noise_state, residual, self.temperature(state) * output_cov)
        tally.part(evidence.mean, damping, jitter)
        noise_state = noise_state._replace(step=state.noise.step)  # it counts updates, not parts
        return state._replace(belief=after, noise=noise_state, scores=scores, scaled=True)

    def _evidence(
        self, state: FilterState, part: Part, joint: Tensor, output_cov: Tensor, known: bool
    ) -> tuple[Evidence, noise.State, float]:
        """What the belief is conditioned on, the noise state after it, and the jitter that its noise took."""
        family, outputs, point = part.family, part.outputs, part.start if known else part.outputs
        white, noise_state = noise.whiten(self.config, state.noise, family, point, part.targets, output_cov)
        factor, residual = white.factor, white.residual
        if point is not outputs:  # expanded where the batch was linearized
            residual = residual + (factor @ (point - outputs).to(factor).unsqueeze(-1)).squeeze(-1)
        innovation = float(diagonal.innovation(both_sides(factor, joint), residual.flatten())[2])
        expanded = self.config.expansion == "mode" and self.config.noise == "exponential_family"
        if expanded and not known and family.name != "gaussian":
            factor, residual, point = expand_at_mode(family, outputs.double(), part.targets, joint)
        dof = len(outputs) * (outputs.shape[1] - (family.name == "categorical"))
        observation = whitened(factor, residual, part.jacobian, dof, innovation)
        if part.probes is None:
            return Evidence(observation, None), noise_state, white.jitter
        probed = part.pulled.multiplied(part.probes.factor(point.to(outputs)))
        nothing = outputs.new_zeros(probed.size * probed.num_rows)
        return Evidence(observation, Observation(probed, nothing)), noise_state, white.jitter

    def _condition(self, belief: Any, evidence: Evidence, accepts: Callable[[Any], bool] | None) -> tuple[Any, float]:
        """Condition, with the gate before and the guard after; the belief and the precision factor."""
        structure, damping = self.config.structure, 1.0
        if self.config.gate_quantile is not None:
            bound = float(chi2.ppf(self.config.gate_quantile, evidence.mean.degrees_of_freedom))
            damping = min(1.0, bound / max(evidence.mean.innovation, bound))
        after = evidence.condition(structure, belief, damping)
        for _ in range(MAX_DAMPINGS if accepts else 0):
            if accepts is None or accepts(after):
                break
            damping *= DAMPING_STEP
            after = evidence.condition(structure, belief, damping)
        _finite("the mean", after.mean)
        scales = structure.scales(after)
        _finite("the variance", scales)
        if not bool((scales > 0).all()):
            raise FloatingPointError(f"{int((scales <= 0).sum())} variances would not be positive")
        return after, damping

    def _objective(self, state: FilterState, part: Part, inputs: Inputs, targets: Tensor) -> Callable[[Any], bool]:
        """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ, the objective that it solves by linearization.

        A step that moves no output by more than ``TRUSTED`` is taken without the forward pass that this needs.
        """
        belief, family = state.belief, noise.likelihood(self.config, state.noise)
        before = -part.family.log_prob(part.outputs, part.targets).sum()
        unit = family.noise_variance.sqrt().to(part.outputs) if isinstance(family, Gaussian) else 1.0

        def accepts(after: Any) -> bool:
            if not bool(torch.isfinite(after.mean).all()):
                return False
            step = after.mean - belief.mean
            if bool((part.jacobian.matvec(step) / unit).abs().max() < TRUSTED):
                return True
            penalty = 0.5 * self.config.structure.quadratic(belief, step)
            del step
            moved = self.adapter.outputs(after.mean, inputs)
            if not bool(torch.isfinite(moved).all()):
                return False
            loss = -family.log_prob(moved, targets).sum()
            return bool(loss + penalty <= before + ROUNDING * (1.0 + before.abs()))

        return accepts

    def _scores(
        self, state: FilterState, batch: Batch, where: slice, part: Part, output_cov: Tensor
    ) -> tempering.State:
        """The scores with this part's, or as they were where the temperature is given.

        Where only the label's log odds were seen, the outputs are taken to vary independently and alike.
        """
        if not isinstance(self.config.temperature, str):
            return state.scores
        seed = self.config.seed + state.step
        if self.config.curvature == "sampled":
            outputs, targets = batch.outputs[where], batch.targets[where]
            variance = output_cov.flatten() / odds_length(outputs, targets)
            family = noise.likelihood(self.config, state.noise)
            losses = tempering.isotropic_log_losses(family, outputs, variance, targets, seed)
        else:
            losses = tempering.log_losses(part.family, part.outputs, output_cov, part.targets, seed)
        return tempering.add(state.scores, losses)

    def _belief(self, start: diagonal.State) -> Any:
        extra: dict[str, Any] = {}
        if self.config.covariance == "low_rank":
            extra["rank"] = self.config.rank
        elif self.config.covariance == "block_diagonal":
            extra["sizes"] = block_diagonal.sizes(self.adapter, self.config.blocks)
        return self.config.structure.init(start.mean, start.variance, **extra)

    def _scale(self, state: FilterState, inputs: Inputs) -> FilterState:
        """The state with its prior variance set by how strongly the outputs for ``inputs`` react."""
        start = diagonal.init(state.prior.mean, prior.scaled(self.config, self.linearize, state.prior.mean, inputs))
        return state._replace(belief=self._belief(start), prior=start, scaled=True)


def _parts(widths: list[int]) -> Iterator[tuple[slice, int]]:
    """Examples that are solved for together, of at most ``PART_ROWS`` rows, and the rows that each of them has.

    Args:
        widths: rows of each example.
    """
    first, width = 0, 0
    for number, rows in enumerate(widths):
        if number > first and (number + 1 - first) * max(width, rows) > PART_ROWS:
            yield slice(first, number), width
            first, width = number, 0
        width = max(width, rows)
    yield slice(first, len(widths)), width


def _shaped(inputs: Inputs, num_outputs: int) -> Tensor:
    """Something of the shape that the outputs for ``inputs`` will have."""
    return torch.zeros(()).expand(batch_size(inputs), num_outputs)


def _finite(what: str, tensor: Tensor) -> None:
    if bool(torch.isfinite(tensor.sum())):  # a sum is cheap, and finite only if every value is
        return
    if not bool(torch.isfinite(tensor).all()):
        raise FloatingPointError(f"{int((~torch.isfinite(tensor)).sum())} values of {what} would not be finite")
