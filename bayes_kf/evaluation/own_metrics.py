"""A user's own metric in every report: its value, interval and null band, and a row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.intervals import MIN_LOSSES, bounded_interval
from bayes_kf.evaluation.calibration.score_summary import LEVEL
from bayes_kf.evaluation.inputs import as_float
from bayes_kf.evaluation.report.score_labels import OWN_LABELS, ScoreLabel, known_label
from bayes_kf.evaluation.resampling.binning import sample_labels
from bayes_kf.evaluation.resampling.null_test import NullSettings, summarize_null
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Interval, Score

MAX_SIMULATIONS = 200  # calls of a user's function for a null band
MAX_RESAMPLES = 500  # and for the interval of a single number
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class OwnMetric(NamedTuple):
    """A registered metric; see `register_metric`."""

    function: Callable[[Tensor, Tensor], Any]
    bounds: tuple[float, float] | None


_METRICS: dict[str, OwnMetric] = {}


def register_metric(
    name: str, *, label: str | None = None, remark: str = "", bounds: tuple[float, float] | None = None
) -> Callable[[FunctionT], FunctionT]:
    """Decorator: from now on every report of `evaluate` and `evaluate_predictions` has a row for this metric.

    The function takes class probabilities (N, C), float64, and class indices (N,), and returns one number for each
    example, (N,), whose mean is the score, or a single number. The null band is from the values for labels drawn from
    the probabilities. The interval of a mean is that of the package's own scores with these bounds, or Student's; that
    of a single number is the bootstrap's, which is only right for numbers that are smooth in the data and not biased
    (F1, kappa, a rate; not a calibration error), and is left out if a resample has no value. With clusters, single
    numbers have none of both.

    Args:
        name: Of the score, a Python identifier; registering it again replaces it.
        label: Its name for readers.
        remark: On its unit, range or direction.
        bounds: Smallest and largest value of an example.

    Raises:
        ValueError: If the name is no identifier or is that of a score of this package, or the bounds are malformed.

    Example:
        >>> from bayes_kf import evaluation as ev
        >>> @ev.register_metric("cost", label="Cost", remark="euros an answer; lower is better", bounds=(0, 5))
        ... def cost(probs, labels):
        ...     return 5.0 * (probs.argmax(dim=1) != labels)
        >>> report = ev.evaluate_predictions([[0.9, 0.1], [0.4, 0.6]], [0, 0])
        >>> report.scores["cost"], report.scores["cost_high"] <= 5
        (2.5, True)
        >>> ev.unregister_metric("cost")
    """
    if not name.isidentifier() or (known_label(name) is not None and name not in OWN_LABELS):
        raise ValueError(f"`name` must be an identifier that is no score of this package, got {name!r}.")
    if bounds is not None and not (all(map(math.isfinite, bounds)) and bounds[0] < bounds[1]):
        raise ValueError(f"`bounds` must be two finite numbers, the smaller first, got {bounds!r}.")

    def register(function: FunctionT) -> FunctionT:
        _METRICS[name] = OwnMetric(function, bounds)
        OWN_LABELS[name] = ScoreLabel(label or name, remark)
        return function

    return register


def unregister_metric(name: str) -> None:
    """Leave a registered metric out of later reports.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in _METRICS:
        raise ValueError(f"`name` must be that of a registered metric, got {name!r}.")
    del _METRICS[name], OWN_LABELS[name]


def own_scores(
    probs: Tensor, labels: Tensor, settings: NullSettings, design: SampleDesign | None = None
) -> dict[str, Score]:
    """Every registered metric of checked probabilities (N, C) and labels (N,)."""
    if not _METRICS:
        return {}
    draws = min(settings.num_simulations, MAX_SIMULATIONS)
    drawn = sample_labels(probs, draws, settings.seed)
    return {name: _score(name, metric, probs, labels, drawn, settings, design) for name, metric in _METRICS.items()}


