"""The parts of a report on a classifier."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import exact_profile, top_confidence
from bayes_kf.evaluation.calibration.errors import reliability_bins
from bayes_kf.evaluation.calibration.intervals import bounded_interval, loss_interval, runner_up_losses
from bayes_kf.evaluation.calibration.null_distribution import classwise_tests, reliability_band
from bayes_kf.evaluation.calibration.spiegelhalter import spiegelhalter_test
from bayes_kf.evaluation.classification.entropy import EntropyParts, entropy, margin
from bayes_kf.evaluation.classification.ood_detection import detection_intervals, detection_scores, ood_scores
from bayes_kf.evaluation.classification.score_summary import LEVEL, brier_part_scores, calibration_scores
from bayes_kf.evaluation.classification.scores import (
    brier_decomposition,
    brier_scores,
    log_losses,
    ranked_probability_scores,
)
from bayes_kf.evaluation.inputs import Array, as_probs, as_vector
from bayes_kf.evaluation.plots.reliability import ece_text, entropy_histogram, reliability_diagram
from bayes_kf.evaluation.report.html_page import table_text
from bayes_kf.evaluation.report.report import FigureSpec, Sections, Table
from bayes_kf.evaluation.resampling.null_test import NullComparison, NullSettings
from bayes_kf.evaluation.score import Interval, Score, flatten_scores
from bayes_kf.evaluation.sections.verdicts import (
    calibration_verdict,
    confidence_verdict,
    detection_verdict,
    loss_verdict,
    quoted,
)

MOST_CLASSES = 1_000  # rows of the table of classes
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def score_section(
    probs: Tensor,
    labels: Tensor,
    log_prob: Array | None,
    chance: NullSettings,
    *,
    ordered: bool = False,
    top_k: Sequence[int] = (),
) -> Sections:
    """Accuracy, likelihood and calibration, with the reliability diagram."""
    scores = _mean_scores(probs, labels, log_prob, chance, ordered) | _calibration_scores(probs, labels, chance, top_k)
    verdict = [calibration_verdict(scores, len(labels)), confidence_verdict(scores), loss_verdict(scores)]
    ece = NullComparison(
        *(scores[f"ece{suffix}"] for suffix in ("", "_null_mean", "_null_low", "_null_high", "_p_value"))
    )
    diagram = FigureSpec(
        title="Reliability diagram",
        alt=f"Accuracy against confidence in {chance.num_bins} bins. {ece_text(ece)}. ",
        draw=lambda ax: reliability_diagram(probs, labels, **asdict(chance), ax=ax),
        height=4.8,
        table=_bin_table(probs, labels, chance),
    )
    return Sections(
        scores=scores,
        verdict=[sentence for sentence in verdict if sentence],
        sizes={"examples": len(labels), "classes": probs.shape[1]},
        drawings={"reliability": diagram},
    )


def entropy_section(
    probs: Tensor, parts: EntropyParts | None, ood: Mapping[str, Array], chance: NullSettings
) -> Sections:
    """Entropies, and the detection of each foreign set by predictive entropy."""
    known = entropy(probs)
    foreign = {name: entropy(as_probs(values, f"ood[{name!r}]")) for name, values in ood.items()}
    columns = {"entropy": known, "margin": margin(probs)}
    if parts is not None:
        for name, values in zip(("entropy", "aleatoric", "epistemic"), parts, strict=True):
            columns[name] = as_vector(values, f"uncertainty.{name}")
    scores: dict[str, float] = {}
    for name, values in columns.items():
        most = 1.0 if name == "margin" else math.log(probs.shape[1])
        scores |= Score(values.mean().item(), bounded(values, most)).flat(name)
    found = {name: ood_scores(known, values) for name, values in foreign.items()}
    level = 1 - (1 - LEVEL) / max(1, len(found))  # a sentence each: all intervals hold together
    for name, measures in found.items():
        intervals = detection_intervals(known, foreign[name], level=level)
        scores |= flatten_scores(detection_scores(f"ood_{name}", measures, intervals))
    means = {"known": known, **foreign}
    words = ", ".join(f"{values.mean():.3f} for {quoted(name)} inputs" for name, values in means.items())
    histogram = FigureSpec(
        title="Predictive entropy",
        alt=f"Histograms of predictive entropy; the means are {words}, in nats.",
        draw=lambda ax: entropy_histogram(known, foreign, ax=ax),
        table=_entropy_table(means),
    )
    return Sections(
        scores=scores,
        verdict=[
            detection_verdict(name, *(scores[f"ood_{name}_auroc{suffix}"] for suffix in ("", "_low", "_high")))
            for name in foreign
        ],
        sizes={f"foreign examples, {name}": len(values) for name, values in foreign.items()},
        drawings={"entropy": histogram},
    )


def class_section(probs: Tensor, labels: Tensor, class_names: Sequence[str]) -> Sections:
    """The numbers of each class."""
    return Sections(tables=[_class_table(probs, labels, class_names)])


def _mean_scores(
    probs: Tensor, labels: Tensor, log_prob: Array | None, chance: NullSettings, ordered: bool
) -> dict[str, float]:
    """Means of per-example scores with their intervals, and the parts of the Brier score."""
    confidence, hit = top_confidence(probs, labels, 1)
    columns = {"accuracy": (hit, 1.0), "brier": (brier_scores(probs, labels), 2.0), "confidence": (confidence, 1.0)}
    if ordered:
        columns["rps"] = (ranked_probability_scores(probs, labels), probs.shape[1] - 1.0)
    losses = log_losses(probs, labels) if log_prob is None else -as_vector(log_prob, "log_prob", allow_infinite=True)
    if len(losses) > len(labels):
        raise ValueError(f"`log_prob` must have at most {len(labels)} values, one a target, got {len(losses)}.")
    share = len(losses) / len(labels)  # log probabilities may be joint ones of several targets
    scores = {name: Score(v.mean().item(), bounded(v, most)) for name, (v, most) in columns.items()}
    scores["nll"] = Score(share * losses.mean().item(), of_losses(losses, probs, share))
    scores |= brier_part_scores(brier_decomposition(probs, labels, chance.num_bins))
    last = [name for name in ("rps", "confidence") if name in scores]
    order = ["accuracy", "nll", *(name for name in scores if name.startswith("brier")), *last]
    return flatten_scores({name: scores[name] for name in order})


def bounded(values: Tensor, most: float) -> Interval:
    """Interval of the mean of values between zero and `most`."""
    return bounded_interval(values.sum().item(), values.square().sum().item(), len(values), 0.0, most, LEVEL)


def of_losses(losses: Tensor, probs: Tensor, share: float = 1.0) -> Interval | None:
    """Interval of `share` times the mean of log losses; None where there is none that covers."""
    if losses.min() < 0:  # densities
        return None
    first, second, third = (losses.pow(k).sum().item() for k in (1, 2, 3))
    found = loss_interval(first, second, third, len(losses), runner_up_losses(probs).mean().item(), LEVEL)
    return None if found is None else Interval(share * found.low, share * found.high)


def _calibration_scores(probs: Tensor, labels: Tensor, chance: NullSettings, top_k: Sequence[int]) -> dict[str, float]:
    """Every calibration score beside what chance alone would show."""
    scores: dict[str, Score] = {}
    for k in (1, *top_k):
        scores |= calibration_scores(exact_profile(*top_confidence(probs, labels, k)), k, chance)
    scores["ece_classwise"] = classwise_tests(probs, labels, ("ece",), chance, "equal_width", LEVEL)[0].score()
    test = spiegelhalter_test(probs, labels)
    scores["spiegelhalter"] = Score(test.statistic, p_value=test.p_value)
    return flatten_scores(scores)


def _bin_table(probs: Tensor, labels: Tensor, chance: NullSettings) -> Table:
    """Bins that are not empty."""
    bins = reliability_bins(probs, labels, chance.num_bins)
    low, high = reliability_band(probs, **asdict(chance))
    rows = [
        table_text(
            (
                f"{bins.edges[b]:.3f} to {bins.edges[b + 1]:.3f}",
                int(bins.counts[b]),
                bins.confidence[b].item(),
                bins.accuracy[b].item(),
                f"{low[b]:.4f} to {high[b]:.4f}",
            )
        )
        for b in bins.counts.nonzero().flatten().tolist()
    ]
    header = ("Confidence between", "Count", "Mean confidence", "Accuracy", "Chance alone")
    return Table("Reliability, bin by bin", header, tuple(rows))


def _entropy_table(groups: Mapping[str, Tensor]) -> Table:
    """Quantiles of each group's entropies."""
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    rows = [
        table_text((name, len(values), values.mean().item(), *_quantiles(values, at).tolist()))
        for name, values in groups.items()
    ]
    header = ("Inputs", "Number", "Mean", *(f"{q:.0%} below" for q in QUANTILES))
    return Table("Predictive entropy in nats", header, tuple(rows))


