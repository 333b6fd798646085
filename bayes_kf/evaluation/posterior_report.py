"""The report on a posterior: predict a loader, then look at the predictions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation.classification.entropy import EntropyParts
from bayes_kf.evaluation.classification_report import evaluate_predictions
from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.protocols import LoaderPrediction, PosteriorLike
from bayes_kf.evaluation.recalibration.conformal_sets import ConformalSets
from bayes_kf.evaluation.recalibration.scaling import Recalibration
from bayes_kf.evaluation.regression_report import evaluate_regression
from bayes_kf.evaluation.report.report import Report


def evaluate(
    posterior: PosteriorLike,
    loader: Any,
    *,
    ood: Mapping[str, Any] | None = None,
    examples: Any = None,
    human: Array | None = None,
    recalibration: Recalibration | None = None,
    conformal: ConformalSets | None = None,
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

    Bernoulli outputs count as two-class problems, N·m of them, which intervals and bands take as independent: where the
    m outputs of an example err together, those are up to √m too narrow. A posterior without class probabilities
    (Gaussian, Poisson) gets a regression report. Where the posterior says which tensors its outputs' variance comes
    from (`output_variance`), the first batch is asked for.

    Args:
        posterior: Anything with `predict_loader`, `config` and `history`, see `PosteriorLike`.
        loader: Known inputs with their targets, in whatever form the posterior takes.
        ood: Name to loader of foreign inputs; their targets are not looked at and may be missing.
        examples: Texts or images of the loader's examples in its order, to be shown; see `evaluate_predictions`.
        human: Shares of people who gave each label, (N, C).
        recalibration: A recalibration fitted on other examples.
        conformal: Conformal sets fitted on other examples.
        ordered: Whether the classes have an order.
        top_k: How many of the most probable classes count together.
        method: How to predict, as the posterior names it.
        num_samples: Draws for each prediction. With few the log loss is too high, see `Posterior.predict`.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets behind each null band, at least 39.
        class_names: Names of the classes.
        title: Title of the page.
        seed: Seed of the predictions' draws and of the simulated bands.

    Raises:
        ValueError: If the loader has no targets, what only classifiers have is given for a regression, or a prediction
            is malformed.
    """
    generator = torch.Generator().manual_seed(seed)
    how: dict[str, Any] = {"method": method, "num_samples": num_samples, "generator": generator}
    first: list[Any] = []
    prediction = posterior.predict_loader(_remembering(loader, first), **how)
    if prediction.targets is None:
        raise ValueError("`loader` must give targets, got inputs only.")
    explain = getattr(posterior, "output_variance", None)
    shared: dict[str, Any] = {
        "log_prob": prediction.log_prob,
        "history": posterior.history,
        "parameter_variance": getattr(posterior, "variance", None),
        "output_variance": explain(first[0]) if explain is not None and first else None,
        "config": _settings(posterior.config) | {"method": method, "num_samples": num_samples},
        "title": title,
        "seed": seed,
    }
    if prediction.probs is None:
        only = {"ood": ood, "human": human, "recalibration": recalibration, "conformal": conformal}
        for name, given in only.items():
            if given is not None and given != {}:
                raise ValueError(f"`{name}` must be None for a posterior without class probabilities, got one.")
        for name, unused in {"ordered": ordered, "top_k": top_k, "class_names": class_names}.items():
            if unused:
                raise ValueError(
                    f"`{name}` is for class probabilities, which this posterior has none of, got {unused!r}."
                )
        return _noted(_regression(prediction, shared | {"num_simulations": num_simulations}), posterior)
    bernoulli = getattr(posterior.config, "likelihood", None) == "bernoulli"
    foreign = {name: posterior.predict_loader(other, **how) for name, other in (ood or {}).items()}
    probs, targets = class_predictions(posterior, prediction, "posterior")
    report = evaluate_predictions(
        probs,
        targets,
        uncertainty=_parts(prediction, bernoulli),
        ood={name: _foreign_probs(name, found, bernoulli) for name, found in foreign.items()},
        examples=examples,
        human=human,
        recalibration=recalibration,
        conformal=conformal,
        ordered=ordered,
        top_k=top_k,
        class_names=class_names,
        num_bins=num_bins,
        num_simulations=num_simulations,
        **shared,
    )
    return _noted(report, posterior)


def _noted(report: Report, posterior: PosteriorLike) -> Report:
    """The report with what the posterior says of itself (`notes`, sentences) among its verdicts."""
    notes = list(getattr(posterior, "notes", ()))
    return replace(report, sections=replace(report.sections, verdict=report.sections.verdict + notes))


def _remembering(loader: Any, first: list[Any]) -> Any:
    """The loader, its first batch put aside as it passes; what cannot be gone through is left to the posterior."""
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping):
        return loader
    return _passing(loader, first)


def _passing(loader: Iterable[Any], first: list[Any]) -> Iterator[Any]:
    """Yields every batch; the first one is also put into ``first``."""
    for batch in loader:
        if not first:
            first.append(batch)
        yield batch


def _regression(prediction: LoaderPrediction, shared: dict[str, Any]) -> Report:
    """The report on real values."""
    if prediction.mean is None or prediction.targets is None:
        raise ValueError("`posterior` must predict probs or a mean, got neither.")
    return evaluate_regression(
        prediction.mean, prediction.targets, variance=prediction.variance, samples=prediction.samples, **shared
    )


def class_predictions(posterior: PosteriorLike, prediction: LoaderPrediction, name: str) -> tuple[Tensor, Tensor]:
    """Class probabilities (N, C) and class indices (N,) of a posterior's predictions.

    Raises:
        ValueError: If it predicts none, or the loader had no targets.
    """
    if prediction.targets is None:
        raise ValueError("`loader` must give targets, got inputs only.")
    if prediction.probs is None:
        raise ValueError(f"`{name}` must predict class probabilities, got none.")
    if getattr(posterior.config, "likelihood", None) == "bernoulli":
        return _two_classes(prediction.probs), _labels(prediction.targets)
    return prediction.probs, prediction.targets


def _foreign_probs(name: str, prediction: LoaderPrediction, bernoulli: bool) -> Tensor:
    """Class probabilities of a foreign set."""
    if prediction.probs is None:
        raise ValueError(f"`posterior` must predict probs for ood[{name!r}] too, got none.")
    return _two_classes(prediction.probs) if bernoulli else prediction.probs


def _parts(prediction: LoaderPrediction, bernoulli: bool) -> EntropyParts | None:
    """The three entropies, where the posterior gives all of them; of Bernoulli outputs of an answer."""
    if prediction.entropy is None or prediction.aleatoric is None or prediction.epistemic is None:
        return None
    parts = (prediction.entropy, prediction.aleatoric, prediction.epistemic)
    answers = prediction.probs.shape[1] if bernoulli and prediction.probs is not None else 1  # entropies are sums
    return EntropyParts(*(part / answers for part in parts))


def _two_classes(probs: Tensor) -> Tensor:
    """Probabilities of one, (N,) or (N, m), as those of zero and one, (N·m, 2)."""
    ones = probs.flatten().double()
    return torch.stack([1 - ones, ones], dim=1)


def _labels(targets: Tensor) -> Tensor:
    """Zeros and ones of any dtype, (N,) or (N, m), as class indices (N·m,)."""
    flat = targets.flatten()
    if not ((flat == 0) | (flat == 1)).all():
        raise ValueError(f"`targets` must hold zeros and ones for Bernoulli outputs, got values up to {flat.max()}.")
    return flat.long()


def _settings(config: Any) -> dict[str, object]:
    """The fields of a dataclass, or nothing."""
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
