"""The rows of ``run.py`` on classifications: from a problem and its stream to predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import bayes_kf as bkf
from benchmarks.bench.registry.problems import QualityProblem
from benchmarks.common.learners import Stream
from benchmarks.quality import rows as nine
from benchmarks.quality.rows import AHEAD, TOGETHER, Learned, Predicted, averaged, predictive, softmax, validation
from benchmarks.quality.split.strong import FINE_TUNING, facts, fitted_temperature, members, scaled, search

Learn = Callable[[QualityProblem, Stream, int], Learned]


def strong(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """AdamW, ten epochs at most, four rates, early stopping, temperature scaling: all on a held-out eighth."""
    fitted, heldout = validation(stream)
    best, *others = search(partial(_model, problem), fitted, heldout, seed, FINE_TUNING)
    temperature = fitted_temperature(softmax(best.model, heldout), heldout.labels)
    return Learned(
        lambda given: Predicted(scaled(softmax(best.model, given), temperature)),
        facts={"temperature": temperature, **facts([best], others)},
    )


def strong_ensemble(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """Three such members, averaged; one temperature for the average. Epistemic entropy is that of the bare members."""
    fitted, heldout = validation(stream)
    runs, unused = members(partial(_model, problem), fitted, heldout, seed, FINE_TUNING)
    bare = lambda given: averaged([softmax(run.model, given) for run in runs])  # noqa: E731
    temperature = fitted_temperature(bare(heldout).probs, heldout.labels)

    def predict(given: Stream) -> Predicted:
        average = bare(given)
        return Predicted(scaled(average.probs, temperature), average.epistemic)

    return Learned(predict, facts={"temperature": temperature, **facts(runs, unused)})


def default(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """This package without settings."""
    return nine.default(problem, stream, seed, {})


def post_hoc(problem: QualityProblem, stream: Stream, seed: int) -> Learned:
    """This package on the adapter of the strong row: a covariance from the same examples, calibrated on the eighth."""
    fitted, heldout = validation(stream)
    best, *others = search(partial(_model, problem), fitted, heldout, seed, FINE_TUNING)
    posterior = bkf.fit(best.model, fitted.batches(TOGETHER), start="trained", progress=False)
    posterior = posterior.calibrate(heldout.batches(AHEAD))
    return Learned(predictive(posterior), facts={"temperature": posterior.temperature, **facts([best], others)})


def _model(problem: QualityProblem, seed: int) -> torch.nn.Module:
    return problem.model(seed, 0.0)


ROWS: dict[str, tuple[str, Learn]] = {  # title, method
    "strong": ("AdamW, early stopping, temperature scaling", strong),
    "strong-ensemble": ("ensemble of three of them", strong_ensemble),
    "default": ("**ours, default**", default),
    "post-hoc": ("**ours, post hoc on the first row**", post_hoc),
}
