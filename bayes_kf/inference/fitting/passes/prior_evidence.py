"""The prior width of an adapter that was trained elsewhere, chosen by its Laplace evidence.

One pass with the mean held gives the curvature H of the data at the trained weights. Under the prior N(μ₀, sP₀), where
P₀ is the function-space prior, the Laplace evidence of the scale s is, up to a constant,

    log p(y | s) = −½ Δᵀ(sP₀)⁻¹Δ − ½ log det(I + sP₀H),    Δ = μ − μ₀.

It needs no further pass: Λ_s = H + (sP₀)⁻¹ differs from the belief's precision by a diagonal. The evidence is from
MacKay (1992); the grid and the choice of Δ are ours.

A trained adapter has seen its data, so they cannot choose the size of its covariance. The prior scales of most evidence
were three to ten times too large (USPS, KMNIST, ants and bees, noisy CIFAR-10; with rank 400 as with 20), so without
held-out data the posterior takes the size ``TRAINED_SIZE`` (``heldout.covariance_size``).
Leave-one-out with Laplace cavities did not work: at these scales, one example changes its own prediction by hundreds of
nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.config_groups import DynamicsSettings
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.fitting.passes import noise_refit
from bayes_kf.inference.heldout.covariance_size import scale_prior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.prior.initial_values import known_initial_values

TRAINED_SIZE = 10.0  # factor on the precision of the prior of most evidence
PRIOR_SCALES = tuple(10.0 ** (0.5 * k) for k in range(-12, 5))  # s
MAX_ROUNDS = 20  # alternating fits of the prior scale and σ²


def check_static_prior(settings: DynamicsSettings) -> None:
    """Raise ValueError for dynamics: the prior scale is chosen after the pass, so the prior must not decay in it."""
    static = {"forgetting": 1.0, "drift_variance": 0.0, "prior_pull": 0.0}
    dynamics = [
        f"`{name}` {getattr(settings, name)}" for name, value in static.items() if getattr(settings, name) != value
    ]
    if dynamics:
        raise ValueError(
            "`start` 'trained' chooses the prior width by the evidence of data that are not forgotten, got "
            f"{', '.join(dynamics)}; give `initial_variance`, or no dynamics."
        )


def fit_prior_and_noise(
    kf: KalmanFilter, state: FilterState, residuals: noise_refit.ResidualSums, inputs: Inputs
) -> tuple[FilterState, dict[str, Tensor]]:
    """The state with the prior scale and σ² fitted, if they are not given, and ``evidence`` of the scales, by name.

    Each depends on the other, so they are fitted in turn, from σ² = SSE/N on.

    Args:
        kf: the filter.
        state: after a pass with the mean held.
        residuals: of that pass.
        inputs: of the first batch.
    """
    config, fits_scale = kf.config, kf.config.initial_variance is None
    if not noise_refit.can_refit_noise(config) or residuals.squares is None:
        if not fits_scale:
            return state, {}
        state, evidence = maximize_evidence(kf.adapter, state)
        return state, {"evidence": evidence}
    leverages = noise_refit.output_leverages(kf, state, inputs)
    fitted, history = state, dict[str, Tensor]()
    variance = residuals.squares / residuals.count
    for _ in range(MAX_ROUNDS):
        fitted = noise_refit.with_noise_variance(state, variance, leverages)
        if fits_scale:
            fitted, history["evidence"] = maximize_evidence(kf.adapter, fitted)
        fitted = noise_refit.refit_from_residuals(fitted, residuals.squares, residuals.count, leverages)
        assert fitted.noise.variance is not None
        last, variance = variance, fitted.noise.variance
        if not fits_scale or noise_refit.has_converged(last, variance):
            break
    return fitted, history


def maximize_evidence(adapter: AdapterModel, state: FilterState) -> tuple[FilterState, Tensor]:
    """The state under the prior scale of ``PRIOR_SCALES`` with the largest evidence, and the evidence of all, (G,)."""
    displacement = displacement_from_init(adapter, state.belief.mean)
    candidates = [scale_prior(state, scale) for scale in PRIOR_SCALES]
    evidence = torch.tensor([log_evidence(c, displacement) for c in candidates], dtype=torch.float64)
    return candidates[int(evidence.argmax())], evidence


def log_evidence(state: FilterState, displacement: Tensor) -> float:
    """The Laplace evidence of the state's prior, in nats, up to a constant; ``displacement`` (n,) is Δ."""
    prior = state.prior.variance.double()
    quadratic = float((displacement.double().square() / prior).sum())
    log_volume = float(state.belief.log_determinant()) - float(prior.log().sum())
    return 0.5 * (log_volume - quadratic)


def recenter_prior(adapter: AdapterModel, state: FilterState) -> FilterState:
    """The state with the prior mean at the initial weights, μ₀ = μ − Δ, so that mean passes can move the mean on."""
    mean = state.belief.mean
    return state._replace(prior=state.prior._replace(mean=mean - displacement_from_init(adapter, mean)))


def displacement_from_init(adapter: AdapterModel, mean: Tensor) -> Tensor:
    """Δ, the displacement of each parameter from its initial value in PEFT, (n,).

    Tensors with random initial values, such as LoRA's A, count as not displaced. In a model without PEFT layers, all
    initial values count as zero.
    """
    starts = known_initial_values(adapter)
    if starts is None:
        return mean
    tensors = adapter.unflatten(mean)
    moved = {name: torch.zeros_like(t) for name, t in tensors.items()}
    moved |= {name: tensors[name] - _like(start, tensors[name]) for name, start in starts.items()}
    return adapter.flatten(moved)


def _like(start: Tensor | float, tensor: Tensor) -> Tensor | float:
    return start.to(tensor) if isinstance(start, Tensor) else start
