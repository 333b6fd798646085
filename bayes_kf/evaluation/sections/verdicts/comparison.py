"""Sentences on the comparison of several models."""

import math
from collections.abc import Iterable

from bayes_kf.evaluation.score_comparison import Rank, ScoreComparison
from bayes_kf.evaluation.sections.verdicts.phrases import quoted

SCORE_NAMES = {
    "nll": "negative log-likelihood",
    "brier": "Brier score",
    "accuracy": "accuracy",
    "aurc": "AURC (ranking of errors)",
    "mse": "squared error",
    "crps": "CRPS",
}


def score_name(score: str) -> str:
    """A compared score in a sentence."""
    if score.startswith("ood_"):
        return f"detection of {quoted(score.removeprefix('ood_').removesuffix('_auroc'))}"
    return SCORE_NAMES[score]


def comparison_headlines(comparisons: Iterable[ScoreComparison]) -> list[str]:
    """The best model and how many are tied with it; scores with one answer share a sentence."""
    scores: dict[str, list[str]] = {}
    for comparison in comparisons:
        scores.setdefault(_answer(comparison), []).append(score_name(comparison.score))
    sentences = []
    for answer, names in scores.items():
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        sentences.append(f"Best in {listed}: {answer}." if answer else f"In {listed} all are tied.")
    return sentences


def _answer(comparison: ScoreComparison) -> str:
    """The best model with those that are tied with it; empty if all are tied."""
    if len(comparison.best) == len(comparison.ranking):
        return ""
    others = [quoted(other) for other in comparison.best if other != comparison.leader]
    tie = f", tied with {others[0] if len(others) == 1 else f'{len(others)} others'}" if others else ""
    return f"{quoted(comparison.leader)}{tie}"


def comparison_verdict(comparison: ScoreComparison) -> str:
    """The best model in one score, the models tied with it, and the differences of the others."""
    name = score_name(comparison.score)
    if len(comparison.best) == len(comparison.ranking):
        return f"In {name} all models are tied: no difference is clear with this many examples."
    best = next(rank for rank in comparison.ranking if rank.name == comparison.leader)
    others = [rank for rank in comparison.ranking if rank is not best]
    tied = [quoted(rank.name) for rank in others if rank.place == 1]
    tie = f", tied with {' and '.join(tied)}" if tied else ""
    worse = ", ".join(_behind(comparison, best, rank) for rank in others if rank.place > 1)
    return f"Best in {name}: {quoted(best.name)} ({best.value:.3f}){tie}; {worse}."


def _behind(comparison: ScoreComparison, best: Rank, rank: Rank) -> str:
    """How much worse a model is than the best one."""
    difference = next(d for d in comparison.differences if {d.first, d.second} == {best.name, rank.name})
    low, high = sorted((abs(difference.low), abs(difference.high)))
    is_clear = difference.is_clear and math.isfinite(difference.value)
    interval = f" ({low:.3f} to {high:.3f})" if is_clear else ""
    return f"{quoted(rank.name)} is worse by {abs(difference.value):.3f}{interval}"
