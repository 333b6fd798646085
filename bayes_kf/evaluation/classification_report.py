"""The report on a classifier, from its class probabilities alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation.classification.entropy import EntropyParts, entropy_parts
from bayes_kf.evaluation.flattened_predictions import flattened, of_inputs
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, column_names
from bayes_kf.evaluation.options import EvaluationOptions
from bayes_kf.evaluation.own_metrics import own_scores
from bayes_kf.evaluation.recalibration.conformal_sets import ConformalSets
from bayes_kf.evaluation.recalibration.scaling import Recalibration
from bayes_kf.evaluation.report.contents import Sections
from bayes_kf.evaluation.report.provenance import fingerprint
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.advice import advice_section
from bayes_kf.evaluation.sections.classification import class_section, entropy_section, score_section
from bayes_kf.evaluation.sections.distrust import (
    distrust_section,
    least_sure,
    missed_inputs,
    worst_section,
)
from bayes_kf.evaluation.sections.examples import example_section
from bayes_kf.evaluation.sections.groups import group_section, groups_of_inputs
from bayes_kf.evaluation.sections.human_agreement import human_section
from bayes_kf.evaluation.sections.online import stream_sections
from bayes_kf.evaluation.sections.selective import recalibration_section, usefulness_section
from bayes_kf.evaluation.sections.verdicts.calibration import calibration_card
from bayes_kf.evaluation.sections.verdicts.phrases import percent
from bayes_kf.evaluation.sections.verdicts.selective import detection_card, error_card


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
    groups: Mapping[str, Any] | None = None,
    weights: Array | None = None,
    clusters: Any = None,
    ordered: bool = False,
    top_k: Sequence[int] | None = None,
    config: Mapping[str, object] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    num_bins: int = 15,
    num_simulations: int = 1000,
    seed: int = 0,
) -> Report:
    """Report on class probabilities of any model.

    Args:
        probs: Class probabilities, (N, C), or of class 1 of two, (N,) or (N, 1). A table's columns name the classes.
            Tokens (B, T, C), pixels (B, C, H, W) and several labels (N, L) count as examples, see `flattened`.
        targets: Class indices, (N,) or (N, 1), class names, or one-hot (N, C); of the shape of tokens, pixels or
            labels, where -100 does not count.
        samples: Class probabilities of posterior draws, (S, N, C), for aleatoric and epistemic entropy.
        uncertainty: The predictive, aleatoric and epistemic entropies, each (N,), if they are known already.
        log_prob: Predictive log probability of the labels, (N,). The likelihood uses it instead of log(probs), which
            may have underflowed. Joint log probabilities of several targets are divided among them.
        ood: Name to class probabilities of out-of-distribution inputs, (M, C). They are detected by predictive entropy.
        history: Series of a stream: "log_loss", "correct" for each example, "innovation", "dof" for each update.
        parameter_variance: Name to posterior variances of each tensor.
        output_variance: Name to contribution of each tensor to the variance of the outputs.
        examples: The N examples, texts or images (see `example_section`). The report shows the most uncertain ones and
            the most confident errors.
        human: Shares of people's answers, (N, C).
        recalibration: A recalibration fitted on other examples; the report states its effect.
        conformal: Conformal sets fitted on other examples; the report states their coverage and size.
        groups: Name of a kind (source, language) to the group of each example, (N,); or a table with a column for each
            kind. The report names groups with fewer right answers or wrong probabilities, beyond chance. For tokens,
            pixels or several labels, an entry for each input.
        weights: How much each example counts, (N,), in means, calibration, detection and selective prediction.
        clusters: What each example is part of (a patient, a document), (N,): examples of one cluster may depend on each
            other, and intervals, null bands and tests allow for that. Tokens, pixels and several labels are those of
            their input, and weights and clusters (B,) are of the inputs.
        ordered: Whether the classes have an order, for the scores of such classes.
        top_k: Numbers of most probable classes that count together, each with an ECE; by default 5 if there are more
            than 10 classes.
        config: Settings to print.
        class_names: C names.
        title: Title of the page.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets for each null band, at least 39.
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
    options = EvaluationOptions(
        null=NullSettings(num_bins, num_simulations, seed),
        title=title,
        config=config or {},
        history=history,
        parameter_variance=parameter_variance,
        output_variance=output_variance,
        ood=ood or {},
        examples=examples,
        human=human,
        recalibration=recalibration,
        conformal=conformal,
        ordered=ordered,
        top_k=top_k,
        class_names=column_names(probs) if class_names is None else class_names,
        groups={} if groups is None else groups,
    )
    flat = flattened(probs, targets)
    if flat.inputs is not None:
        options.check_no_examples()
        size = len(targets)
        options = replace(options, groups=groups_of_inputs(options.groups, flat.inputs, size))
        weights, clusters = (of_inputs(given, flat.inputs, size) for given in (weights, clusters))
        if clusters is None and len(flat.inputs.unique()) > 1:
            clusters = flat.inputs
    checked = as_probs(flat.probs)
    labels = as_targets(flat.targets, checked, class_names=options.class_names)
    options = replace(options, design=SampleDesign.of(weights, clusters, len(labels)))
    options.check_design()
    parts = entropy_parts(samples) if uncertainty is None and samples is not None else uncertainty
    report = classification_report(checked, labels, options, log_prob=log_prob, uncertainty=parts)
    report.sections.lead += f" {flat.note}" if flat.note else ""
    return report