def _quantiles(values: Tensor, at: Tensor) -> Tensor:
    """Quantiles of any number of values; torch's own stop at sixteen millions."""
    ordered = values.sort().values
    return ordered[(at * (len(ordered) - 1)).round().long()]


def _class_table(probs: Tensor, labels: Tensor, class_names: Sequence[str]) -> Table:
    """How often each class came, was expected, and was found; of very many, those with the widest gap between them."""
    num_classes = probs.shape[1]
    right = labels[probs.argmax(dim=1) == labels]
    came, found = (torch.bincount(chosen, minlength=num_classes) for chosen in (labels, right))
    recall = found / came  # NaN for a class that never came
    frequency, expected = came / len(labels), probs.mean(dim=0)
    shown, caption = list(range(num_classes)), "Class by class"
    if num_classes > MOST_CLASSES:
        shown = sorted((frequency - expected).abs().argsort(descending=True, stable=True)[:MOST_CLASSES].tolist())
        caption = f"Class by class: {MOST_CLASSES:,} of {num_classes:,}, whose share and mean probability differ most"
    rows = [
        table_text((class_names[c], int(came[c]), recall[c].item(), frequency[c].item(), expected[c].item()))
        for c in shown
    ]
    header = ("Class", "Examples", "Recall", "Share of examples", "Mean probability")
    return Table(caption, header, tuple(rows))
