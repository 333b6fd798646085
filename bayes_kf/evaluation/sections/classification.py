"""Sections of a report on a classifier: accuracy and calibration, entropies, classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import exact_profile, top_confidence
from bayes_kf.evaluation.calibration.designed_scores import (
    designed_bins,
    designed_scores,
    designed_spiegelhalter,
)
from bayes_kf.evaluation.calibration.intervals import bounded_interval, loss_interval, runner_up_losses
from bayes_kf.evaluation.calibration.null_distribution import BinsWithBands, bins_with_bands, classwise_tests
from bayes_kf.evaluation.calibration.score_summary import LEVEL, PRIMARY, calibration_scores
from bayes_kf.evaluation.calibration.spiegelhalter import spiegelhalter_test
from bayes_kf.evaluation.classification.entropy import EntropyParts, entropy, margin
from bayes_kf.evaluation.classification.ood_detection import (
    designed_detection,
    detection_intervals,
    detection_scores,
    ood_scores,
)
from bayes_kf.evaluation.classification.scores import (
    brier_decomposition,
    brier_part_scores,
    brier_scores,
    kappa_of,
    log_losses,
    ordinal_errors,
    ranked_probability_scores,
)
from bayes_kf.evaluation.inputs import Array, as_probs, as_vector
from bayes_kf.evaluation.plots.reliability import draw_bins, draw_reliability, ece_text, entropy_curves, is_outside
from bayes_kf.evaluation.report.contents import DataPart, FigureSpec, Sections
from bayes_kf.evaluation.report.sortable_tables import CellContent, Table, make_table, range_cell
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.verdicts.calibration import calibration_verdict, confidence_verdict, loss_verdict
from bayes_kf.evaluation.sections.verdicts.phrases import null_band_of, quoted
from bayes_kf.evaluation.sections.verdicts.selective import detection_verdict

DIAGRAM_BINS = 10  # of confidence, as in the findings
MAX_CLASS_ROWS = 1_000  # of the table of classes
MAX_CLASS_PARTS, FEWEST_PREDICTIONS = 20, 10  # classes that the reliability diagram shows apart
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def score_section(
    probs: Tensor,
    labels: Tensor,
    log_prob: Array | None,
    settings: NullSettings,
    *,
    ordered: bool = False,
    top_k: Sequence[int] = (),
    design: SampleDesign | None = None,
    class_names: Sequence[str] = (),
) -> Sections:
    """Accuracy, likelihood and calibration, with the reliability diagram: with class names for each class too."""
    scores = mean_scores(probs, labels, log_prob, settings.num_bins, ordered, design)
    scores |= _calibration_scores(probs, labels, settings, top_k, design)
    shown, error = replace(settings, num_bins=DIAGRAM_BINS), scores[PRIMARY]
    bins = _bins(probs, labels, shown, design)
    caption = f"calibration error {error.value:.3f}, chance alone explains up to {null_band_of(error).high:.3f}"
    counted = (len(labels), "target") if design is None or not design.is_clustered else (design.num_clusters, "cluster")
    verdict = [calibration_verdict(scores, *counted), confidence_verdict(scores), loss_verdict(scores)]
    diagram = FigureSpec(
        title="Reliability diagram",
        alt=f"Accuracy against confidence in {DIAGRAM_BINS} bins. {ece_text(scores['ece'])}.",
        draw=lambda ax: draw_reliability(bins, caption, ax),
        height=5.2,
        table=_bin_table(bins),
        parts=_class_parts(probs, labels, shown, class_names) if design is None else (),
    )
    return Sections(
        scores=scores,
        tested=[PRIMARY],
        verdict=[sentence for sentence in verdict if sentence],
        sizes={"examples": len(labels), "classes": probs.shape[1]},
        drawings={"reliability": diagram},
    )


def entropy_section(
    probs: Tensor, parts: EntropyParts | None, ood: Mapping[str, Array], design: SampleDesign | None = None
) -> Sections:
    """Entropies, and the detection of each out-of-distribution set by predictive entropy."""
    id_entropy = entropy(probs)
    ood_entropies = {name: entropy(as_probs(values, f"ood[{name!r}]")) for name, values in ood.items()}
    columns = {"entropy": id_entropy, "margin": margin(probs)}
    if parts is not None:
        for name, values in zip(("entropy", "aleatoric", "epistemic"), parts, strict=True):
            columns[name] = as_vector(values, f"uncertainty.{name}")
    scores: dict[str, Score] = {}
    for name, values in columns.items():
        own = design if len(values) == len(probs) else None  # the entropies of several outputs are means over them
        scores[name] = mean_score(values, 1.0 if name == "margin" else math.log(probs.shape[1]), own)
    level = 1 - (1 - LEVEL) / max(1, len(ood))  # Bonferroni: the intervals of all sets hold together
    weights = None if design is None else design.weights
    for name, values in ood_entropies.items():
        intervals = detection_intervals(id_entropy, values, level=level)
        if design is not None:
            intervals = designed_detection(id_entropy, values, level, design)
        scores |= detection_scores(f"ood_{name}", ood_scores(id_entropy, values, weights_id=weights), intervals)
    groups = {"in-distribution": id_entropy, **ood_entropies}
    table = _entropy_table(groups, weights)
    means = ", ".join(f"{row[2].value:.3f} for {quoted(name)}" for name, row in zip(groups, table.rows, strict=True))
    curves = FigureSpec(
        title="Predictive entropy",
        alt=f"Cumulative curves of predictive entropy. The mean entropies in nats are {means} inputs.",
        draw=lambda ax: entropy_curves(id_entropy, ood_entropies, weights_id=weights, ax=ax),
        table=table,
    )
    return Sections(
        scores=scores,
        verdict=[detection_verdict(name, scores[f"ood_{name}_auroc"]) for name in ood],
        sizes={f"foreign examples, {name}": len(values) for name, values in ood_entropies.items()},
        drawings={"entropy": curves},
    )


def class_section(probs: Tensor, labels: Tensor, class_names: Sequence[str]) -> Sections:
    """A table with the numbers of each class."""
    return Sections(tables=[_class_table(probs, labels, class_names)])


def mean_scores(
    probs: Tensor,
    labels: Tensor,
    log_prob: Array | None,
    num_bins: int,
    ordered: bool,
    design: SampleDesign | None = None,
) -> dict[str, Score]:
    """Means of per-example scores with their intervals, and the parts of the Brier score."""
    confidence, hits = top_confidence(probs, labels, 1)
    scores = {"accuracy": mean_score(hits, 1.0, design), "nll": _nll(probs, labels, log_prob, design)}
    scores["brier"] = mean_score(brier_scores(probs, labels), 2.0, design)
    if design is None:
        scores |= brier_part_scores(brier_decomposition(probs, labels, num_bins))
    if ordered:
        scores["rps"] = mean_score(ranked_probability_scores(probs, labels), probs.shape[1] - 1.0, design)
        errors = ordinal_errors(probs, labels)
        scores["ordinal_error"] = Score(errors.mean().item() if design is None else design.mean(errors))
        if design is None:
            scores["weighted_kappa"] = Score(kappa_of(probs.argmax(dim=1), labels))
    return scores | {"confidence": mean_score(confidence, 1.0, design)}


def mean_score(values: Tensor, maximum: float, design: SampleDesign | None = None) -> Score:
    """Mean of values between zero and `maximum`, with its interval."""
    if design is not None:
        count, total, squares, _ = design.equivalent(values)
        return Score(total / count, bounded_interval(total, squares, count, 0.0, maximum, LEVEL))
    total, squares = values.sum().item(), values.square().sum().item()
    return Score(values.mean().item(), bounded_interval(total, squares, len(values), 0.0, maximum, LEVEL))


def loss_interval_of(losses: Tensor, probs: Tensor, share: float = 1.0) -> Interval | None:
    """Interval of `share` times the mean of log losses; None if no interval is known to cover it."""
    if losses.min() < 0:  # losses of densities
        return None
    first, second, third = (losses.pow(k).sum().item() for k in (1, 2, 3))
    interval = loss_interval(first, second, third, len(losses), runner_up_losses(probs).mean().item(), LEVEL)
    return None if interval is None else Interval(share * interval.low, share * interval.high)


def mean_loss(losses: Tensor, probs: Tensor, design: SampleDesign | None) -> Score:
    """Mean log loss with its interval."""
    if design is None:
        return Score(losses.mean().item(), loss_interval_of(losses, probs))
    return _designed_nll(losses, probs, design)


def _designed_nll(losses: Tensor, probs: Tensor, design: SampleDesign) -> Score:
    """Mean log loss with weights and clusters."""
    if not bool(losses.isfinite().all()):
        return Score(design.mean(losses))
    count, total, squares, cubes = design.equivalent(losses)
    interval = None
    if losses.min() >= 0:
        interval = loss_interval(total, squares, cubes, count, design.mean(runner_up_losses(probs)), LEVEL)
    return Score(total / count, interval)


def _nll(probs: Tensor, labels: Tensor, log_prob: Array | None, design: SampleDesign | None = None) -> Score:
    """Negative log-likelihood for each label."""
    losses = log_losses(probs, labels) if log_prob is None else -as_vector(log_prob, "log_prob", allow_infinite=True)
    if len(losses) > len(labels):
        raise ValueError(f"`log_prob` must have at most {len(labels)} values, one a target, got {len(losses)}.")
    share = len(losses) / len(labels)  # a log probability may be the joint one of several targets
    if design is not None and len(labels) % len(losses) == 0:
        each = len(labels) // len(losses)
        joint = SampleDesign(design.weights.view(-1, each).mean(dim=1), design.clusters[::each], design.is_clustered)
        return _designed_nll(share * losses, probs.view(-1, each, probs.shape[1])[:, 0], joint)
    return Score(share * losses.mean().item(), loss_interval_of(losses, probs, share))


def _calibration_scores(
    probs: Tensor, labels: Tensor, settings: NullSettings, top_k: Sequence[int], design: SampleDesign | None
) -> dict[str, Score]:
    """Every calibration score with its null band or p-value; with weights or clusters no classwise error."""
    scores: dict[str, Score] = {}
    if design is not None:
        for k in (1, *top_k):
            scores |= designed_scores(probs, labels, k, settings, design)
        return scores | {"spiegelhalter": designed_spiegelhalter(probs, labels, design)}
    for k in (1, *top_k):
        scores |= calibration_scores(exact_profile(*top_confidence(probs, labels, k)), k, settings)
    scores["ece_classwise"] = classwise_tests(probs, labels, ("ece",), settings, "equal_width", LEVEL)[0].score()
    statistic, p_value = spiegelhalter_test(probs, labels)
    return scores | {"spiegelhalter": Score(statistic, p_value=p_value)}


def _bins(probs: Tensor, labels: Tensor, settings: NullSettings, design: SampleDesign | None) -> BinsWithBands:
    """The bins of the reliability diagram."""
    if design is not None:
        return designed_bins(probs, labels, settings, design)
    return bins_with_bands(probs, labels, **asdict(settings))


def _class_parts(
    probs: Tensor, labels: Tensor, settings: NullSettings, class_names: Sequence[str]
) -> tuple[DataPart, ...]:
    """The reliability of the predictions of each class; of many classes, of those that are predicted most often."""
    if not class_names:
        return ()
    predicted = probs.argmax(dim=1)
    counts = torch.bincount(predicted, minlength=probs.shape[1])
    most = counts.argsort(descending=True, stable=True)[:MAX_CLASS_PARTS]
    parts = []
    for number in sorted(most[counts[most] >= FEWEST_PREDICTIONS].tolist()):
        of_class = predicted == number
        bins = bins_with_bands(probs[of_class], labels[of_class], **asdict(settings))
        outside = int(is_outside(bins).sum())
        note = f"{int(counts[number]):,} of them; {outside} of {len(bins.counts)} points outside (legend: of all)"
        parts.append(DataPart(f"predictions of {quoted(class_names[number])}", note, partial(draw_bins, bins)))
    return tuple(parts)


def _bin_table(bins: BinsWithBands) -> Table:
    """The bins of the reliability diagram that are not empty."""
    columns = (bins.edges, bins.counts, bins.confidence, bins.accuracy, bins.low, bins.high)
    rows: list[tuple[CellContent, ...]] = [
        (range_cell(*edges, decimals=3), int(count), said, right, range_cell(low, high, decimals=4))
        for edges, count, said, right, low, high in zip(*(column.tolist() for column in columns), strict=True)
    ]
    header = ("Confidence between", "Count", "Mean confidence", "Accuracy", "Null band")
    return make_table("Reliability, bin by bin", header, rows)


def _entropy_table(groups: Mapping[str, Tensor], weights: Tensor | None) -> Table:
    """Mean and quantiles of each group's entropies; weights are those of the first group."""
    levels, rows = torch.tensor(QUANTILES, dtype=torch.float64), list[tuple[float | str, ...]]()
    for name, values in groups.items():
        own = weights if not rows else None
        mean = values.mean() if own is None else (own * values).sum() / own.sum()
        rows.append((name, len(values), mean.item(), *_quantiles(values, levels, own).tolist()))
    header = ("Inputs", "Number", "Mean", *(f"{q:.0%} quantile" for q in QUANTILES))
    return make_table("Predictive entropy in nats", header, rows)


