"""Groups of examples, such as sources or languages: which have more errors or wrong probabilities, beyond chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import plain_array
from bayes_kf.evaluation.report.contents import Finding, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, make_table
from bayes_kf.evaluation.sections.distrust import MOST, beyond_chance_first, two_sided
from bayes_kf.evaluation.sections.verdicts.phrases import percent

MAX_GROUPS = 1_000  # of one kind


def group_section(probs: Tensor, labels: Tensor, groups: Mapping[str, Any]) -> Sections:
    """Findings on groups, and a table of each kind.

    All groups of all kinds are one family of tests for accuracy and one for calibration.

    Args:
        probs: Class probabilities, (N, C), float64.
        labels: Class indices, (N,).
        groups: Name of a kind to the group of each example, (N,): texts, numbers or a column; or a table with a column
            for each kind.

    Raises:
        ValueError: If a kind has not N entries, or more than `MAX_GROUPS` groups.
    """
    confidence, predicted = probs.max(dim=1)
    sure, right = confidence.numpy(), (predicted == labels).numpy()
    names, rows, tables = [], [], []
    for kind in getattr(groups, "columns", groups):
        members = _members(groups[kind], f"groups[{kind!r}]", len(labels))
        shown = []
        for name, chosen in members.items():
            count, said, hits = int(chosen.sum()), float(sure[chosen].sum()), int(right[chosen].sum())
            names.append(f"{kind} {name}")
            rows.append((count, said, hits))
            share, mean = hits / count, said / count
            shown.append((name, count, Cell(percent(share), share), Cell(percent(mean), mean), share - mean))
        header = ("Group", "Examples", "Accuracy", "Mean confidence", "Accuracy − confidence")
        tables.append(make_table(f"Groups by {kind}", header, shown))
    columns = np.array(rows, dtype=float).T
    return Sections(findings=_findings(names, columns, float(right.mean())), tables=tables)


def _findings(names: Sequence[str], columns: np.ndarray, accuracy: float) -> list[Finding]:
    """Groups that stand out; columns (3, groups) of examples, summed confidence and right answers."""
    counts, said, hits = columns
    findings = [
        Finding(
            f"Errors where {names[k]}",
            f"{percent(hits[k] / counts[k])} of {counts[k]:,.0f} answers are right, of all {percent(accuracy)}",
        )
        for k in beyond_chance_first(np.asarray(scipy.stats.binom.cdf(hits, counts, accuracy)))[:MOST]
    ]
    for k in beyond_chance_first(two_sided(hits, counts, np.clip(said / counts, 0, 1)))[:MOST]:
        direction = "Too sure" if said[k] > hits[k] else "Right more often than it says"
        findings.append(
            Finding(
                f"{direction} where {names[k]}",
                f"{percent(hits[k] / counts[k])} of {counts[k]:,.0f} answers are right, on average it says "
                f"{percent(said[k] / counts[k])}",
            )
        )
    return findings


def _members(values: Any, name: str, count: int) -> dict[str, np.ndarray]:
    """Each group as a mask of the examples, (N,) bool, in the order of their names."""
    plain = plain_array(values)
    plain = plain.numpy() if isinstance(plain, torch.Tensor) else np.asarray(plain)
    if plain.shape != (count,):
        raise ValueError(f"`{name}` must have shape ({count},), an entry for each example, got {plain.shape}.")
    texts = np.array([str(value) for value in plain.tolist()])
    found = np.unique(texts)
    if len(found) > MAX_GROUPS:
        raise ValueError(f"`{name}` must have at most {MAX_GROUPS:,} groups, got {len(found):,}.")
    return {str(text): texts == text for text in found}
