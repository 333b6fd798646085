"""When not to trust a classifier: confidence ranges and classes whose numbers are beyond chance.

Each family of tests (ranges, shares of classes, recall of classes, accuracy of groups, calibration of groups) holds its
own multiplicity by Holm's method at a fifth of `SIGNIFICANCE`, so that a calibrated model whose classes and groups are
equally hard has any finding in at most 5 % of data sets. Under calibration the number of hits is a sum of independent
zeros and ones with unequal probabilities, whose tails the binomial distribution of the same mean bounds (Hoeffding
1956). With weights or clusters, Student's t over the clusters' sums takes its place.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.report.contents import Card, Finding, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, make_table
from bayes_kf.evaluation.resampling.binning import EDGE_TOLERANCE, bin_index, equal_width_edges
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import percent, quoted
from bayes_kf.evaluation.sections.verdicts.selective import detection_answer

SIGNIFICANCE = 0.05
NUM_FAMILIES = 5
NUM_RANGES = 10  # of the confidence
MOST = 5  # findings of a family that are shown
WORST = 10  # confident errors that are listed
NEARLY_ALL, MANY_RANGES = 0.8, 4  # share of the examples, and ranges, that are nearly everywhere
MIN_UNSURE = 20  # of the least confident fifth, to be a finding


def distrust_section(
    probs: Tensor, labels: Tensor, names: Sequence[str], design: SampleDesign | None = None
) -> Sections:
    """Findings on confidence ranges and classes; a class that is seldom recognized has a card.

    Args:
        probs: Class probabilities, (N, C), float64.
        labels: Class indices, (N,).
        names: C names of classes.
        design: Weights and clusters of the examples.
    """
    tests = _tests(probs, labels, design)
    cards = _missed(tests, names)
    ranges, shares, recall = _ranges(tests), _shares(tests, names), _recall(tests, names)
    findings = [*recall, *ranges, *shares] if cards else [*ranges, *shares, *recall]
    return Sections(findings=findings, cards=cards)


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
    findings = []
    for name, auroc in detected.items():
        if detection_answer(auroc) == "no":
            often = f"it is less sure of them than of usual inputs only {percent(auroc.value)} of the time"
            if auroc.value < 0.5:
                often = f"it is even surer of them than of usual inputs {percent(1 - auroc.value)} of the time"
            findings.append(Finding(f"Inputs like “{name}”", often))
    return findings


def least_sure(probs: Tensor, labels: Tensor) -> list[Finding]:
    """The share of errors among the least confident fifth, if it is clearly larger than that of all."""
    confidence, predicted = probs.max(dim=1)
    wrong = (predicted != labels).double()
    edge = confidence.sort().values[len(confidence) // 5]
    chosen = confidence < edge
    if int(chosen.sum()) < MIN_UNSURE or wrong[chosen].mean() < 1.5 * wrong.mean() or not wrong.sum():
        return []
    rate, all_rate = percent(wrong[chosen].mean().item()), percent(wrong.mean().item())
    return [
        Finding(
            f"Often wrong below a confidence of {percent(edge.item())}",
            f"{rate} of these {int(chosen.sum()):,} answers are wrong, {all_rate} overall",
        )
    ]


class _Tests(NamedTuple):
    """Ranges of confidence, and classes: numbers of examples, sums with weights of mean one, and p-values."""

    range_counts: np.ndarray  # (NUM_RANGES,)
    range_sums: np.ndarray  # of one, of the confidence and of right answers, (3, NUM_RANGES)
    range_p: np.ndarray
    class_counts: np.ndarray  # (C,)
    class_sums: np.ndarray  # of one, of the probability over all examples, of recognized ones, (3, C)
    share_p: np.ndarray
    recall_p: np.ndarray  # of a lower recall than that of all


def _tests(probs: Tensor, labels: Tensor, design: SampleDesign | None) -> _Tests:
    """All sums and p-values."""
    confidence, predicted = probs.max(dim=1)
    hit, size = (predicted == labels).double(), len(labels)
    weights = torch.ones(size, dtype=torch.float64) if design is None else design.weights
    place = bin_index(confidence + EDGE_TOLERANCE, equal_width_edges(NUM_RANGES))

    def sums(index: Tensor, number: int, *columns: Tensor) -> np.ndarray:
        return np.stack([torch.bincount(index, weights * column, minlength=number).numpy() for column in columns])

    ones, num_classes = torch.ones_like(hit), probs.shape[1]
    ranges = sums(place, NUM_RANGES, ones, confidence, hit)
    classes = sums(labels, num_classes, ones, ones, hit)
    classes[1] = (weights @ probs).numpy()
    range_counts = torch.bincount(place, minlength=NUM_RANGES).numpy()
    class_counts = torch.bincount(labels, minlength=num_classes).numpy()
    accuracy = classes[2].sum() / size
    if design is None:
        said = np.divide(ranges[1], ranges[0], out=np.zeros(NUM_RANGES), where=ranges[0] > 0)
        range_p = two_sided(np.rint(ranges[2]), range_counts, np.clip(said, 0, 1))
        share_p = two_sided(class_counts, np.full(num_classes, size), np.clip(classes[1] / size, 0, 1))
        recall_p = np.where(class_counts > 0, scipy.stats.binom.cdf(classes[2], class_counts, accuracy), np.nan)
    else:
        one_hot = torch.nn.functional.one_hot(labels, num_classes).double()
        inside = torch.nn.functional.one_hot(place, NUM_RANGES).double()
        range_p = design.two_sided(inside * (hit - confidence)[:, None])
        share_p = design.two_sided(one_hot - probs)
        both = design.two_sided(one_hot * (hit - accuracy)[:, None])
        recall_p = np.where(classes[2] < accuracy * classes[0], both / 2, 1 - both / 2)
    return _Tests(range_counts, ranges, range_p, class_counts, classes, share_p, recall_p)


def _ranges(tests: _Tests) -> list[Finding]:
    """Ranges of confidence in which more or fewer are right than it says; neighbours with one direction are joined."""
    edges, sums = equal_width_edges(NUM_RANGES), tests.range_sums
    findings = []
    for sign, own in sorted(neighbours(np.sign(sums[1] - sums[2]) * is_beyond_chance(tests.range_p)), reverse=True):
        number, said, hits = sums[:, own].sum(axis=1)
        low, high = (f"{100 * edges[end].item():.0f} %" for end in (own[0], own[-1] + 1))
        is_wide = len(own) >= MANY_RANGES and number >= NEARLY_ALL * sums[0].sum()
        where = " nearly everywhere," if is_wide else ""
        findings.append(
            Finding(
                f"{'Too sure' if sign > 0 else 'Right more often than it says'}{where} at {low} to {high}",
                f"{percent(hits / number)} of {tests.range_counts[own].sum():,} such answers are right, on average it "
                f"says {percent(said / number)}",
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


def _shares(tests: _Tests, names: Sequence[str]) -> list[Finding]:
    """Classes to which more or less probability goes than examples are of them."""
    share, given, _ = tests.class_sums / tests.class_sums[0].sum()
    findings = []
    for place in _chosen(tests.share_p):
        word = "Too much" if given[place] > share[place] else "Too little"
        findings.append(
            Finding(
                f"{word} probability for {quoted(names[place])}",
                f"{percent(given[place])} on average, but {percent(share[place])} of the examples are of this class",
            )
        )
    return findings


def _recall(tests: _Tests, names: Sequence[str]) -> list[Finding]:
    """Classes of which fewer are recognized than of all."""
    total, _, hits = tests.class_sums
    accuracy, counts = percent(hits.sum() / total.sum()), tests.class_counts
    return [
        Finding(
            f"Errors on {quoted(names[place])}",
            f"{percent(hits[place] / total[place])} of {counts[place]:,} are recognized, {accuracy} overall",
        )
        for place in beyond_chance_first(tests.recall_p)[:MOST]
    ]


def _missed(tests: _Tests, names: Sequence[str]) -> list[Card]:
    """The class that is recognized least, if less than half as often as examples on the whole."""
    hard = beyond_chance_first(tests.recall_p)
    if not hard:
        return []
    total, _, hits = tests.class_sums
    least = min(hard, key=lambda place: hits[place] / total[place])
    recall, accuracy = hits[least] / total[least], hits.sum() / total.sum()
    if recall >= accuracy / 2:
        return []
    name, number = quoted(names[least]), tests.class_counts[least]
    headline = f"It seldom recognizes {name}: {percent(recall)} of {number:,}."
    reason = f"{percent(recall)} of {number:,} examples of {name} are recognized, {percent(accuracy)} overall."
    return [Card("classes", "Does it recognize every class?", "no", reason, headline)]


def hard_classes(probs: Tensor, labels: Tensor, design: SampleDesign | None = None) -> list[int]:
    """Classes that are recognized less often than examples on the whole, beyond chance, the clearest first."""
    return beyond_chance_first(_tests(probs, labels, design).recall_p)


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
