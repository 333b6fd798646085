"""One belief from several that started alike and saw different data.

p(θ | D₁, …, D_K) ∝ p(θ)^(1−K) Π_k p(θ | D_k) for data that are independent given θ. Of Gaussians the precisions P⁻¹ and
the P⁻¹μ add up, less K − 1 times the prior's, so that the prior counts once. Exact for models that are linear in θ, as
each belief is linearized where it learned; covariance structures keep their form. Bayesian committees: Tresp 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bayes_kf.inference.config import BUDGETS, TUNING
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.tempering import TemperatureState
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving import pretrained

ALIKE = ("seed", "temperature", *TUNING, *BUDGETS)  # settings that may differ


def merge(posteriors: Sequence[Posterior]) -> Posterior:
    """The posterior given the data of several, which were fitted on disjoint data from one prior.

    They must have the same model, settings and prior: begin each with the same ``state = kf.init(inputs)``, or give
    ``initial_variance``. What comes back belongs to the first one's model; its temperature is the number that all were
    given, or else the one under which all their streams together were predicted best, its history is empty.

    Args:
        posteriors: at least one.

    Raises:
        ValueError: for none, for others than those, for temperatures that differ without streams, and for settings
            under which a belief forgets or moves, or estimates its noise: the prior is not in it any more, or the noise
            is not the same.

    Example:
        >>> import bayes_kf as bkf
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0)
        >>> x, y = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> parts = [bkf.fit(model, [(x[k : k + 1], y[k : k + 1])], config, progress=False) for k in range(3)]
        >>> merge(parts).covariance_matrix()  # 1 / (1 + 3)
        tensor([[0.2500]])
    """
    if not posteriors:
        raise ValueError("`posteriors` must hold at least one posterior, got none.")
    first = posteriors[0]
    _check_static(first)
    for number, other in enumerate(posteriors[1:], 1):
        _check_alike(first, other, number)
    config = replace(first.config, temperature=_temperature(posteriors), tune=None)
    states = [posterior.state for posterior in posteriors]
    device = first.mean_vector.device
    beliefs = [type(s.belief)(**{k: t.to(device) for k, t in s.belief._asdict().items()}) for s in states]
    merged = first.state._replace(
        belief=beliefs[0].merge(beliefs[1:], first.state.prior),
        noise=NoiseState(step=sum(s.noise.step for s in states)),
        temperature_scores=TemperatureState(
            sum(s.temperature_scores.updates for s in states),
            torch.stack([s.temperature_scores.total.to(device) for s in states]).sum(0),
            torch.stack([s.temperature_scores.differences.to(device) for s in states]).sum(0),
        ),
        step=sum(s.step for s in states),
        examples=sum(s.examples for s in states),
    )
    return Posterior(KalmanFilter(first.adapter, config), merged)


def _temperature(posteriors: Sequence[Posterior]) -> float | str:
    """The number that all were given, or else what their streams say together."""
    found = {posterior.config.temperature for posterior in posteriors}
    if len(found) == 1:
        return found.pop()
    if all(posterior.state.temperature_scores.updates for posterior in posteriors):
        return "prequential"
    text = ", ".join(str(value) for value in sorted(found, key=str))
    raise ValueError(f"`posteriors` must have one temperature, or streams that priced theirs, got {text}.")


def _check_static(posterior: Posterior) -> None:
    """That what it learned is its prior times likelihoods that do not depend on what else it saw."""
    config = posterior.config
    still = {"forgetting": 1.0, "drift_variance": 0.0, "prior_pull": 0.0, "gradient_penalty": 0.0}
    static: dict[str, float | str] = {**still, "noise": "exponential_family"}
    found = {name: getattr(config, name) for name, value in static.items() if getattr(config, name) != value}
    if config.noise_variance == "estimated":
        found["noise_variance"] = "estimated"
    if found:
        text = ", ".join(f"{name} {value}" for name, value in found.items())
        raise ValueError(f"`posteriors` must neither forget, move, be penalized nor estimate their noise, got {text}.")


def _check_alike(first: Posterior, other: Posterior, number: int) -> None:
    changed = ", ".join(name for name in first.config.differences(other.config) if name not in ALIKE)
    if changed:
        raise ValueError(f"`posteriors` must have the same settings, got another {changed} in number {number}.")
    one, two = first.adapter, other.adapter
    if (one.names, one.shapes) != (two.names, two.shapes):
        raise ValueError(f"`posteriors` must be over the same tensors, got others in number {number}.")
    if two.model is not one.model and _base(first) != _base(other):
        raise ValueError(f"`posteriors` must have the same frozen weights, got others in number {number}.")
    mine, theirs = first.state.prior, other.state.prior
    if not all(torch.equal(a, b.to(a.device)) for a, b in zip(mine, theirs, strict=True)):
        raise ValueError(
            f"`posteriors` must come from one prior, got another in number {number}: begin with one"
            " `KalmanFilter.init`, or give `initial_variance`."
        )


def _base(posterior: Posterior) -> str:
    return pretrained.fingerprint(posterior.adapter.model, set(posterior.adapter.names))
