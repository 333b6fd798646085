"""The rows of ``run.py`` on classifications: from a problem and its stream to predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import bayes_kf as bkf
from benchmarks.bench.registry.problems import QualityProblem
from benchmarks.common.learners import Stream
from benchmarks.quality.rows import (
    AHEAD,
    TOGETHER,
    Learned,
    Predict,
    Predicted,
    averaged,
    predictive,
    softmax,
    validation,
)
from benchmarks.quality.split.strong import FINE_TUNING, facts, fitted_temperature, members, scaled, search

Learn = Callable[[QualityProblem, Stream, int], Learned]


def strong(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """AdamW, ten epochs at most, four rates, early stopping, temperature scaling: all on a held-out eighth."""
    fitted, heldout = validation(stream)
    best, *others = search(partial(_model, problem), fitted, heldout, seed, FINE_TUNING)
    return _with_temperature(lambda given: Predicted(softmax(best.model, given)), heldout, facts([best], others))


def strong_ensemble(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """Three such members, averaged; one temperature for the average. Epistemic entropy is that of the bare members."""
    fitted, heldout = validation(stream)
    runs, unused = members(partial(_model, problem), fitted, heldout, seed, FINE_TUNING)
    models = [run.model for run in runs]
    return _with_temperature(
        lambda given: averaged([softmax(model, given) for model in models]), heldout, facts(runs, unused)
    )


def _with_temperature(bare: Predict, heldout: Stream, numbers: Mapping[str, object]) -> Learned:
    """Predictions at the temperature that held-out examples choose; variants: without its prior, and without it."""
    probs = bare(heldout).probs
    with_prior = fitted_temperature(probs, heldout.labels)
    without = fitted_temperature(probs, heldout.labels, math.inf)

    def at(temperature: float, given: Stream) -> Predicted:
        predicted = bare(given)
        return Predicted(scaled(predicted.probs, temperature), predicted.epistemic)

    return Learned(
        partial(at, with_prior),
        facts={"temperature": with_prior, "temperature_no_prior": without, **numbers},
        variants={"no_prior": partial(at, without), "unscaled": bare},
    )


def default(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """This package without settings."""
    return _of_members(bkf.fit(problem.model(seed, 0.0), stream_loader(stream, seed), progress=False))


def mixture(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """This package: the default's mixture with a third member."""
    return _of_members(
        bkf.fit_mixture(problem.model(seed, 0.0), stream_loader(stream, seed), members=3, progress=False)
    )


def _of_members(posterior: Any) -> Learned:
    """A mixture's predictions, and what was chosen."""
    members = [
        {
            "weight": weight,
            "size": member.history["size"].tolist(),
            "held_out": member.history["held_out_log_loss"].tolist(),
        }
        for weight, member in zip(posterior.weights, posterior.members, strict=True)
    ]
    return Learned(predictive(posterior), facts={"temperature": posterior.softmax_temperature, "members": members})


def stream_loader(stream: Stream, seed: int) -> DataLoader[Any]:
    """A loader that draws other batches of sixteen in every pass."""

    def collate(numbers: list[int]) -> tuple[Any, Tensor]:
        return stream.at(torch.tensor(numbers)).batches(len(numbers))[0]

    examples: Any = range(len(stream.labels))
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(examples, batch_size=16, shuffle=True, collate_fn=collate, generator=generator)


def post_hoc(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """This package on the adapter of the strong row: its covariance, with size and sharpness by the held-out eighth."""
    fitted, heldout = validation(stream)
    best, *others = search(partial(_model, problem), fitted, heldout, seed, FINE_TUNING)
    batches, spare = fitted.batches(TOGETHER), heldout.batches(AHEAD)
    posterior = bkf.fit(best.model, batches, start="trained", held_out=spare, progress=False)
    numbers = {"temperature": posterior.softmax_temperature, "size": posterior.history["size"].tolist()}
    return Learned(predictive(posterior), facts=numbers | facts([best], others))


def _model(problem: QualityProblem, seed: int) -> torch.nn.Module:
    return problem.model(seed, 0.0)


ROWS: dict[str, tuple[str, Learn]] = {  # title, method
    "strong": ("AdamW, early stopping, temperature scaling", strong),
    "strong-ensemble": ("ensemble of three of them", strong_ensemble),
    "default": ("**ours, default**", default),
    "mixture": ("**ours, mixture of three**", mixture),
    "post-hoc": ("**ours, post hoc on the first row**", post_hoc),
}
