"""Merging of posteriors that were fitted to disjoint data from one prior.

p(θ | D₁, …, D_K) ∝ p(θ)^(1−K) Π_k p(θ | D_k) for data that are independent given θ. The Gaussians' precisions P⁻¹ and
their P⁻¹μ are added, and K − 1 times those of the prior are subtracted, so that the prior counts once. This is exact
for models that are linear in θ, since each belief is linearized at its own means. A covariance keeps its structure.
This is the Bayesian committee machine (Tresp 2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bayes_kf.inference.config_combinations import BUDGETS, TUNING
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving.base_fingerprint import fingerprint

MAY_DIFFER = ("seed", "temperature", *TUNING, *BUDGETS)  # settings


def merge(posteriors: Sequence[Posterior]) -> Posterior:
    """The posterior given the data of several posteriors, which were fitted to disjoint data from one prior.

    They must have the same model, settings and prior: begin each with the same ``state = kf.init(inputs)``, or give
    ``initial_variance``. The result belongs to the model of the first and has no history. Its temperature is that of
    the configs if they all have the same number, or else the one with the least log loss over all their streams.

    Args:
        posteriors: at least one.

    Raises:
        ValueError: if there are none, they have different models, settings or priors, or their temperatures differ and
            some have no stream. Also for settings with dynamics or a gradient penalty, under which the belief is not
            its prior times likelihoods, and for an estimated noise variance, which differs between posteriors.

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
        _check_compatible(first, other, number)
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
    """The temperature of all configs, or "prequential" if they differ and all have a stream."""
    temperatures = {posterior.config.temperature for posterior in posteriors}
    if len(temperatures) == 1:
        return temperatures.pop()
    if all(posterior.state.temperature_scores.updates for posterior in posteriors):
        return "prequential"
    text = ", ".join(str(value) for value in sorted(temperatures, key=str))
    raise ValueError(f"`posteriors` must have one temperature, or each a stream that chooses it, got {text}.")


def _check_static(posterior: Posterior) -> None:
    """Raise ValueError if the belief is not its prior times likelihoods that depend on nothing else."""
    config = posterior.config
    needed: dict[str, float | str] = {"forgetting": 1.0, "drift_variance": 0.0, "prior_pull": 0.0}
    needed |= {"gradient_penalty": 0.0, "noise": "exponential_family"}
    wrong = {name: getattr(config, name) for name, value in needed.items() if getattr(config, name) != value}
    if config.noise_variance == "estimated":
        wrong["noise_variance"] = "estimated"
    if wrong:
        text = ", ".join(f"{name} {value}" for name, value in wrong.items())
        raise ValueError(f"`posteriors` must have no dynamics, no gradient penalty and no estimated noise, got {text}.")


def _check_compatible(first: Posterior, other: Posterior, number: int) -> None:
    """Raise ValueError if posterior ``number`` has other settings, another model or another prior than the first."""
    changed = ", ".join(name for name in first.config.differences(other.config) if name not in MAY_DIFFER)
    if changed:
        raise ValueError(f"`posteriors` must have the same settings, got another {changed} in number {number}.")
    one, two = first.adapter, other.adapter
    if (one.names, one.shapes) != (two.names, two.shapes):
        raise ValueError(f"`posteriors` must be over the same tensors, got others in number {number}.")
    if two.model is not one.model and _base_fingerprint(first) != _base_fingerprint(other):
        raise ValueError(f"`posteriors` must have the same frozen weights, got others in number {number}.")
    pairs = zip(first.state.prior, other.state.prior, strict=True)
    if not all(torch.equal(a, b.to(a.device)) for a, b in pairs):
        raise ValueError(
            f"`posteriors` must come from one prior, got another in number {number}; begin with one"
            " `KalmanFilter.init`, or give `initial_variance`."
        )


def _base_fingerprint(posterior: Posterior) -> str:
    """The fingerprint of the frozen weights."""
    return fingerprint(posterior.adapter.model, set(posterior.adapter.names))
