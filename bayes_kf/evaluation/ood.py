"""Does an uncertainty score tell foreign inputs from those the model knows, and errors from right predictions?

Intervals are percentiles of the scores of resampled data sets. A score that keeps both groups apart without exception
does so in every one of them: its interval is a point, however few examples there are. Of two Gaussians with a hundred
examples each, 95 % intervals were seen to hold the true AUROC and FPR@95 as often as they say, the true AUPR in 91 %.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_vector
from bayes_kf.evaluation.bootstrap import Interval
from bayes_kf.evaluation.null import check_simulation
from bayes_kf.evaluation.resampled_cells import cell_intervals

CAUGHT = 0.95  # share of the positives that are flagged where the false positives are counted


class OODScores(NamedTuple):
    """Detection of out-of-distribution inputs (or of errors), which are the positives."""

    auroc: float
    aupr: float
    fpr95: float


class DetectionIntervals(NamedTuple):
    """Bootstrap intervals of the same scores; NaN where a score is not defined."""

    auroc: Interval
    aupr: Interval
    fpr95: Interval


def ood_scores(uncertainty_id: Array, uncertainty_ood: Array) -> OODScores:
    """AUROC, AUPR and FPR@95 of a score that should be higher out of distribution.

    The area under the precision-recall curve is the average precision; its chance level is the share of foreign
    inputs. FPR@95 is the share of known inputs flagged at the highest threshold that flags 95 % of the foreign ones.

    Args:
        uncertainty_id: Score of each known input, (N,), for example its predictive entropy.
        uncertainty_ood: Score of each foreign input, (M,).

    Raises:
        ValueError: If a score is not a finite, non-empty vector.

    Example:
        >>> import torch
        >>> ood_scores(torch.tensor([0.1, 0.2]), torch.tensor([0.8, 0.9]))
        OODScores(auroc=1.0, aupr=1.0, fpr95=0.0)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    known = as_vector(uncertainty_id, "uncertainty_id").numpy()
    foreign = as_vector(uncertainty_ood, "uncertainty_ood").numpy()
    is_foreign = np.concatenate([np.zeros(len(known)), np.ones(len(foreign))])
    scores = np.concatenate([known, foreign])
    false_positive, true_positive, _ = roc_curve(is_foreign, scores, drop_intermediate=False)
    return OODScores(
        auroc=float(roc_auc_score(is_foreign, scores)),
        aupr=float(average_precision_score(is_foreign, scores)),
        fpr95=float(false_positive[np.argmax(true_positive >= CAUGHT)]),
    )


