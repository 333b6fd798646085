"""Groups of examples, such as sources or languages: which have more errors or wrong probabilities, beyond chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import as_numpy
from bayes_kf.evaluation.report.contents import Finding, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, make_table
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.sections.distrust import MOST, beyond_chance_first, two_sided
from bayes_kf.evaluation.sections.verdicts.phrases import minus, percent

MAX_GROUPS = 1_000  # of one kind


def group_section(
    probs: Tensor, labels: Tensor, groups: Mapping[str, Any], design: SampleDesign | None = None
) -> Sections:
    """Findings on groups, and a table of each kind.

    All groups of all kinds are one family of tests for accuracy and one for calibration.

    Args:
        probs: Class probabilities, (N, C), float64.
        labels: Class indices, (N,).
        groups: Name of a kind to the group of each example, (N,): texts, numbers or a column; or a table with a column
            for each kind.
        design: Weights and clusters of the examples.

    Raises:
        ValueError: If a kind has not N entries, or more than `MAX_GROUPS` groups.
    """
    confidence, predicted = probs.max(dim=1)
    weights = 1.0 if design is None else design.weights.numpy()
    said_of, right = confidence.numpy(), (predicted == labels).numpy()
    accuracy = float((weights * right).mean())
    names: list[tuple[str, str]] = []
    rows, tables, masks = [], [], []
    for kind in getattr(groups, "columns", groups):
        members = _members(groups[kind], f"groups[{kind!r}]", len(labels))
        shown = []
        for name, chosen in members.items():
            count, own = int(chosen.sum()), weights * chosen
            if not own.any():
                continue
            total, said, hits = float(own.sum()), float((own * said_of).sum()), float((own * right).sum())
            names.append((str(kind), str(name)))
            masks.append(chosen)
            share, mean = hits / total, said / total
            rows.append((count, count * mean, count * share))
            shown.append((name, count, Cell(percent(share), share), Cell(percent(mean), mean), share - mean))
        header = ("Group", "Examples", "Accuracy", "Mean confidence", "Accuracy − confidence")
        tables.append(make_table(f"Groups by {kind}", header, shown))
    counts, said_sum, hits_sum = columns = np.array(rows, dtype=float).T
    if design is None:
        fewer = scipy.stats.binom.cdf(np.rint(hits_sum), counts, accuracy)
        other = two_sided(np.rint(hits_sum), counts, np.clip(said_sum / counts, 0, 1))
    else:
        inside = torch.from_numpy(np.stack(masks, axis=1)).double()
        both = design.two_sided(inside * torch.from_numpy(right - accuracy)[:, None])
        fewer = np.where(hits_sum < accuracy * counts, both / 2, 1 - both / 2)
        other = design.two_sided(inside * torch.from_numpy(right - said_of)[:, None])
    return Sections(findings=_findings(names, columns, accuracy, fewer, other), tables=tables)


def _findings(
    names: Sequence[tuple[str, str]], columns: np.ndarray, accuracy: float, fewer: np.ndarray, other: np.ndarray
) -> list[Finding]:
    """Groups that stand out.

    Args:
        names: Kind and group.
        columns: Examples, summed confidence and right answers, (3, groups).
        accuracy: Of all examples.
        fewer: p-values of fewer right answers than of all.
        other: p-values of another accuracy than the confidence.
    """
    counts, said, hits = columns
    findings = [
        Finding(
            f"Errors for {' '.join(names[k])}",
            f"{percent(hits[k] / counts[k])} of {counts[k]:,.0f} answers are right, {percent(accuracy)} overall",
        )
        for k in beyond_chance_first(np.asarray(fewer))[:MOST]
    ]
    rejected = beyond_chance_first(other)
    for kind in dict.fromkeys(kind for kind, _ in names):
        own = [k for k in range(len(names)) if names[k][0] == kind]
        signs = {bool(said[k] > hits[k]) for k in own}
        if len(own) > 1 and len(signs) == 1 and set(own) <= set(rejected):  # all of them
            rejected = [k for k in rejected if k not in own]
            word = "Too sure" if signs.pop() else "Right more often than it says"
            shares = [hits[k] / counts[k] - said[k] / counts[k] for k in own]
            low, high = (minus(f"{100 * end:+.1f}") for end in (min(shares), max(shares)))
            findings.append(
                Finding(f"{word} for every {kind}", f"accuracy minus confidence is {low} to {high} percentage points")
            )
    for k in rejected[:MOST]:
        direction = "Too sure" if said[k] > hits[k] else "Right more often than it says"
        findings.append(
            Finding(
                f"{direction} for {' '.join(names[k])}",
                f"{percent(hits[k] / counts[k])} of {counts[k]:,.0f} answers are right, on average it says "
                f"{percent(said[k] / counts[k])}",
            )
        )
    return findings


def groups_of_inputs(groups: Mapping[str, Any], inputs: Tensor, count: int) -> dict[str, np.ndarray]:
    """The groups of B = `count` inputs as those of their N parts; `inputs` (N,) is the input of each part.

    Raises:
        ValueError: If a kind has not B entries.
    """
    found = {}
    for kind in getattr(groups, "columns", groups):
        values = as_numpy(groups[kind])
        if values.shape != (count,):
            raise ValueError(
                f"`groups[{kind!r}]` must have shape ({count},), an entry for each input, got {values.shape}."
            )
        found[str(kind)] = values[inputs.numpy()]
    return found


def _members(values: Any, name: str, count: int) -> dict[str, np.ndarray]:
    """Each group as a mask of the examples, (N,) bool, in the order of their names."""
    plain = as_numpy(values)
    if plain.shape != (count,):
        raise ValueError(f"`{name}` must have shape ({count},), an entry for each example, got {plain.shape}.")
    texts = np.array([str(value) for value in plain.tolist()])
    found = np.unique(texts)
    if len(found) > MAX_GROUPS:
        raise ValueError(f"`{name}` must have at most {MAX_GROUPS:,} groups, got {len(found):,}.")
    return {str(text): texts == text for text in found}
