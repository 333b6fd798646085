"""The recursion: predict, linearize, whiten, gate, condition, guard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.stats import chi2
from torch import Tensor, nn

from bayes_kf.inference import diagonal, noise
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.linearize import Linearizer, Observation, whitened
from bayes_kf.models.adapter import AdapterModel, Inputs, check_inputs, to_device
from bayes_kf.models.state_space import constant_variance, logit_variance, uniform_variance

DAMPING_STEP = 0.25  # an update that fails its check is solved again with this much of the precision
MAX_DAMPINGS = 8


class DivergenceError(FloatingPointError):
    """An update was refused; the state given to it is unchanged.

    Attributes:
        step: index of the refused update, from 0.
        cause: what would have broken.
        state: the state before the update.
    """

    def __init__(self, step: int, cause: str, state: FilterState) -> None:
        super().__init__(f"update {step} refused: {cause}; the state before it is kept")
        self.step, self.cause, self.state = step, cause, state


class FilterState(NamedTuple):
    """All that a filter knows; never changed in place.

    Attributes:
        belief: mean and covariance, the State of the configured structure.
        prior: mean (n,) and variance (n,) that the belief started from.
        noise: what the noise model remembers.
        scaled: whether the prior's scale is settled; False only before the first inputs were seen.
        step: updates made.
        examples: examples seen.
    """

    belief: Any
    prior: diagonal.State
    noise: noise.State
    scaled: bool
    step: int
    examples: int


class UpdateInfo(NamedTuple):
    """What one update saw and did.

    Attributes:
        outputs: η at the mean before the update, (B, m).
        log_loss: −log p(y | η), per example, (B,), in nats, before the update.
        correct: per example, (B,), before the update; None for regression.
        innovation: ν = uᵀS⁻¹u, χ² with ``degrees_of_freedom`` when the filter is consistent.
        degrees_of_freedom: of ν.
        damping: factor ≤ 1 put on the observation's precision by gate and guard; 1 as a rule.
        jitter: relative jitter of the noise covariance; 0 as a rule.
        step_norm: Euclidean length of the step of the mean.
        seconds: wall time.
    """

    outputs: Tensor
    log_loss: Tensor
    correct: Tensor | None
    innovation: float
    degrees_of_freedom: int
    damping: float
    jitter: float
    step_norm: float
    seconds: float


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
        self.linearize = Linearizer(self.adapter)

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """The prior: its mean the model's present tensors, its variance by the configured rule.

        Args:
            inputs: a batch to measure the scale of the outputs on, for ``initial_logit_sd``; no targets are needed.
                Without it the first update's inputs serve.
        """
        mean = self.adapter.vector()
        variance, scaled = self._prior_variance(mean), self.config.initial_variance is not None
        prior = diagonal.init(mean, variance)
        state = FilterState(self.config.structure.init(mean, variance), prior, noise.State(), scaled, 0, 0)
        if inputs is None or scaled:
            return state
        check_inputs(inputs)
        gains = [_gains(self.linearize(mean, piece)[1]) for _, piece in self.linearize.pieces(mean, inputs)]
        return self._scale(state, torch.cat(gains))

    def update(
        self, state: FilterState, inputs: Inputs, targets: Tensor, *, hold_mean: bool = False
    ) -> tuple[FilterState, UpdateInfo]:
        """The belief after one more batch, and what was seen on the way. ``state`` is not changed.

        Args:
            state: from :meth:`init` or an earlier update.
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            targets: (B,) class labels, or (B, m) numbers for the other likelihoods.
            hold_mean: whether only the covariance learns, linearized at a mean that stays (post hoc).

        Raises:
            ValueError: for inputs or targets that do not fit, before anything is computed from them.
            DivergenceError: when the update would leave the finite or the positive; ``state`` is kept.
        """
        start = time.perf_counter()
        inputs, targets = self._check(inputs, targets)
        try:
            state_after, info = self._update(state, inputs, targets, hold_mean)
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            raise DivergenceError(state.step, str(error).splitlines()[0], state) from error
        return state_after, info._replace(seconds=time.perf_counter() - start)

    def marginal_variance(self, state: FilterState) -> Tensor:
        """Variance of every parameter, (n,)."""
        return self.config.structure.marginal_variance(state.belief)

    def _check(self, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
        check_inputs(inputs)
        if not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor, got {type(targets).__name__}.")
        return to_device(inputs, self.adapter.device), targets.to(self.adapter.device)

    def _update(
        self, state: FilterState, inputs: Inputs, targets: Tensor, hold_mean: bool
    ) -> tuple[FilterState, UpdateInfo]:
        structure = self.config.structure
        outputs, jacobian = self.linearize(state.belief.mean, inputs)
        family = noise.likelihood(self.config, state.noise)
        targets = family.check(outputs, targets)
        _finite("the outputs", outputs)
        _finite("the Jacobian", jacobian)
        if not state.scaled:
            state = self._scale(state, _gains(jacobian))
        belief = structure.predict(state.belief, self.config.forgetting, self.config.drift_variance)
        output_cov = structure.output_covariance(belief, jacobian)
        noise_state = noise.begin(self.config, state.noise, outputs, targets, output_cov)
        white, noise_state = noise.whiten(self.config, noise_state, outputs, targets, output_cov)
        dof = targets.numel() if self.config.likelihood != "categorical" else len(outputs) * (outputs.shape[1] - 1)
        observation = whitened(white.factor, white.residual, jacobian, dof)
        check = None if hold_mean or not self.config.damping else self._objective(noise_state, belief, inputs, targets, outputs)
        after, innovation, damping = self._condition(belief, observation, check)
        after = after._replace(mean=belief.mean) if hold_mean else after
        step = after.mean - belief.mean
        moved = targets - outputs - (jacobian @ step) if noise_state.sum_squares is not None else outputs
        noise_state = noise.absorb(self.config, noise_state, moved, structure.output_covariance(after, jacobian))
        family = noise.likelihood(self.config, noise_state) if self.config.likelihood == "gaussian" else family
        info = UpdateInfo(
            outputs=outputs,
            log_loss=-family.log_prob(outputs, targets),
            correct=family.correct(outputs, targets),
            innovation=float(innovation),
            degrees_of_freedom=dof,
            damping=damping,
            jitter=white.jitter,
            step_norm=float(step.norm()),
            seconds=0.0,
        )
        return FilterState(after, state.prior, noise_state, True, state.step + 1, state.examples + len(outputs)), info

    def _condition(
        self, belief: Any, observation: Observation, accepts: Callable[[Any], bool] | None
    ) -> tuple[Any, Tensor, float]:
        """Condition, with the gate before and the guard after; returns belief, ν and the precision factor."""
        structure, damping = self.config.structure, 1.0
        after, innovation = structure.condition(belief, observation)
        if self.config.gate_quantile is not None:
            bound = float(chi2.ppf(self.config.gate_quantile, observation.degrees_of_freedom))
            damping = min(1.0, bound / max(float(innovation), 1e-300))
            if damping < 1.0:
                after, _ = structure.condition(belief, observation.scaled(damping))
        for _ in range(MAX_DAMPINGS if accepts else 0):
            if accepts is None or accepts(after):
                break
            damping *= DAMPING_STEP
            after, _ = structure.condition(belief, observation.scaled(damping))
        _finite("the mean", after.mean)
        variance = structure.marginal_variance(after)
        _finite("the variance", variance)
        if not bool((variance > 0).all()):
            raise FloatingPointError(f"{int((variance <= 0).sum())} variances would not be positive")
        return after, innovation, damping

    def _objective(
        self, noise_state: noise.State, belief: Any, inputs: Inputs, targets: Tensor, outputs: Tensor
    ) -> Callable[[Any], bool]:
        """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ, the objective that it solves by linearization."""
        family = noise.likelihood(self.config, noise_state)
        before = -family.log_prob(outputs, targets).sum()

        def accepts(after: Any) -> bool:
            if not bool(torch.isfinite(after.mean).all()):
                return False
            penalty = 0.5 * self.config.structure.quadratic(belief, after.mean - belief.mean)
            loss = -family.log_prob(self.adapter.outputs(after.mean, inputs), targets).sum()
            return bool(loss + penalty <= before)

        return accepts

    def _prior_variance(self, mean: Tensor) -> Tensor:
        size, variance = len(mean), self.config.initial_variance
        if variance is None:
            drawn = constant_variance(size, 1.0)  # a unit, scaled by the first inputs
        elif self.config.initial_rule == "constant":
            drawn = constant_variance(size, variance)
        else:
            drawn = uniform_variance(size, variance, torch.Generator().manual_seed(self.config.seed))
        return drawn.to(mean)

    def _scale(self, state: FilterState, gains: Tensor) -> FilterState:
        """The state with its unit prior scaled so that the outputs, with these ‖J‖², have the configured spread."""
        variance = state.prior.variance * logit_variance(gains, self.config.initial_logit_sd)
        prior = diagonal.init(state.prior.mean, variance)
        return state._replace(belief=self.config.structure.init(*prior), prior=prior, scaled=True)


def _gains(jacobian: Tensor) -> Tensor:
    """‖J_bj‖² per example and output, (B, m): output variances under a unit prior."""
    return jacobian.double().square().sum(-1)


def _finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise FloatingPointError(f"{int((~torch.isfinite(tensor)).sum())} values of {what} would not be finite")
