"""Several models on one test set: paired differences with joint intervals, and a ranking that admits ties."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_probs, as_targets, check_fraction, check_positive_int
from bayes_kf.evaluation.bootstrap import resampled_indices
from bayes_kf.evaluation.calibration import calibration_statistic
from bayes_kf.evaluation.null import check_simulation
from bayes_kf.evaluation.profile import exact_profile, groups_of, top_confidence
from bayes_kf.evaluation.scores import brier_scores, log_losses

HIGHER_IS_BETTER = ("accuracy",)
COMPARED = ("nll", "brier", "ece", "accuracy")
SAME = 1e-12  # the spread of resampled differences, relative to their size, that is rounding


class Difference(NamedTuple):
    """Score of the first model minus that of the second, with an interval."""

    first: str
    second: str
    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Rank(NamedTuple):
    """A model's place: one more than the number of models that are clearly better."""

    name: str
    value: float
    place: int
    tied_with: tuple[str, ...]  # those from which it does not differ clearly


class ScoreComparison(NamedTuple):
    """One score of all models."""

    score: str
    values: dict[str, float]
    differences: tuple[Difference, ...]  # of every pair
    ranking: tuple[Rank, ...]  # best first

    @property
    def best(self) -> tuple[str, ...]:
        """The models that no other clearly beats; more than one are tied."""
        return tuple(rank.name for rank in self.ranking if rank.place == 1)


def compare_predictions(
    probs: Mapping[str, Array],
    targets: Array,
    *,
    scores: Sequence[str] = COMPARED,
    num_bins: int = 15,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, ScoreComparison]:
    """Scores of several models' class probabilities for the same examples, compared pair by pair.

    The same resampled examples go to every model. Intervals of one score's differences hold *together* with probability
    `level`: d ± q·s, s the bootstrap's standard deviation and q the quantile of the largest |d* − d|/s over all pairs
    (for the ECE around the resampled mean, and with that mean's offset taken off, which chance adds to the error).
    Few examples spread less than there is to know of them, so q·s is multiplied by √(N/(N − 1)) and by the ratio of
    Student's quantile with N − 1 degrees of freedom to the normal one; a single example says nothing. Models whose
    interval holds zero are tied.

    Args:
        probs: Name to class probabilities, (N, C), of at least two models; C may differ.
        targets: Class indices, (N,).
        scores: Of "nll", "brier", "ece" (equal width, top label) and "accuracy".
        num_bins: Number of bins of the ECE.
        level: Probability that all intervals of a score hold.
        num_resamples: Number of resampled data sets, at least 2/(1 − level) − 1.
        seed: Seed of the resampling.

    Returns:
        Score to its comparison. Differences of infinite losses are infinite, or not defined between two of them.

    Raises:
        ValueError: If an argument is malformed.

    Reference: paired bootstrap: Efron, Tibshirani 1993; simultaneous intervals by the largest deviation: Westfall,
    Young 1993.

    Example:
        >>> sure = torch.tensor([[0.9, 0.1]] * 40)
        >>> labels = torch.tensor([0] * 36 + [1] * 4)
        >>> found = compare_predictions({"sure": sure, "unsure": torch.full((40, 2), 0.5)}, labels)
        >>> found["nll"].best, found["accuracy"].best
        (('sure',), ('sure', 'unsure'))
    """
    if len(probs) < 2:
        raise ValueError(f"`probs` must hold at least two models, got {len(probs)}.")
    unknown = [name for name in scores if name not in COMPARED]
    if unknown or not scores:
        raise ValueError(f"`scores` must be among {', '.join(COMPARED)}, got {', '.join(unknown) or 'none'}.")
    check_positive_int(num_bins, "num_bins")
    check_fraction(level, "level")
    check_simulation(num_resamples, level, "num_resamples")
    checked = {str(name): as_probs(values, f"probs[{name!r}]") for name, values in probs.items()}
    labels = {name: as_targets(targets, values) for name, values in checked.items()}
    columns = [_columns(checked[name], labels[name], num_bins) for name in checked]
    resampled = _resampled(columns, len(columns[0].accuracy), num_bins, num_resamples, seed)
    found = {}
    for score in scores:
        values = {
            name: calibration_statistic("ece", checked[name], labels[name], num_bins)
            if score == "ece"
            else getattr(column, score).mean().item()
            for name, column in zip(checked, columns, strict=True)
        }
        found[score] = _compared(score, values, resampled[score], level, len(columns[0].accuracy))
    return found


