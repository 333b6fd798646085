"""Groups of settings. Each inner function takes the group that it uses, not the whole configuration.

The fields have the names, defaults and meaning that :class:`~bayes_kf.KalmanConfig` gives them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self


class SettingsGroup:
    """A group of settings with the same names as in the configuration."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def of(cls, config: Any) -> Self:
        """The group with the values of a configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class CovarianceSettings(SettingsGroup):
    """The structure of the covariance."""

    covariance: str
    rank: int
    blocks: str


@dataclass(frozen=True)
class PriorSettings(SettingsGroup):
    """The prior: its variance, and the start of LoRA factors."""

    initial_logit_sd: float
    initial_spread: str
    initial_bias_sd: float | None
    initial_variance: float | None
    initial_rule: str
    bound_prior: bool
    lora_inputs: str
    seed: int


@dataclass(frozen=True)
class NoiseSettings(SettingsGroup):
    """The observation model: likelihood, noise R and expansion point."""

    likelihood: str
    noise: str
    noise_variance: float | str
    student_dof: float
    beta: float
    expansion: str


@dataclass(frozen=True)
class CurvatureSettings(SettingsGroup):
    """The output directions of an update and its budgets."""

    curvature: str
    curvature_epsilon: float
    curvature_classes: int
    curvature_draws: int
    outputs_per_pass: int | None
    bytes_budget: int | None
    seed: int


@dataclass(frozen=True)
class DynamicsSettings(SettingsGroup):
    """The predict step, and the limits of the measurement update."""

    forgetting: float
    drift_variance: float
    prior_pull: float
    damping: bool
    gate_quantile: float | None
    gradient_penalty: float
    gradient_penalty_form: str


@dataclass(frozen=True)
class PredictiveSettings(SettingsGroup):
    """The predictive distribution."""

    likelihood: str
    temperature: float | str
    temperature_margin: float
    softmax_temperature: float
    seed: int


@dataclass(frozen=True)
class FittingSettings(SettingsGroup):
    """The passes over a loader, and the settings that it chooses."""

    passes: int
    mean_passes: int
    tune: Mapping[str, Sequence[Any]] | None
    tune_examples: int
    tune_burn_in: float
    tune_margin: float