def detection_intervals(
    uncertainty_id: Array,
    uncertainty_ood: Array,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> DetectionIntervals:
    """Bootstrap intervals of `ood_scores`, known and foreign inputs resampled each among themselves.

    Args:
        uncertainty_id: Score of each known input, (N,).
        uncertainty_ood: Score of each foreign input, (M,).
        level: Probability inside each interval.
        num_resamples: Number of resampled data sets, at least 2/(1 − level) − 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Efron 1979.

    Example:
        >>> known, foreign = torch.arange(100.0), 50 + torch.arange(100.0)
        >>> low, high = detection_intervals(known, foreign).auroc
        >>> 0.8 < low < ood_scores(known, foreign).auroc < high < 0.95
        True
    """
    known, foreign = as_vector(uncertainty_id, "uncertainty_id"), as_vector(uncertainty_ood, "uncertainty_ood")
    check_simulation(num_resamples, level, "num_resamples")
    is_foreign = torch.arange(len(known) + len(foreign)) >= len(known)
    settings = (detection_columns, level, num_resamples, seed)
    return DetectionIntervals(*cell_intervals(torch.cat([known, foreign]), is_foreign, *settings, apart=True))


def error_detection(uncertainty: Array, correct: Array) -> OODScores:
    """AUROC, AUPR and FPR@95 of a score that should be higher where the prediction is wrong; errors are the positives.

    The chance level of AUPR is the share of errors. All three are NaN where nothing is wrong or nothing right.

    Args:
        uncertainty: Score of each example, (N,), for example its predictive entropy.
        correct: One (or True) where the prediction is right, else zero, (N,).

    Raises:
        ValueError: If a vector is malformed or they differ in length.

    Reference: Hendrycks, Gimpel 2017.

    Example:
        >>> error_detection(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1, 1, 0]))
        OODScores(auroc=1.0, aupr=1.0, fpr95=0.0)
    """
    scores = as_vector(uncertainty, "uncertainty")
    right = as_correct(correct, len(scores), "uncertainty")
    if right.all() or not right.any():
        return OODScores(math.nan, math.nan, math.nan)
    return ood_scores(scores[right], scores[~right])


def error_detection_intervals(
    uncertainty: Array, correct: Array, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> DetectionIntervals:
    """Bootstrap intervals of `error_detection`, examples resampled all together: the number of errors varies too.

    Data sets in which nothing is wrong or nothing right do not count; where too few are left, all ends are NaN.

    Args:
        uncertainty: Score of each example, (N,).
        correct: One (or True) where the prediction is right, else zero, (N,).
        level: Probability inside each interval.
        num_resamples: Number of resampled data sets, at least 2/(1 − level) − 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> doubt = torch.linspace(0, 1, 100)
        >>> low, high = error_detection_intervals(doubt, torch.arange(100) % 10 > 0).auroc
        >>> low < 0.5 < high
        True
    """
    scores = as_vector(uncertainty, "uncertainty")
    right = as_correct(correct, len(scores), "uncertainty")
    check_simulation(num_resamples, level, "num_resamples")
    return DetectionIntervals(
        *cell_intervals(scores, ~right, detection_columns, level, num_resamples, seed, apart=False)
    )


def interval_scores(name: str, found: OODScores, intervals: DetectionIntervals) -> dict[str, float]:
    """All scores and the ends of their intervals, named for a report: `name_auroc`, `name_auroc_low` and so on."""
    scores: dict[str, float] = {}
    for measure, value in found._asdict().items():
        low, high = getattr(intervals, measure)
        scores |= {f"{name}_{measure}": value, f"{name}_{measure}_low": low, f"{name}_{measure}_high": high}
    return scores


def detection_columns(negatives: Tensor, positives: Tensor) -> Tensor:
    """AUROC, AUPR and FPR@95 of data sets given as counts in cells of ascending score, (r, K) each, as (r, 3).

    NaN where a data set has no negatives or no positives.
    """
    total_negative, total_positive = negatives.sum(dim=1), positives.sum(dim=1)  # (r,)
    false_alarms = negatives.flip(1).cumsum(dim=1).flip(1)  # (r, K): at or above each cell
    caught = positives.flip(1).cumsum(dim=1).flip(1)
    below = total_negative[:, None] - false_alarms + negatives / 2  # ties count half
    auroc = (positives * below).sum(dim=1) / (total_negative * total_positive)
    precision = caught / (caught + false_alarms).clamp(min=1)
    aupr = (positives * precision).sum(dim=1) / total_positive
    enough = caught / total_positive[:, None] >= CAUGHT  # from the lowest cell up to the threshold's
    threshold = (enough.sum(dim=1) - 1).clamp(min=0)
    fpr95 = false_alarms.gather(1, threshold[:, None])[:, 0] / total_negative
    columns = torch.stack([auroc, aupr, fpr95], dim=1)
    return torch.where(((total_negative > 0) & (total_positive > 0))[:, None], columns, math.nan)


def as_correct(correct: Array, length: int | None = None, beside: str = "") -> Tensor:
    """Whether each prediction is right, bool (N,)."""
    values = as_vector(correct, "correct")
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"`correct` must hold zeros and ones, got values in {values.min():.3g}..{values.max():.3g}.")
    if length is not None and len(values) != length:
        raise ValueError(f"`correct` must have shape ({length},) as `{beside}` has, got ({len(values)},).")
    return values == 1