def _score(
    name: str,
    metric: OwnMetric,
    probs: Tensor,
    labels: Tensor,
    drawn: Tensor,
    settings: NullSettings,
    design: SampleDesign | None,
) -> Score:
    """One metric; `drawn` (N, R) are labels under calibration."""
    values = _values(name, metric, probs, labels)
    value = _mean(values, design)
    if values.ndim == 0 and design is not None:
        return Score(value)
    interval = _number_interval(name, metric, probs, labels, settings) if values.ndim == 0 else None
    if values.ndim == 1:
        interval = _mean_interval(values, metric.bounds, design)
    if design is not None and design.is_clustered:
        return Score(value, interval)
    simulated = torch.tensor([_mean(_values(name, metric, probs, own), design) for own in drawn.T], dtype=torch.float64)
    if not bool(simulated.isfinite().all()):
        return Score(value, interval)
    band = summarize_null(simulated, LEVEL)
    tail = min(int((simulated <= value).sum()), int((simulated >= value).sum()))
    p_value = min(1.0, 2 * (1 + tail) / (1 + len(simulated)))
    return Score(value, interval, Interval(band.low, band.high), band.mean, p_value)


def _values(name: str, metric: OwnMetric, probs: Tensor, labels: Tensor) -> Tensor:
    """What the function returns: (N,) or a number."""
    values = torch.as_tensor(metric.function(probs.clone(), labels.clone())).detach().cpu().double()
    if values.ndim:
        values = as_float(values, name, allow_infinite=True)
    if values.ndim and values.shape != labels.shape:
        raise ValueError(
            f"The metric {name!r} must return a number or one for each of {len(labels)} examples, got shape "
            f"{tuple(values.shape)}."
        )
    if metric.bounds is not None and (values.min() < metric.bounds[0] or values.max() > metric.bounds[1]):
        got = f"values in {values.min():.3g}..{values.max():.3g}"
        raise ValueError(f"The metric {name!r} must stay in its bounds {metric.bounds}, got {got}.")
    return values


def _mean(values: Tensor, design: SampleDesign | None) -> float:
    """The score."""
    return values.mean().item() if design is None or values.ndim == 0 else design.mean(values)


def _mean_interval(values: Tensor, bounds: tuple[float, float] | None, design: SampleDesign | None) -> Interval | None:
    """Interval of a mean; without bounds Student's, from `MIN_LOSSES` examples on."""
    if not bool(values.isfinite().all()):
        return None
    number, total, squares = float(len(values)), values.sum().item(), values.square().sum().item()
    if design is not None:
        number, total, squares, _ = design.equivalent(values)
    if bounds is not None:
        return bounded_interval(total, squares, number, float(bounds[0]), float(bounds[1]), LEVEL)
    if number < MIN_LOSSES:
        return None
    mean = total / number
    error = math.sqrt(max(squares / number - mean**2, 0.0) / (number - 1))
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, number - 1)) * error
    return Interval(mean - half, mean + half)


def _number_interval(
    name: str, metric: OwnMetric, probs: Tensor, labels: Tensor, settings: NullSettings
) -> Interval | None:
    """Bootstrap interval of a single number; None if a resample has no finite value, or all have the same."""

    def of(places: np.ndarray) -> float:
        chosen = torch.from_numpy(places)
        return _values(name, metric, probs[chosen], labels[chosen]).item()

    size = len(labels)
    if size < MIN_LOSSES:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all equal or missing: there is no interval then
        found = scipy.stats.bootstrap(
            (np.arange(size),),
            of,
            vectorized=False,
            n_resamples=MAX_RESAMPLES,
            method="basic",
            confidence_level=LEVEL,
            rng=np.random.default_rng(settings.seed),
        ).confidence_interval
    if not (math.isfinite(found.low) and found.low < found.high):
        return None
    return Interval(float(found.low), float(found.high))
