"""The prior of an adapter that was trained elsewhere: as wide as its own evidence says.

With the mean kept, one pass gives the curvature H of the data at it. Under the prior N(μ₀, sP₀), P₀ the function-space
prior, the Laplace evidence of the width is, up to a constant,

    log p(y | s) = −½ Δᵀ(sP₀)⁻¹Δ − ½ log det(I + sP₀H),    Δ = μ − μ₀,

which needs no further pass: Λ_s = H + (sP₀)⁻¹ differs from the belief's precision by a diagonal. MacKay (1992) is the
source of the evidence; the grid and the choice of Δ are ours.

A trained adapter has seen its data, so they cannot price the temperature as a stream does. The evidence's widths turned
out three to ten times too large (USPS, KMNIST, ants and bees, noisy CIFAR-10; with rank 400 as with 20), so predictions
take ``TEMPERATURE``; data that was held out says better (``Posterior.calibrate``). Leave-one-out by Laplace's cavities
was tried and was no use: at these widths a single example seems to move its own prediction by hundreds of nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.prior.initial_values import known_initial_values

TEMPERATURE = 0.1
WIDTHS = tuple(10.0 ** (0.5 * k) for k in range(-12, 5))  # s, relative to the function-space prior


def widened(config: KalmanConfig, state: FilterState, width: float) -> FilterState:
    """The state as it would be had the prior variance been ``width`` times as large."""
    variance = width * state.prior.variance
    added = 1.0 / variance - 1.0 / state.prior.variance
    belief = state.belief.add_precision(added)
    return state._replace(belief=belief, prior=state.prior._replace(variance=variance))


def log_evidence(config: KalmanConfig, state: FilterState, deviation: Tensor) -> float:
    """The Laplace evidence of the state's prior, in nats, but for a constant; ``deviation`` (n,) is Δ."""
    prior = state.prior.variance.double()
    quadratic = float((deviation.double().square() / prior).sum())
    volume = float(state.belief.log_determinant()) - float(prior.log().sum())
    return 0.5 * (volume - quadratic)


def by_evidence(config: KalmanConfig, adapter: AdapterModel, state: FilterState) -> tuple[FilterState, Tensor]:
    """The state under the prior width of ``WIDTHS`` with most evidence, and the evidence of all, (G,)."""
    deviation = departure(adapter, state.belief.mean)
    candidates = [widened(config, state, width) for width in WIDTHS]
    evidence = torch.tensor([log_evidence(config, c, deviation) for c in candidates], dtype=torch.float64)
    return candidates[int(evidence.argmax())], evidence


def recentred(adapter: AdapterModel, state: FilterState) -> FilterState:
    """The state with its prior where training started, μ₀ = μ − Δ, for a mean that is to go on toward the mode."""
    mean = state.belief.mean
    return state._replace(prior=state.prior._replace(mean=mean - departure(adapter, mean)))


def departure(adapter: AdapterModel, mean: Tensor) -> Tensor:
    """How far training has moved each number from where PEFT starts it (``models.starts``), (n,).

    A tensor whose start is drawn, as LoRA's A, is taken not to have moved. A model without PEFT layers is taken to have
    started from zero, as priors of weights usually are.
    """
    starts = known_initial_values(adapter)
    if starts is None:
        return mean
    tensors = adapter.unflatten(mean)
    moved = {name: torch.zeros_like(t) for name, t in tensors.items()}
    moved |= {name: tensors[name] - _as(start, tensors[name]) for name, start in starts.items()}
    return adapter.flatten(moved)


def _as(start: Tensor | float, tensor: Tensor) -> Tensor | float:
    return start.to(tensor) if isinstance(start, Tensor) else start
