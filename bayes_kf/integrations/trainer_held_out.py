"""The held-out examples of a KalmanTrainer, and the last steps of its training, which they decide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from bayes_kf.inference.fitting.mixture_fit import LAST_STEP_SIZE
from bayes_kf.inference.fitting.passes.covariance_pass import add_at_mean
from bayes_kf.inference.fitting.passes.mean_pass import mean_pass
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.inference.fitting.reading import has_pair_columns
from bayes_kf.inference.heldout import calibration
from bayes_kf.inference.posterior import Posterior
from bayes_kf.validation import is_number

MOST_EXAMPLES = 2_000  # of an evaluation set; more change size and sharpness little, and each is linearized
STACKLEVEL = 5  # of warnings: the caller of `KalmanTrainer.train`


class HeldOut(NamedTuple):
    """The data sets of a training.

    Attributes:
        fitted: the examples to train on.
        examples: the examples that choose size and sharpness.
        name: "eval_dataset" or "train_dataset", where they are from.
    """

    fitted: Any
    examples: Any
    name: str


def check_fraction(fraction: object) -> None:
    """Raise ValueError unless the held-out fraction is a number in [0, 1)."""
    if not (is_number(fraction) and 0 <= fraction < 1):
        raise ValueError(f"`held_out_fraction` must lie in [0, 1), got {fraction!r}.")


def hold_out(train: Any, evaluation: Any, fraction: float, label_name: str) -> HeldOut | None:
    """The held-out examples: of the evaluation set if it has labels, else a share of the training set.

    At most ``MOST_EXAMPLES`` of the evaluation set are used, evenly spaced. The share is drawn with a fixed seed, so
    that resumed training holds out the same examples. None if the fraction is 0, or the data have no length or are too
    few.

    Args:
        train: the training set.
        evaluation: the evaluation set; a mapping of several, or one without labels, is not used.
        fraction: the share of the training set.
        label_name: the key of an example's label.
    """
    if fraction == 0.0:
        return None
    if not isinstance(evaluation, Mapping) and _has_labels(evaluation, label_name):
        step = -(-len(evaluation) // MOST_EXAMPLES)
        examples = evaluation if step == 1 else _subset(evaluation, list(range(0, len(evaluation), step)))
        return HeldOut(train, examples, "eval_dataset")
    number = int(fraction * len(train)) if _has_length(train) else 0
    if number == 0:
        return None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    fitted, examples = _subset(train, sorted(order[number:])), _subset(train, sorted(order[:number]))
    return HeldOut(fitted, examples, "train_dataset")


def last_steps(posterior: Posterior, held_out: list[Any]) -> Posterior:
    """The posterior with the size and the sharpness that held-out batches choose."""
    return calibration.calibrate([posterior], [1.0], held_out, stacklevel=STACKLEVEL)[0]


def learn_held_out(posterior: Posterior, held_out: list[Any], everything: Iterable[Any] | None) -> Posterior:
    """The posterior after it has learned the held-out batches.

    Args:
        posterior: at its size and sharpness.
        held_out: the batches.
        everything: all training examples, if later epochs moved the mean: its last pass is over them. None: the batches
            are updates, as those of the first epoch.

    Raises:
        DivergenceError: if the filter refuses an update.
    """
    kf, state = posterior.kf, posterior.state
    if everything is None:
        for inputs, targets in held_out:
            state, _ = kf.update(state, inputs, targets)
    else:
        state = add_at_mean(kf, state, held_out)
        bar = ProgressBar(None, "last mean pass", False)
        state, _ = mean_pass(kf, state, everything, 0, 1, bar, step_size=LAST_STEP_SIZE)
    return Posterior(kf, state, posterior.history)


def _has_length(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _has_labels(data: Any, label_name: str) -> bool:
    """Whether a data set has examples, the first of which has a label, or is a preference pair."""
    if not _has_length(data) or len(data) == 0:
        return False
    if has_pair_columns(data):
        return True
    first = data[0]
    return not isinstance(first, Mapping) or label_name in first


def _subset(data: Any, numbers: list[int]) -> Any:
    """Some examples; a ``datasets.Dataset`` stays one, so that Trainer removes its unused columns."""
    return data.select(numbers) if hasattr(data, "select") else Subset(data, numbers)
