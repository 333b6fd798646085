"""The report on a posterior, from its predictions for a loader."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation.classification.entropy import EntropyParts
from bayes_kf.evaluation.classification_report import classification_report
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets
from bayes_kf.evaluation.options import EvaluationOptions
from bayes_kf.evaluation.protocols import LoaderPrediction, PosteriorLike
from bayes_kf.evaluation.recalibration.conformal_sets import ConformalSets
from bayes_kf.evaluation.recalibration.scaling import Recalibration
from bayes_kf.evaluation.regression_report import make_forecast, regression_report
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.sections.advice import POSTERIOR
from bayes_kf.evaluation.sections.groups import groups_of_inputs
from bayes_kf.evaluation.sections.regression import Forecast

NUM_TARGET_DRAWS = 512  # of a prediction that is no normal distribution


def evaluate(
    posterior: PosteriorLike,
    loader: Any,
    *,
    ood: Mapping[str, Any] | None = None,
    examples: Any = None,
    human: Array | None = None,
    recalibration: Recalibration | None = None,
    conformal: ConformalSets | None = None,
    groups: Mapping[str, Any] | None = None,
    weights: Array | None = None,
    clusters: Any = None,
    ordered: bool = False,
    top_k: Sequence[int] | None = None,
    method: str = "linearized",
    num_samples: int = 64,
    num_bins: int = 15,
    num_simulations: int = 1000,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    seed: int = 0,
) -> Report:
    """Report on a posterior's predictions for a loader.

    Bernoulli outputs count as N·m problems of two classes; intervals, null bands and tests allow for the dependence of
    the m outputs of an example. Labels of tokens count as problems of their own too, and as independent ones unless
    `clusters` says which belong together. A posterior without class probabilities (real targets, counts) gets
    a regression report. Unless each target is predicted by a normal distribution, its scores are those of draws of the
    targets. If the posterior has a method `output_variance`, the report shows its result for the first batch.

    Args:
        posterior: Any object with `predict_loader`, `config` and `history`; see `PosteriorLike`.
        loader: In-distribution inputs with their targets, in any form that the posterior takes.
        ood: Name to loader of out-of-distribution inputs, or a tensor of them; targets are ignored and may be missing.
        examples: Texts or images of the loader's examples in their order, to be shown; see `evaluate_predictions`.
        human: Shares of people's answers, (N, C).
        recalibration: A recalibration fitted on other examples.
        conformal: Conformal sets fitted on other examples.
        groups: Name of a kind to the group of each example of the loader, in its order; see `evaluate_predictions`.
        weights: How much each example counts, (N,); see `evaluate_predictions`.
        clusters: What each example is part of, (N,); see `evaluate_predictions`.
        ordered: Whether the classes have an order; always true under the likelihood "ordinal".
        top_k: Numbers of most probable classes that count together.
        method: Prediction method, as the posterior names it.
        num_samples: Number of draws for each prediction. With few draws the log loss is too high; see
            `Posterior.predict`.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets for each null band, at least 39.
        class_names: Names of the classes.
        title: Title of the page.
        seed: Seed of the predictions' draws and of the simulated null bands.

    Raises:
        ValueError: If the loader has no targets, an option for class probabilities is given for a regression, or a
            prediction is malformed.
    """
    options = EvaluationOptions(
        null=NullSettings(num_bins, num_simulations, seed),
        title=title,
        config=_settings(posterior.config) | {"method": method, "num_samples": num_samples},
        ood=ood or {},
        examples=examples,
        human=human,
        recalibration=recalibration,
        conformal=conformal,
        ordered=ordered,
        top_k=top_k,
        class_names=class_names,
        groups={} if groups is None else groups,
        calls=POSTERIOR,
    )
    counted = {"weights": weights, "clusters": clusters}
    report = _report(posterior, loader, options, counted, method=method, num_samples=num_samples)
    notes = list(getattr(posterior, "notes", ()))  # the posterior's own remarks, sentences
    return replace(report, sections=replace(report.sections, verdict=report.sections.verdict + notes))


def _report(
    posterior: PosteriorLike, loader: Any, options: EvaluationOptions, counted: dict[str, Any], **method: Any
) -> Report:
    """The report of the kind that the posterior's likelihood asks for."""
    generator = torch.Generator().manual_seed(options.null.seed)
    first: list[Any] = []
    prediction = posterior.predict_loader(_remember_first(loader, first), **method, generator=generator)
    if prediction.targets is None:
        raise ValueError("`loader` must give targets, got inputs only.")
    explain = getattr(posterior, "output_variance", None)
    options = replace(
        options,
        history=posterior.history,
        parameter_variance=getattr(posterior, "variance", None),
        output_variance=explain(first[0]) if explain is not None and first else None,
    )
    if prediction.probs is None:
        options.check_no_classes()
        for name, given in counted.items():
            if given is not None:
                raise ValueError(f"`{name}` must be left out for a posterior without class probabilities, got some.")
        return _regression(prediction, options)
    is_bernoulli = _is_bernoulli(posterior)
    if getattr(posterior.config, "likelihood", None) == "ordinal":
        options = replace(options, ordered=True)
    ood = {
        name: posterior.predict_loader(as_loader(inputs), **method, generator=generator)
        for name, inputs in options.ood.items()
    }
    options = replace(options, ood={name: ood_probs(posterior, name, ood[name]) for name in ood})
    probs, targets = class_predictions(posterior, prediction, "posterior")
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    size = len(prediction.targets)
    design, each = _design(size, len(labels), **counted), len(labels) // size
    if each > 1:
        groups = groups_of_inputs(options.groups, torch.arange(size).repeat_interleave(each), size)
        options = replace(options, groups=groups)
    options = replace(options, design=design)
    options.check_design()
    return classification_report(
        checked,
        labels,
        options,
        log_prob=prediction.log_prob,
        uncertainty=_entropy_parts(prediction, is_bernoulli),
    )


