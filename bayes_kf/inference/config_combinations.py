"""Checks of settings that exclude each other or need each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bayes_kf.validation import did_you_mean

OBSERVED = ("likelihood", "noise", "curvature", "curvature_epsilon", "curvature_classes", "curvature_draws", "seed")
"""The settings that all filters of a bank share, because they share the linearization."""
BUDGETS = ("bytes_budget", "outputs_per_pass")
TUNING = ("tune", "tune_examples", "tune_burn_in", "tune_margin")
TEMPERATURES = ("temperature", "temperature_margin", "softmax_temperature")
NOT_TUNABLE = (*OBSERVED, *TUNING, *BUDGETS, "passes", "mean_passes", *TEMPERATURES)
OWN_NOISE = ("student_t", "heteroscedastic_gaussian", "ordinal")
"""The likelihoods whose noise is no covariance R of residuals, and whose log density is not concave."""
SCALED = ("gaussian", "student_t")
"""The likelihoods with a noise variance σ² that can be estimated."""
EQUAL_WEIGHTS = {
    "forgetting": 1.0,
    "drift_variance": 0.0,
    "prior_pull": 0.0,
    "gate_quantile": None,
    "gradient_penalty": 0.0,
}
"""The values at which every example has the same weight."""


def check_combinations(config: Any) -> None:
    """Raise ValueError for the first pair of settings of a configuration that exclude each other."""
    _check_observation(config)
    if config.tune is not None:
        _check_grid(config, config.tune)
    _check_passes(config)


def _check_observation(config: Any) -> None:
    """Raise ValueError for settings that do not suit the likelihood or the noise."""
    observation = (config.likelihood, config.noise)
    if config.softmax_temperature != 1.0 and config.likelihood != "categorical":
        raise ValueError(
            f"`softmax_temperature` must be 1 for `likelihood` {config.likelihood!r}, which has no softmax, "
            f"got {config.softmax_temperature!r}."
        )
    if config.likelihood in OWN_NOISE and config.noise != "exponential_family":
        raise ValueError(
            f"`noise` must be 'exponential_family' for `likelihood` {config.likelihood!r}, got {config.noise!r}."
        )
    if config.likelihood in OWN_NOISE and config.expansion != "mode":
        raise ValueError(
            f"`expansion` must be 'mode' for `likelihood` {config.likelihood!r}, whose log density is not concave, got "
            f"{config.expansion!r}."
        )
    if config.likelihood == "heteroscedastic_gaussian" and config.noise_variance != 1.0:
        raise ValueError(
            "`noise_variance` must be left at 1 for `likelihood` 'heteroscedastic_gaussian', whose outputs hold the "
            f"variances, got {config.noise_variance!r}."
        )
    estimable = config.likelihood in SCALED and config.noise == "exponential_family"
    if config.noise_variance == "estimated" and not estimable:
        raise ValueError(
            "`noise_variance` 'estimated' needs `likelihood` 'gaussian' or 'student_t' and `noise` "
            f"'exponential_family', got {config.likelihood!r} and {config.noise!r}."
        )
    if config.likelihood == "tokens":
        _check_text(config)
        return
    if config.curvature != "exact" and observation != ("categorical", "exponential_family"):
        raise ValueError(
            f"`curvature` {config.curvature!r} needs `likelihood` 'categorical' and `noise` 'exponential_family', "
            f"got {config.likelihood!r} and {config.noise!r}."
        )


def _check_text(config: Any) -> None:
    """Raise ValueError for settings that do not suit the tokens of text."""
    needed = {"noise": "exponential_family", "curvature": "sampled", "gate_quantile": None, "tune": None}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{name}` must be {value!r} for `likelihood` 'tokens', got {getattr(config, name)!r}.")
    if config.initial_spread == "bounded":
        raise ValueError("`initial_spread` must not be 'bounded' for `likelihood` 'tokens', got 'bounded'.")


def _check_grid(config: Any, grid: object) -> None:
    """Raise ValueError unless every name in ``tune`` is a tunable setting and every value in it is valid."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"`tune` must be a mapping from settings to values, got {grid!r}.")
    tunable = {field.name for field in dataclasses.fields(config)} - set(NOT_TUNABLE)
    for name, values in grid.items():
        if name not in tunable:
            nearest = did_you_mean(name, tunable) or "."
            raise ValueError(f"`tune` must name settings that a stream can choose, got {name!r}{nearest}")
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"`tune` must hold a list or tuple of values for {name!r}, got {values!r}.")
        for value in values:
            dataclasses.replace(config, tune=None, **{name: value})
    if config.temperature != "prequential":
        raise ValueError(f"`tune` needs `temperature` 'prequential', got {config.temperature!r}.")


def _check_passes(config: Any) -> None:
    """Raise ValueError for settings that several passes exclude."""
    if config.passes == 1 and not config.mean_passes:
        return
    changed = [name for name, value in EQUAL_WEIGHTS.items() if getattr(config, name) != value]
    if changed:
        setting = "`passes` above 1" if config.passes > 1 else "`mean_passes` above 0"
        needed = " and ".join(f"`{name}` {EQUAL_WEIGHTS[name]}" for name in changed)
        got = " and ".join(str(getattr(config, name)) for name in changed)
        raise ValueError(f"{setting} needs {needed}, since it gives every example the same weight, got {got}.")
    if config.mean_passes and config.noise != "exponential_family":
        raise ValueError(f"`mean_passes` descend the likelihood of `noise` 'exponential_family', got {config.noise!r}.")
