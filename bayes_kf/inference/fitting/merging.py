"""Merging of posteriors that were fitted to disjoint data from one prior.

p(θ | D₁, …, D_K) ∝ p(θ)^(1−K) Π_k p(θ | D_k) for data that are independent given θ. The Gaussians' precisions P⁻¹ and
their P⁻¹μ are added, and K − 1 times those of the prior are subtracted, so that the prior counts once. This is exact
for models that are linear in θ, since each belief is linearized at its own means. A covariance keeps its structure.
This is the Bayesian committee machine (Tresp 2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch

from bayes_kf.inference.config_combinations import BUDGETS, TUNING
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.gaussian_posterior import reweighted
from bayes_kf.inference.saving.base_fingerprint import fingerprint

MAY_DIFFER = ("seed", "temperature", *TUNING, *BUDGETS)  # settings


@overload
def merge(posteriors: Sequence[Posterior]) -> Posterior: ...
@overload
def merge(posteriors: Sequence[MixturePosterior]) -> MixturePosterior: ...
def merge(posteriors: Sequence[Posterior] | Sequence[MixturePosterior]) -> Posterior | MixturePosterior:
    """The posterior given the data of several posteriors, which were fitted to disjoint data from one prior.

    They must have the same model, settings and prior: begin each with the same ``state = kf.init(inputs)``, or give
    ``initial_variance``. The result belongs to the model of the first and has no history. Its temperature is that of
    the configs if they all have the same number, or else the one with the least log loss over all their streams.

    Mixtures are merged member by member: each with those of the others that have its settings and prior. The weights
    are multiplied, as if each mixture were a vote of its own data on the members.

    Args:
        posteriors: at least one; all of them single ones, or all of them mixtures.

    Raises:
        ValueError: if there are none, mixtures and single ones are mixed, a member of a mixture has no counterpart in
            another, or they have different models, settings or priors, or their temperatures differ and
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
    mixtures = [posterior for posterior in posteriors if isinstance(posterior, MixturePosterior)]
    single = [posterior for posterior in posteriors if isinstance(posterior, Posterior)]
    if mixtures and single:
        raise ValueError(f"`posteriors` must all be mixtures or none, got {len(mixtures)} of {len(posteriors)}.")
    return _merge_mixtures(mixtures) if mixtures else _merge_posteriors(single)


def _merge_mixtures(mixtures: Sequence[MixturePosterior]) -> MixturePosterior:
    """Members that belong together merged, with the product of their weights."""
    first = mixtures[0]
    parts = [[member] for member in first.members]
    log_weights = [math.log(weight) for weight in first.weights]
    for number, other in enumerate(mixtures[1:], 1):
        if len(other.members) != len(parts):
            raise ValueError(
                f"`posteriors` must be mixtures of as many members, {len(parts)}, got {len(other.members)} in number "
                f"{number}."
            )
        left = list(range(len(other.members)))
        for k, part in enumerate(parts):
            found = _counterpart(part[0], [other.members[j] for j in left], number, k)
            j = left.pop(found)
            part.append(other.members[j])
            log_weights[k] += math.log(other.weights[j])
    weights = reweighted([1.0] * len(parts), log_weights)
    return MixturePosterior(tuple(_merge_posteriors(part) for part in parts), weights)


def _counterpart(member: Posterior, others: Sequence[Posterior], number: int, k: int) -> int:
    """The index of the member that can be merged with this one, if possible of the same seed.

    Raises:
        ValueError: if there is none; it says why the best candidate does not fit.
    """
    by_seed = sorted(range(len(others)), key=lambda j: others[j].config.seed != member.config.seed)  # stable
    reasons = []
    for j in by_seed:
        try:
            _check_compatible(member, others[j], number)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return j
    raise ValueError(
        f"`posteriors` must be mixtures of the same members, got none like member {k} of the first in number {number}: "
        f"{reasons[0]}"
    )


def _merge_posteriors(posteriors: Sequence[Posterior]) -> Posterior:
    """The merged posterior of single ones; see :func:`merge`."""
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