def classification_report(
    probs: Tensor,
    labels: Tensor,
    options: EvaluationOptions,
    *,
    log_prob: Array | None = None,
    uncertainty: EntropyParts | None = None,
) -> Report:
    """The report on checked class probabilities (N, C) and labels (N,); see `evaluate_predictions`."""
    sections = _sections(probs, labels, options, log_prob, uncertainty)
    return Report(
        title=options.title or "Evaluation of a classifier",
        config=options.printed_config(**asdict(options.null)),
        sections=sections,
        fingerprints={"predictions": fingerprint(probs), "targets": fingerprint(labels)},
    )


def _sections(
    probs: Tensor,
    labels: Tensor,
    options: EvaluationOptions,
    log_prob: Array | None,
    uncertainty: EntropyParts | None,
) -> Sections:
    """All sections that the options ask for, in the order of the page."""
    num_classes, null = probs.shape[1], options.null
    names, top_k = options.class_names_of(num_classes), options.top_k_of(num_classes)
    sections = score_section(
        probs,
        labels,
        log_prob,
        null,
        ordered=options.ordered,
        top_k=top_k,
        design=options.design,
        class_names=names,
    )
    sections += Sections(scores=own_scores(probs, labels, null, options.design))
    sections += entropy_section(probs, uncertainty, options.ood, options.design)
    sections += usefulness_section(probs, labels, options.design)
    sections = _assessment(sections.scores, probs, labels, names, options) + sections
    sections += recalibration_section(probs, labels, options.recalibration, options.conformal, null, options.design)
    if options.human is not None:
        sections += human_section(probs, options.human)
    sections += stream_sections(options.history, options.parameter_variance, options.output_variance)
    if len(options.groups):
        sections += group_section(probs, labels, options.groups, options.design)
    sections += class_section(probs, labels, names)
    if options.examples is not None:
        sections += example_section(probs, labels, options.examples, names)
    else:
        sections += worst_section(probs, labels, names)
    return sections


def _assessment(
    scores: dict[str, Score], probs: Tensor, labels: Tensor, names: Sequence[str], options: EvaluationOptions
) -> Sections:
    """Cards, findings and advice."""
    num_examples, num_correct = len(labels), int((probs.argmax(dim=1) == labels).sum())
    number, unit = (num_examples, "examples") if options.design is None else options.design.independent
    distrust = distrust_section(probs, labels, names, options.design)
    detected = {name: scores[f"ood_{name}_auroc"] for name in options.ood}
    cards = [
        calibration_card(scores, number, {finding.direction for finding in distrust.findings} - {0}, unit),
        error_card(scores, num_examples - num_correct, num_correct),
        detection_card(detected),
    ]
    weights = None if options.design is None else options.design.weights
    most = percent(torch.bincount(labels, weights).max().item() / num_examples)
    lead = (
        f"{percent(scores['accuracy'].value)} of {num_examples:,} answers are right; the most frequent class: {most}."
    )
    sections = Sections(lead=lead, cards=cards) + distrust
    sections.findings += [*missed_inputs(detected), *least_sure(probs, labels)]
    return sections + advice_section(
        probs, labels, names, scores, [*cards, *distrust.cards], options.calls, options.design
    )
