"""The recursion: predict, linearize, whiten, gate, condition, guard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor, nn

from bayes_kf.inference import diagonal, noise, tempering
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.linearize import Linearizer
from bayes_kf.inference.mode import expand_at_mode
from bayes_kf.inference.observation import Observation, whitened
from bayes_kf.inference.state import DivergenceError, FilterState, UpdateInfo
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size, check_inputs, to_device
from bayes_kf.models.likelihood import Likelihood
from bayes_kf.models.state_space import constant_variance, logit_variance, uniform_variance

DAMPING_STEP = 0.25  # an update that fails its check is solved again with this much of the precision
MAX_DAMPINGS = 8
TRUSTED = 0.1  # change of an output, in its own unit, over which the linearization is not checked
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
        self.linearize = Linearizer(self.adapter)

    def init(self, inputs: Inputs | None = None) -> FilterState:
        """The prior: its mean the model's present tensors, its variance by the configured rule.

        Args:
            inputs: a batch to measure the scale of the outputs on, for ``initial_logit_sd``; no targets are needed.
                Without it the first update's inputs serve.
        """
        mean = self.adapter.vector()
        prior = diagonal.init(mean, self._prior_variance(mean))
        scaled = self.config.initial_variance is not None
        scores = tempering.init(mean.device)
        state = FilterState(self._belief(prior), prior, noise.State(), scores, scaled, 0, 0)
        if inputs is None or scaled:
            return state
        check_inputs(inputs)
        squares = [
            self.linearize(mean, piece)[1].square().sum((0, 1)) for _, piece in self.linearize.pieces(mean, inputs)
        ]
        return self._scale(state, torch.stack(squares).sum(0) / (batch_size(inputs) * self.linearize.num_outputs))

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
        check_inputs(inputs)
        if not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor, got {type(targets).__name__}.")
        device = self.adapter.device
        try:
            after, info = self._update(state, to_device(inputs, device), targets.to(device), hold_mean)
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
        self, state: FilterState, inputs: Inputs, targets: Tensor, hold_mean: bool
    ) -> tuple[FilterState, UpdateInfo]:
        structure = self.config.structure
        outputs, jacobian = self.linearize(state.belief.mean, inputs)
        targets = noise.likelihood(self.config, state.noise).check(outputs, targets)
        _finite("the outputs", outputs)
        _finite("the Jacobian", jacobian)
        state = state if state.scaled else self._scale(state, jacobian.square().mean((0, 1)))
        belief = structure.predict(state.belief, self.config.forgetting, self.config.drift_variance)
        output_cov = structure.output_covariance(belief, jacobian)
        _finite("the output covariance", output_cov)
        noise_state = noise.begin(self.config, state.noise, outputs, targets)
        family = noise.likelihood(self.config, noise_state)
        scores = state.scores if hold_mean else self._scores(state, family, outputs, output_cov, targets)
        at_mode = self.config.expansion == "mode" and not hold_mean
        observation, jitter, noise_state = self._observe(
            belief, noise_state, family, outputs, jacobian, targets, output_cov, at_mode
        )
        guarded = self.config.damping and not hold_mean
        accepts = self._objective(family, belief, inputs, targets, outputs, jacobian) if guarded else None
        after, damping = self._condition(belief, observation, accepts)
        after = after._replace(mean=belief.mean) if hold_mean else after
        step = after.mean - belief.mean
        if noise_state.variance is not None:
            noise_state = noise.absorb(noise_state, targets - outputs, self.temperature(state) * output_cov)
        info = UpdateInfo(
            outputs=outputs,
            log_loss=-family.log_prob(outputs, targets),
            correct=family.correct(outputs, targets),
            innovation=observation.innovation,
            degrees_of_freedom=observation.degrees_of_freedom,
            damping=damping,
            jitter=jitter,
            step_norm=float(step.norm()),
            seconds=0.0,
        )
        examples = state.examples + len(outputs)
        return FilterState(after, state.prior, noise_state, scores, True, state.step + 1, examples), info

    def _observe(
        self,
        belief: Any,
        noise_state: noise.State,
        family: Likelihood,
        outputs: Tensor,
        jacobian: Tensor,
        targets: Tensor,
        output_cov: Tensor,
        at_mode: bool,
    ) -> tuple[Observation, float, noise.State]:
        """The whitened observation, the jitter that its noise took, and the noise state after it."""
        white, noise_state = noise.whiten(self.config, noise_state, outputs, targets, output_cov)
        innovation = self._innovation(belief, white, jacobian, output_cov)
        factor, residual = white.factor, white.residual
        if at_mode and self.config.noise == "exponential_family" and family.name != "gaussian":
            joint = self._joint(belief, jacobian, output_cov)
            factor, residual = expand_at_mode(family, outputs.double(), targets, joint)
        dof = len(outputs) * (outputs.shape[1] - (family.name == "categorical"))
        return whitened(factor, residual, jacobian, dof, innovation), white.jitter, noise_state

    def _condition(
        self, belief: Any, observation: Observation, accepts: Callable[[Any], bool] | None
    ) -> tuple[Any, float]:
        """Condition, with the gate before and the guard after; the belief and the precision factor."""
        condition, damping = self.config.structure.condition, 1.0
        if self.config.gate_quantile is not None:
            bound = float(chi2.ppf(self.config.gate_quantile, observation.degrees_of_freedom))
            damping = min(1.0, bound / max(observation.innovation, bound))
        after = condition(belief, observation if damping == 1.0 else observation.scaled(damping))
        for _ in range(MAX_DAMPINGS if accepts else 0):
            if accepts is None or accepts(after):
                break
            damping *= DAMPING_STEP
            after = condition(belief, observation.scaled(damping))
        _finite("the mean", after.mean)
        variance = self.config.structure.marginal_variance(after)
        _finite("the variance", variance)
        if not bool((variance > 0).all()):
            raise FloatingPointError(f"{int((variance <= 0).sum())} variances would not be positive")
        return after, damping

    def _objective(
        self, family: Likelihood, belief: Any, inputs: Inputs, targets: Tensor, outputs: Tensor, jacobian: Tensor
    ) -> Callable[[Any], bool]:
        """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ, the objective that it solves by linearization.

        A step that moves no output by more than ``TRUSTED`` is taken without the forward pass that this needs.
        """
        before = -family.log_prob(outputs, targets).sum()

        def accepts(after: Any) -> bool:
            if not bool(torch.isfinite(after.mean).all()):
                return False
            if bool((jacobian @ (after.mean - belief.mean)).abs().max() < TRUSTED):
                return True
            penalty = 0.5 * self.config.structure.quadratic(belief, after.mean - belief.mean)
            moved = self.adapter.outputs(after.mean, inputs)
            if not bool(torch.isfinite(moved).all()):
                return False
            loss = -family.log_prob(moved, targets).sum()
            return bool(loss + penalty <= before + ROUNDING * (1.0 + before.abs()))

        return accepts

    def _scores(
        self, state: FilterState, family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor
    ) -> tempering.State:
        """The scores with this batch's, or as they were where the temperature is given."""
        if not isinstance(self.config.temperature, str):
            return state.scores
        losses = tempering.log_losses(family, outputs, output_cov, targets, self.config.seed + state.step)
        return tempering.add(state.scores, losses)

    def _joint(self, belief: Any, jacobian: Tensor, output_cov: Tensor) -> Tensor:
        """J P Jᵀ over the whole batch, (B·m, B·m)."""
        if len(jacobian) == 1:
            return output_cov[0]
        return self.config.structure.output_covariance(belief, jacobian.flatten(0, 1).unsqueeze(0))[0]

    def _innovation(self, belief: Any, white: noise.Whitened, jacobian: Tensor, output_cov: Tensor) -> float:
        """ν = uᵀ (I + W Σ Wᵀ)⁻¹ u over the whole batch."""
        whitener = torch.block_diag(*white.factor)
        gram = whitener @ self._joint(belief, jacobian, output_cov).to(whitener) @ whitener.mT
        return float(diagonal.innovation(gram, white.residual.flatten())[2])

    def _prior_variance(self, mean: Tensor) -> Tensor:
        size, variance = len(mean), self.config.initial_variance
        if variance is None:
            drawn = constant_variance(size, 1.0)  # a unit, scaled by the first inputs
        elif self.config.initial_rule == "constant":
            drawn = constant_variance(size, variance)
        else:
            drawn = uniform_variance(size, variance, torch.Generator().manual_seed(self.config.seed))
        drawn = drawn.to(mean)
        if not bool(torch.isfinite(drawn).all() and (drawn > 0).all()):
            raise ValueError(f"`initial_variance` must be positive and finite in {mean.dtype}, got {variance:g}.")
        return drawn

    def _belief(self, prior: diagonal.State) -> Any:
        extra = {"rank": self.config.rank} if self.config.covariance == "low_rank" else {}
        return self.config.structure.init(prior.mean, prior.variance, **extra)

    def _scale(self, state: FilterState, squares: Tensor) -> FilterState:
        """The state with its prior variance set from the mean squares of the Jacobian's columns, (n,)."""
        mean, where = state.prior.mean, self.adapter.slices().values()
        gains = [float(squares[part].double().sum()) for part in where]
        starts = [float(mean[part].double().square().mean()) for part in where]
        variances = logit_variance(gains, starts, self.config.initial_logit_sd, self.config.initial_spread)
        parts = [mean.new_full((size,), value) for value, size in zip(variances, self.adapter.sizes, strict=True)]
        prior = diagonal.init(mean, torch.cat(parts))
        return state._replace(belief=self._belief(prior), prior=prior, scaled=True)


def _finite(what: str, tensor: Tensor) -> None:
    if bool(torch.isfinite(tensor.sum())):  # a sum is cheap, and finite only if every value is
        return
    if not bool(torch.isfinite(tensor).all()):
        raise FloatingPointError(f"{int((~torch.isfinite(tensor)).sum())} values of {what} would not be finite")
