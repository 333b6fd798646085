"""When not to trust a classifier: confidence ranges and classes whose numbers are beyond chance.

Each family of tests (ranges, shares of classes, recall of classes, accuracy of groups, calibration of groups) holds its
own multiplicity by Holm's method at a fifth of `SIGNIFICANCE`, so that a calibrated model whose classes and groups are
equally hard has any finding in at most 5 % of data sets. Under calibration the number of hits is a sum of independent
zeros and ones with unequal probabilities, whose tails the binomial distribution of the same mean bounds (Hoeffding
1956).
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.calibration_errors import reliability_bins
from bayes_kf.evaluation.report.contents import Card, Finding, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, make_table
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import percent, quoted
from bayes_kf.evaluation.sections.verdicts.selective import detection_answer

SIGNIFICANCE = 0.05
NUM_FAMILIES = 5
NUM_RANGES = 10  # of the confidence
MOST = 5  # findings of a family that are shown
WORST = 10  # confident errors that are listed


def distrust_section(probs: Tensor, labels: Tensor, names: Sequence[str]) -> Sections:
    """Findings on confidence ranges and classes; a class that is seldom recognized has a card.

    Args:
        probs: Class probabilities, (N, C), float64.
        labels: Class indices, (N,).
        names: C names of classes.
    """
    findings = [*_ranges(probs, labels), *_shares(probs, labels, names), *_recall(probs, labels, names)]
    return Sections(findings=findings, cards=_missed(probs, labels, names))


def worst_section(probs: Tensor, labels: Tensor, names: Sequence[str]) -> Sections:
    """A table of the most confident errors."""
    confidence, predicted = probs.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    if not len(wrong):
        return Sections()
    worst = wrong[confidence[wrong].sort(descending=True, stable=True).indices[:WORST]].tolist()
    rows = [
        (k, names[int(predicted[k])], confidence[k].item(), names[int(labels[k])], probs[k, labels[k]].item())
        for k in worst
    ]
    header = ("Example", "Predicted", "with probability", "Label", "with probability ")
    return Sections(
        tables=[make_table(f"The {len(worst)} most confident errors of {len(wrong):,}", header, rows, is_open=True)]
    )


def _percent_cell(share: float) -> Cell:
    return Cell(percent(share) if share >= 0.001 else "< 0.1 %", share)


def is_beyond_chance(p_values: np.ndarray) -> np.ndarray:
    """Which hypotheses of a family are rejected, by Holm's method; NaN counts as no test.

    Example:
        >>> is_beyond_chance(np.array([0.001, 0.5, 0.004, float("nan")])).tolist()
        [True, False, True, False]
    """
    rejected = np.zeros(len(p_values), dtype=bool)
    known = np.flatnonzero(~np.isnan(p_values))
    for rank, place in enumerate(known[np.argsort(p_values[known], kind="stable")]):
        if p_values[place] > SIGNIFICANCE / NUM_FAMILIES / (len(known) - rank):
            break
        rejected[place] = True
    return rejected


def two_sided(hits: np.ndarray, counts: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """p-values of binomial counts at least as far from their mean in either direction; NaN for a count of zero."""
    below = scipy.stats.binom.cdf(hits, counts, rates)
    above = scipy.stats.binom.sf(hits - 1, counts, rates)
    return np.where(counts > 0, np.minimum(1.0, 2 * np.minimum(below, above)), np.nan)


def missed_inputs(detected: Mapping[str, Score]) -> list[Finding]:
    """Out-of-distribution sets that are not detected; name of each set to its AUROC."""
    return [
        Finding(f"“{name}”", f"it is less sure of them than of usual inputs {percent(auroc.value)} of the time only")
        for name, auroc in detected.items()
        if detection_answer(auroc) == "no"
    ]


def least_sure(probs: Tensor, labels: Tensor) -> list[Finding]:
    """The share of errors among the least confident fifth, if there are errors and half of all of them are there."""
    confidence, predicted = probs.max(dim=1)
    wrong = (predicted != labels).double()
    edge = confidence.sort().values[len(confidence) // 5]
    chosen = confidence < edge
    if not bool(chosen.any()) or wrong[chosen].mean() < 1.5 * wrong.mean() or not wrong.sum():
        return []
    rate, all_rate = percent(wrong[chosen].mean().item()), percent(wrong.mean().item())
    return [
        Finding(
            f"Below a confidence of {percent(edge.item())}",
            f"{rate} of these {int(chosen.sum()):,} answers are wrong, of all {all_rate}",
        )
    ]


def _ranges(probs: Tensor, labels: Tensor) -> list[Finding]:
    """Ranges of confidence in which more or fewer are right than it says; neighbours with one direction are joined."""
    bins = reliability_bins(probs, labels, NUM_RANGES)
    counts, confidence, accuracy = (values.nan_to_num().numpy() for values in bins[1:])
    sure, right = counts * confidence, np.rint(counts * accuracy)
    rejected = is_beyond_chance(two_sided(right, counts, np.clip(confidence, 0, 1)))
    findings = []
    for sign, own in sorted(neighbours(np.sign(sure - right) * rejected), reverse=True):
        number, said, hits = (values[own].sum() for values in (counts, sure, right))
        low, high = (f"{100 * bins.edges[end].item():.0f} %" for end in (own[0], own[-1] + 1))
        findings.append(
            Finding(
                f"{'Too sure' if sign > 0 else 'Right more often than it says'} at {low} to {high}",
                f"{percent(hits / number)} of {number:,.0f} such answers are right, on average it says "
                f"{percent(said / number)}",
                direction=sign,
            )
        )
    return findings


def neighbours(signs: np.ndarray) -> list[tuple[int, list[int]]]:
    """Runs of equal signs with their places; zeros are left out.

    Example:
        >>> neighbours(np.array([0, 1, 1, -1, 0, 1]))
        [(1, [1, 2]), (-1, [3]), (1, [5])]
    """
    runs = itertools.groupby(range(len(signs)), key=lambda place: int(signs[place]))
    return [(sign, list(places)) for sign, places in runs if sign]


def _shares(probs: Tensor, labels: Tensor, names: Sequence[str]) -> list[Finding]:
    """Classes to which more or less probability goes than examples are of them."""
    counts = torch.bincount(labels, minlength=probs.shape[1]).numpy()
    given = probs.mean(dim=0).numpy()
    total = np.full(len(counts), len(labels))
    findings = []
    for place in _chosen(two_sided(counts, total, np.clip(given, 0, 1))):
        word = "Too much" if given[place] > counts[place] / len(labels) else "Too little"
        findings.append(
            Finding(
                f"{word} probability for {quoted(names[place])}",
                f"{percent(given[place])} on average, but {percent(counts[place] / len(labels))} of the examples are "
                "of this class",
            )
        )
    return findings


def _recall(probs: Tensor, labels: Tensor, names: Sequence[str]) -> list[Finding]:
    """Classes of which fewer are recognized than of all."""
    counts, hits = class_hits(probs, labels)
    accuracy = hits.sum() / counts.sum()
    return [
        Finding(
            f"Errors on {quoted(names[place])}",
            f"{percent(hits[place] / counts[place])} of {counts[place]:,} are recognized, of all {percent(accuracy)}",
        )
        for place in hard_classes(probs, labels)[:MOST]
    ]


def _missed(probs: Tensor, labels: Tensor, names: Sequence[str]) -> list[Card]:
    """The class that is recognized least, if less than half as often as examples on the whole."""
    hard = hard_classes(probs, labels)
    if not hard:
        return []
    counts, hits = class_hits(probs, labels)
    least = min(hard, key=lambda place: hits[place] / counts[place])
    recall, accuracy = hits[least] / counts[least], hits.sum() / counts.sum()
    if recall >= accuracy / 2:
        return []
    name = quoted(names[least])
    headline = f"It seldom recognizes {name}: {percent(recall)} of {counts[least]:,}."
    reason = f"{percent(recall)} of {counts[least]:,} examples of {name} are recognized, of all {percent(accuracy)}."
    return [Card("classes", "Does it recognize every class?", "no", reason, headline)]


def hard_classes(probs: Tensor, labels: Tensor) -> list[int]:
    """Classes that are recognized less often than examples on the whole, beyond chance, the clearest first."""
    counts, hits = class_hits(probs, labels)
    p_values = np.where(counts > 0, scipy.stats.binom.cdf(hits, counts, hits.sum() / counts.sum()), np.nan)
    return beyond_chance_first(p_values)


def class_hits(probs: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Examples of each class, and how many of them are recognized, (C,) each."""
    right = labels[probs.argmax(dim=1) == labels]
    counts, hits = (torch.bincount(chosen, minlength=probs.shape[1]).numpy() for chosen in (labels, right))
    return counts, hits


def _chosen(p_values: np.ndarray) -> list[int]:
    """The clearest of the rejected hypotheses."""
    return beyond_chance_first(p_values)[:MOST]


def beyond_chance_first(p_values: np.ndarray) -> list[int]:
    """All rejected hypotheses, the clearest first."""
    rejected = np.flatnonzero(is_beyond_chance(p_values))
    ordered: list[int] = rejected[np.argsort(p_values[rejected], kind="stable")].tolist()
    return ordered