class _Columns(NamedTuple):
    """What each example of one model adds to its scores, each (N,)."""

    nll: Tensor
    brier: Tensor
    accuracy: Tensor
    residual: Tensor  # confidence − hit
    bin: Tensor


def _columns(probs: Tensor, labels: Tensor, num_bins: int) -> _Columns:
    """Per-example scores of checked predictions."""
    confidence, hit = top_confidence(probs, labels, 1)
    profile = exact_profile(confidence, hit)
    cell = torch.searchsorted(profile.place, confidence)
    index = groups_of(profile, num_bins, "equal_width").bins[cell]
    return _Columns(log_losses(probs, labels), brier_scores(probs, labels), hit, confidence - hit, index)


def _resampled(
    columns: list[_Columns], num_examples: int, num_bins: int, num_resamples: int, seed: int
) -> dict[str, Tensor]:
    """Scores of every model on resampled data sets, each (R, models)."""
    blocks: dict[str, list[Tensor]] = {name: [] for name in COMPARED}
    for index in resampled_indices(num_examples, num_resamples, seed):
        for name in ("nll", "brier", "accuracy"):
            blocks[name].append(torch.stack([getattr(c, name)[index].mean(dim=1) for c in columns], dim=1))
        cells = num_bins * torch.arange(len(index))[:, None]
        sums = [
            torch.bincount((c.bin[index] + cells).flatten(), c.residual[index].flatten(), len(index) * num_bins)
            for c in columns
        ]
        errors = [s.view(len(index), num_bins).abs().sum(dim=1) / num_examples for s in sums]
        blocks["ece"].append(torch.stack(errors, dim=1))
    return {name: torch.cat(values) for name, values in blocks.items()}


def _compared(
    score: str, values: dict[str, float], resampled: Tensor, level: float, num_examples: int
) -> ScoreComparison:
    """Differences of all pairs with their joint intervals, and the ranking."""
    names = list(values)
    pairs = list(combinations(range(len(names)), 2))
    value = torch.tensor([values[names[i]] - values[names[j]] for i, j in pairs], dtype=torch.float64)
    drawn = torch.stack([resampled[:, i] - resampled[:, j] for i, j in pairs], dim=1)  # (R, pairs)
    finite = value.isfinite()
    half = torch.zeros_like(value)
    centre = value.clone()
    if finite.any():
        mean, half[finite] = _joint_half_widths(drawn[:, finite], level, num_examples)
        centre[finite] = value[finite] - (mean - value[finite] if score == "ece" else 0.0)
    differences = tuple(
        Difference(names[i], names[j], value[p].item(), (centre[p] - half[p]).item(), (centre[p] + half[p]).item())
        for p, (i, j) in enumerate(pairs)
    )
    return ScoreComparison(score, values, differences, _ranking(score, values, differences))


def _joint_half_widths(drawn: Tensor, level: float, num_examples: int) -> tuple[Tensor, Tensor]:
    """Means of resampled differences (R, pairs), and half widths that hold together, each (pairs,).

    A pair whose difference is the same in every resampled data set, up to rounding, does not widen the others.
    """
    mean, spread = drawn.mean(dim=0), drawn.std(dim=0)
    if num_examples == 1:
        return mean, torch.full_like(mean, math.inf)
    varies = spread > SAME * drawn.abs().amax(dim=0)
    deviation = torch.where(varies, (drawn - mean).abs() / spread, 0.0)
    share, degrees = (1 + level) / 2, num_examples - 1
    few = (num_examples / degrees) ** 0.5 * float(scipy.stats.t.ppf(share, degrees) / scipy.stats.norm.ppf(share))
    return mean, torch.where(varies, spread, 0.0) * deviation.amax(dim=1).quantile(level) * few


def _ranking(score: str, values: dict[str, float], differences: tuple[Difference, ...]) -> tuple[Rank, ...]:
    """Models from best to worst, with those they are tied with."""
    sign = -1 if score in HIGHER_IS_BETTER else 1
    ranks = []
    for name in sorted(values, key=lambda n: (sign * values[n], list(values).index(n))):
        own = [d for d in differences if name in (d.first, d.second)]
        losses = [d for d in own if d.is_clear and (sign * (d.low + d.high) > 0) == (d.first == name)]
        ties = tuple(d.second if d.first == name else d.first for d in own if not d.is_clear)
        ranks.append(Rank(name, values[name], 1 + len(losses), ties))
    return tuple(ranks)
