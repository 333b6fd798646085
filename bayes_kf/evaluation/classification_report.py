"""The report on a classifier, from its probabilities alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bayes_kf.evaluation.classification.entropy import EntropyParts, entropy_parts
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.recalibration.conformal_sets import ConformalSets
from bayes_kf.evaluation.recalibration.scaling import Recalibration
from bayes_kf.evaluation.report.html_page import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import NullSettings, check_simulation
from bayes_kf.evaluation.sections.classification import LEVEL, class_section, entropy_section, score_section
from bayes_kf.evaluation.sections.examples import example_section
from bayes_kf.evaluation.sections.human_agreement import human_section
from bayes_kf.evaluation.sections.online import stream_sections
from bayes_kf.evaluation.sections.selective import recalibration_section, usefulness_section


def evaluate_predictions(
    probs: Array,
    targets: Array,
    *,
    samples: Array | None = None,
    uncertainty: EntropyParts | None = None,
    log_prob: Array | None = None,
    ood: Mapping[str, Array] | None = None,
    history: Mapping[str, Array] | None = None,
    parameter_variance: Mapping[str, Array] | None = None,
    output_variance: Mapping[str, float] | None = None,
    examples: Any = None,
    human: Array | None = None,
    recalibration: Recalibration | None = None,
    conformal: ConformalSets | None = None,
    ordered: bool = False,
    top_k: Sequence[int] | None = None,
    config: Mapping[str, object] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    num_bins: int = 15,
    num_simulations: int = 1000,
    seed: int = 0,
) -> Report:
    """Report on class probabilities, wherever they come from.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        samples: Class probabilities of posterior draws, (S, N, C), for aleatoric and epistemic entropy.
        uncertainty: The same three entropies, each (N,), where they are known already.
        log_prob: Predictive log probability of the labels, (N,): used for the likelihood in place of log(probs), which
            may have underflowed. Joint log probabilities of several targets are divided among them.
        ood: Name to class probabilities of foreign inputs, (M, C); predictive entropy is the detector.
        history: Series of the stream: "log_loss", "correct" for each example, "innovation", "dof" for each update.
        parameter_variance: Name to posterior variances of each tensor.
        output_variance: Name to what each tensor contributes to the variance of the outputs.
        examples: The N examples themselves, texts or images (see `example_section`): the most uncertain and the most
            wrong are shown.
        human: Shares of people who gave each label, (N, C).
        recalibration: A recalibration fitted on other examples; the report says what it would change.
        conformal: Conformal sets fitted on other examples; the report gives their coverage and size here.
        ordered: Whether the classes have an order, for the ranked probability score.
        top_k: How many of the most probable classes count together, each an ECE of its own; by default 5 where there
            are more than 10 classes.
        config: Settings to print.
        class_names: C names.
        title: Title of the page.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets behind each band of chance, at least 39.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> report = evaluate_predictions(probs, torch.tensor([0, 1, 1]))
        >>> round(report.scores["accuracy"], 3), report.scores["ece_null_high"] > 0.3
        (0.667, True)
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    check_positive_int(num_bins, "num_bins")
    check_simulation(num_simulations, LEVEL)
    names = _class_names(class_names, checked.shape[1])
    parts = entropy_parts(samples) if uncertainty is None and samples is not None else uncertainty
    chance = NullSettings(num_bins, num_simulations, seed)
    sections = (
        score_section(checked, labels, log_prob, chance, ordered=ordered, top_k=_top_k(top_k, checked.shape[1]))
        + entropy_section(checked, parts, ood or {}, chance)
        + usefulness_section(checked, labels)
    )
    if recalibration is not None or conformal is not None:
        sections += recalibration_section(checked, labels, recalibration, conformal, chance)
    if human is not None:
        sections += human_section(checked, human)
    sections += stream_sections(history, parameter_variance, output_variance) + class_section(checked, labels, names)
    if examples is not None:
        sections += example_section(checked, labels, examples, names)
    settings = {**(config or {}), **asdict(chance)}
    return Report(
        title=title or "Evaluation of a classifier",
        config={name: str(value) for name, value in settings.items()},
        sections=sections,
        fingerprints={"predictions": fingerprint(checked), "targets": fingerprint(labels)},
    )


def _top_k(top_k: Sequence[int] | None, num_classes: int) -> Sequence[int]:
    """The numbers of classes asked for, or 5 of more than 10."""
    if top_k is None:
        return (5,) if num_classes > 10 else ()
    for k in top_k:
        if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= num_classes:
            raise ValueError(f"`top_k` must hold integers from 2 to the number of classes, {num_classes}, got {k!r}.")
    return top_k


def _class_names(class_names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """The names, or numbers."""
    if class_names is None:
        return [str(c) for c in range(num_classes)]
    if len(class_names) != num_classes:
        raise ValueError(f"`class_names` must hold {num_classes} names, got {len(class_names)}.")
    return [str(name) for name in class_names]
