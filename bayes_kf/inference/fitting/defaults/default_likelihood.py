"""The likelihood of a fit without a config, from its targets. A config, also one with defaults only, is used as it is.

Only unambiguous targets decide: floats are real numbers, bools are answers, integers (B,) are class labels and integers
(B, T) are labels of tokens. Floats that are all 0 or 1 could be either: they are answers if the model of transformers
has the ``problem_type`` "multi_label_classification". Otherwise a config says so, as for integers that are counts or
classes in an order.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.language import LearnedTokens, PreferencePairs
from bayes_kf.models.language.supervised_tokens import transformers_model

LARGEST, SMALLEST = 10.0, 0.1  # root mean square of targets that fit the prior's unit
MULTI_LABEL = "multi_label_classification"  # transformers' word for it
MIN_TARGETS = 8  # fewer say little about their size
TEXT: dict[str, Any] = {"likelihood": "tokens", "curvature": "sampled"}
TEXT_PRIOR: dict[str, Any] = {"initial_spread": "constant", "initial_logit_sd": 1.0}
PAIRS: dict[str, Any] = {"likelihood": "bernoulli"}
REAL: dict[str, Any] = {"likelihood": "gaussian", "noise_variance": "estimated"}


def as_text(config: KalmanConfig, num_probes: int = 1) -> KalmanConfig:
    """A default configuration for text: its settings of the filter, with the likelihood and the prior of text."""
    return dataclasses.replace(config, **TEXT, **TEXT_PRIOR, curvature_draws=num_probes, tune=None)


def for_reading(config: KalmanConfig, model: object) -> KalmanConfig:
    """A default configuration with the likelihood of a model's reading, where that reading has but one."""
    if isinstance(model, LearnedTokens):
        return as_text(config, model.num_probes)
    return dataclasses.replace(config, **PAIRS) if isinstance(model, PreferencePairs) else config


def is_multi_label(model: object) -> bool:
    """Whether the config of a model of transformers says that each output answers a question of its own."""
    module = model.model if isinstance(model, AdapterModel) else model
    base = transformers_model(module) if isinstance(module, nn.Module) else None
    return base is not None and getattr(base.config, "problem_type", None) == MULTI_LABEL


def default_likelihood(targets: Iterable[Any], model: object = None) -> dict[str, Any]:
    """The settings of the likelihood for the targets of batches; empty for class labels, and if they are no tensors.

    A reading of preference pairs has one likelihood, whose targets may also be numbers between 0 and 1.

    The first batch decides, unless it holds only the floats 0 and 1; then further batches are read. Warns if real
    targets are not of size one, as the default prior expects.

    Args:
        targets: of the batches.
        model: whose config may say that there are several labels.

    Raises:
        ValueError: if all targets are the floats 0 and 1; or if they are others, and the model is one of several
            labels.

    Example:
        >>> default_likelihood([torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0])])
        {'likelihood': 'gaussian', 'noise_variance': 'estimated'}
        >>> default_likelihood([torch.tensor([0, 1])]), default_likelihood([torch.tensor([[-100, 7, 8]])])
        ({}, {'likelihood': 'tokens', 'curvature': 'sampled'})
    """
    if isinstance(model, PreferencePairs):
        return PAIRS
    is_binary = False
    if is_multi_label(model):
        return _several_labels(targets)
    for some in targets:
        if isinstance(some, Tensor) and some.ndim == 2 and not (some.is_floating_point() or some.dtype == torch.bool):
            return TEXT
        if not isinstance(some, Tensor) or not (some.is_floating_point() or some.dtype == torch.bool):
            return {}
        if some.dtype == torch.bool:
            return PAIRS
        if not bool(((some == 0) | (some == 1)).all()):
            _warn_of_scale(some)
            return REAL
        is_binary = True
    if is_binary:
        raise ValueError(
            "`config` must say what float targets that are all 0 or 1 mean, by `likelihood` 'bernoulli' or 'gaussian' "
            "(or the model's own config by `problem_type` 'multi_label_classification'), got None."
        )
    return {}


def _several_labels(targets: Iterable[Any]) -> dict[str, Any]:
    """The likelihood of several labels, for targets that are 0 or 1."""
    first = next(iter(targets), None)
    if isinstance(first, Tensor) and not bool(((first == 0) | (first == 1)).all()):
        raise ValueError(  # a loss of transformers takes any floats of several outputs for labels
            "`config` must say by `likelihood` 'gaussian' that targets are numbers if the model's own has "
            f"`problem_type` {MULTI_LABEL!r}, got None with targets that are not all 0 or 1."
        )
    return {"likelihood": "bernoulli"}


def _warn_of_scale(targets: Tensor) -> None:
    """Warn if real targets are far from size one."""
    size = float(targets.double().square().mean().sqrt())
    if targets.numel() >= MIN_TARGETS and not SMALLEST <= size <= LARGEST:
        warnings.warn(
            f"the targets of the first batch have a root mean square of {size:.3g}, but the default prior is for "
            "targets of size 1: standardize them, or set `initial_logit_sd`, in units of the targets, in a config",
            stacklevel=2,
        )