def _quantiles(values: Tensor, levels: Tensor, weights: Tensor | None) -> Tensor:
    """Quantiles of any number of values, by weight; `torch.quantile` takes at most 16 million."""
    ordered, order = values.sort()
    if weights is None:
        return ordered[(levels * (len(ordered) - 1)).round().long()]
    shares = weights[order].cumsum(0)
    return ordered[torch.searchsorted(shares, levels * shares[-1]).clamp(max=len(ordered) - 1)]


def _class_table(probs: Tensor, labels: Tensor, class_names: Sequence[str]) -> Table:
    """Frequency, recall and mean probability of each class; of very many, of those that are most miscalibrated."""
    num_classes = probs.shape[1]
    correct = labels[probs.argmax(dim=1) == labels]
    counts, hits = (torch.bincount(chosen, minlength=num_classes) for chosen in (labels, correct))
    recall = hits / counts  # NaN for a class without examples
    frequency, mean_prob = counts / len(labels), probs.mean(dim=0)
    shown, caption = list(range(num_classes)), "Class by class"
    if num_classes > MAX_CLASS_ROWS:
        largest = (frequency - mean_prob).abs().argsort(descending=True, stable=True)
        shown = sorted(largest[:MAX_CLASS_ROWS].tolist())
        caption = f"Class by class: {MAX_CLASS_ROWS:,} of {num_classes:,}, whose share and mean probability differ most"
    rows = [(class_names[c], int(counts[c]), recall[c].item(), frequency[c].item(), mean_prob[c].item()) for c in shown]
    return make_table(caption, ("Class", "Examples", "Recall", "Share of examples", "Mean probability"), rows)
