"""Does an uncertainty score tell foreign inputs from those the model knows?"""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayes_kf.evaluation._inputs import Array, as_vector


class OODScores(NamedTuple):
    """Detection of out-of-distribution inputs, which are the positives."""

    auroc: float
    aupr: float
    fpr95: float


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
    known = as_vector(uncertainty_id, "uncertainty_id").numpy()
    foreign = as_vector(uncertainty_ood, "uncertainty_ood").numpy()
    is_foreign = np.concatenate([np.zeros(len(known)), np.ones(len(foreign))])
    scores = np.concatenate([known, foreign])
    false_positive, true_positive, _ = roc_curve(is_foreign, scores, drop_intermediate=False)
    return OODScores(
        auroc=float(roc_auc_score(is_foreign, scores)),
        aupr=float(average_precision_score(is_foreign, scores)),
        fpr95=float(false_positive[np.argmax(true_positive >= 0.95)]),
    )