def _design(num_examples: int, num_problems: int, weights: Any, clusters: Any) -> SampleDesign | None:
    """Weights and clusters of the problems; those of one example with several Bernoulli outputs are dependent."""
    design = SampleDesign.of(weights, clusters, num_examples)
    each = num_problems // num_examples
    if each == 1:
        return design
    problems = torch.arange(num_examples).repeat_interleave(each)
    if design is None:
        return SampleDesign.of(None, problems, num_problems) if num_examples > 1 else None
    return SampleDesign.of(design.weights[problems], design.clusters[problems], num_problems)


def _regression(prediction: LoaderPrediction, options: EvaluationOptions) -> Report:
    """The report on predictions of real values."""
    return regression_report(forecast_of(prediction, options.null.seed), options, log_prob=prediction.log_prob)


def forecast_of(prediction: LoaderPrediction, seed: int) -> Forecast:
    """The forecast of a posterior's predictions of real values.

    Raises:
        ValueError: If it has no mean, or the loader had no targets.
    """
    if prediction.mean is None or prediction.targets is None:
        raise ValueError("`posterior` must predict probs or a mean, got neither.")
    samples = _target_draws(prediction, seed)
    return make_forecast(prediction.mean, prediction.targets, prediction.variance, samples)


def _target_draws(prediction: LoaderPrediction, seed: int) -> Tensor | None:
    """Draws of the targets, noise included; None if N(mean, variance) is their distribution."""
    draw = getattr(prediction, "target_samples", None)
    if draw is None:
        return prediction.samples
    if getattr(prediction, "is_normal", False):
        return None
    draws: Tensor = draw(NUM_TARGET_DRAWS, torch.Generator().manual_seed(seed), joint=False)
    return draws


def _remember_first(loader: Any, first: list[Any]) -> Any:
    """The loader, which appends its first batch to ``first``; a loader that is not iterable is returned unchanged."""
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping):
        return loader
    return _batches(loader, first)


def _batches(loader: Iterable[Any], first: list[Any]) -> Iterator[Any]:
    """Yields every batch, and appends the first one to ``first``."""
    for batch in loader:
        if not first:
            first.append(batch)
        yield batch


def class_predictions(posterior: PosteriorLike, prediction: LoaderPrediction, name: str) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, C) and class indices (N,) of a posterior's predictions.

    Raises:
        ValueError: If it predicts none, or the loader had no targets.
    """
    if prediction.targets is None:
        raise ValueError("`loader` must give targets, got inputs only.")
    if prediction.probs is None:
        raise ValueError(f"`{name}` must predict class probabilities, got none.")
    if _is_bernoulli(posterior):
        return _two_classes(prediction.probs), _labels(prediction.targets)
    return prediction.probs, prediction.targets


def _is_bernoulli(posterior: PosteriorLike) -> bool:
    """Whether the outputs are independent zeros and ones."""
    return getattr(posterior.config, "likelihood", None) == "bernoulli"


def as_loader(inputs: Any) -> Any:
    """A tensor of inputs as a loader of one batch, whose rows are not batches of their own."""
    return [inputs] if isinstance(inputs, Tensor) else inputs


def ood_probs(posterior: PosteriorLike, name: str, prediction: LoaderPrediction) -> Tensor:
    """Class probabilities of a posterior's predictions for an out-of-distribution set."""
    if prediction.probs is None:
        raise ValueError(f"`posterior` must predict probs for ood[{name!r}] too, got none.")
    return _two_classes(prediction.probs) if _is_bernoulli(posterior) else prediction.probs


def _entropy_parts(prediction: LoaderPrediction, is_bernoulli: bool) -> EntropyParts | None:
    """The three entropies if the posterior predicts all of them; for Bernoulli outputs the mean over the outputs."""
    if prediction.entropy is None or prediction.aleatoric is None or prediction.epistemic is None:
        return None
    parts = (prediction.entropy, prediction.aleatoric, prediction.epistemic)
    num_outputs = prediction.probs.shape[1] if is_bernoulli and prediction.probs is not None else 1  # sums over outputs
    return EntropyParts(*(part / num_outputs for part in parts))


def _two_classes(probs: Tensor) -> Tensor:
    """Probabilities of one, (N,) or (N, m), as probabilities of zero and one, (N·m, 2)."""
    ones = probs.flatten().double()
    return torch.stack([1 - ones, ones], dim=1)


def _labels(targets: Tensor) -> Tensor:
    """Zeros and ones of any dtype, (N,) or (N, m), as class indices (N·m,)."""
    flat = targets.flatten()
    if not ((flat == 0) | (flat == 1)).all():
        raise ValueError(f"`targets` must hold zeros and ones for Bernoulli outputs, got values up to {flat.max()}.")
    return flat.long()


def _settings(config: Any) -> dict[str, object]:
    """The fields of a dataclass; empty for any other object."""
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
