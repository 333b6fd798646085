"""The report that compares several posteriors, or several sets of predictions."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.classification.comparison import compare_predictions
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.options import EvaluationOptions
from bayes_kf.evaluation.posterior_report import class_predictions
from bayes_kf.evaluation.protocols import PosteriorLike
from bayes_kf.evaluation.report.provenance import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.sections.classification import score_section
from bayes_kf.evaluation.sections.comparison import comparison_section, diagram_section, stream_comparison_section


def compare(
    posteriors: Mapping[str, PosteriorLike | Array],
    loader: Any,
    *,
    method: str = "linearized",
    num_samples: int = 64,
    num_bins: int = 15,
    num_simulations: int = 1000,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report that compares posteriors: which one is better in which score, by how much, and which ones are tied.

    Args:
        posteriors: At least two. Name to posterior (see `PosteriorLike`), or to class probabilities (N, C) of another
            model for the loader's examples in their order.
        loader: Inputs with their targets. It is iterated once for each posterior, so it cannot be an iterator.
        method: Prediction method, as the posteriors name it.
        num_samples: Number of draws for each prediction.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets for each null band, at least 39.
        title: Title of the page.
        seed: Seed of the predictions' draws and the simulations.

    Raises:
        ValueError: If there are fewer than two posteriors, the loader is an iterator or its targets differ between two
            passes, or a posterior predicts no class probabilities.
    """
    if len(posteriors) < 2:
        raise ValueError(f"`posteriors` must hold at least two, got {len(posteriors)}.")
    if isinstance(loader, Iterator):
        raise ValueError("`loader` must be iterable more than once, got an iterator.")
    config = {"method": method, "num_samples": num_samples}
    options = EvaluationOptions(null=NullSettings(num_bins, num_simulations, seed), title=title, config=config)
    probs, targets = _predict_all(posteriors, loader, method, num_samples, seed)
    histories = {
        name: posterior.history
        for name, posterior in posteriors.items()
        if not isinstance(posterior, Tensor | np.ndarray) and posterior.history
    }
    return comparison_report(probs, targets, histories, options)


def report_comparison(
    probs: Mapping[str, Array],
    targets: Array,
    *,
    histories: Mapping[str, Mapping[str, Array]] | None = None,
    num_bins: int = 15,
    num_simulations: int = 1000,
    config: Mapping[str, object] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report that compares class probabilities of several models for the same examples.

    Args:
        probs: Name to class probabilities, (N, C), of at least two models.
        targets: Class indices, (N,).
        histories: Name to series of the stream that a model was fitted to, "log_loss" and "correct" for each example.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets for each null band, at least 39.
        config: Settings to print.
        title: Title of the page.
        seed: Seed of the simulations.

    Returns:
        A report whose scores are named "model/score".

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> report = report_comparison({"a": probs, "b": probs.flip(0)}, torch.tensor([0, 1, 1]))
        >>> round(report.scores["a/accuracy"], 3), report.scores["b/nll"] > report.scores["a/nll"]
        (0.667, True)
    """
    null = NullSettings(num_bins, num_simulations, seed)
    options = EvaluationOptions(null=null, title=title, config=config or {})
    return comparison_report(probs, targets, histories or {}, options)


def comparison_report(
    probs: Mapping[str, Array],
    targets: Array,
    histories: Mapping[str, Mapping[str, Array]],
    options: EvaluationOptions,
) -> Report:
    """The report on several models; see `report_comparison`."""
    comparisons = compare_predictions(probs, targets)
    checked = {str(name): as_probs(values, f"probs[{name!r}]") for name, values in probs.items()}
    models = {name: score_section(p, as_targets(targets, p), None, options.null) for name, p in checked.items()}
    sections = comparison_section(comparisons, models) + diagram_section(models) + stream_comparison_section(histories)
    fingerprints = {f"predictions of {name}": fingerprint(values) for name, values in checked.items()}
    return Report(
        title=options.title or "Comparison of classifiers",
        config=options.printed_config(models=", ".join(checked), **asdict(options.null)),
        sections=sections,
        fingerprints=fingerprints | {"targets": fingerprint(targets)},
    )


def _predict_all(
    posteriors: Mapping[str, PosteriorLike | Array], loader: Any, method: str, num_samples: int, seed: int
) -> tuple[dict[str, Array], Tensor]:
    """Class probabilities of each posterior, and the targets, which must be the same in each pass."""
    probs: dict[str, Array] = {}
    targets: Tensor | None = None
    for name, posterior in posteriors.items():
        if isinstance(posterior, Tensor | np.ndarray):
            probs[name] = posterior
            continue
        generator = torch.Generator().manual_seed(seed)
        prediction = posterior.predict_loader(loader, method=method, num_samples=num_samples, generator=generator)
        probs[name], its_targets = class_predictions(posterior, prediction, f"posteriors[{name!r}]")
        if targets is not None and not torch.equal(targets, its_targets):
            raise ValueError(f"`loader` must give the same targets every time, got others for posteriors[{name!r}].")
        targets = its_targets
    if targets is None:
        raise ValueError(
            "`posteriors` must hold at least one posterior to read the targets with, got predictions only."
        )
    return probs, targets
