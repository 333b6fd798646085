"""Prequential scores of a stream: every example is predicted before the update with it."""

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_vector, check_positive_int


def running_accuracy(correct: Array) -> Tensor:
    """acc(k) = (1/k) Σ_{i≤k} [prediction i is correct], for k = 1 … T, (T,).

    Args:
        correct: One (or True) if the prediction before the update was correct, else zero, (T,); for several targets
            per example, the share of correct ones.

    Raises:
        ValueError: If the vector is empty, or holds a value below zero or above one.

    Reference: the average online accuracy of LoKO.

    Example:
        >>> running_accuracy(torch.tensor([1, 0, 1, 1]))
        tensor([1.0000, 0.5000, 0.6667, 0.7500], dtype=torch.float64)
    """
    values = as_vector(correct, "correct")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"`correct` must lie between zero and one, got values in {values.min():.3g}..{values.max():.3g}."
        )
    return _cumulative_mean(values)


def prequential_log_loss(log_loss: Array) -> Tensor:
    """(1/k) Σ_{i≤k} −log p(y_i | x_i, data before i), for k = 1 … T, (T,), in nats.

    Args:
        log_loss: Log loss of each example before its update, (T,); may be infinite.

    Raises:
        ValueError: If the vector is empty or holds NaN.

    Example:
        >>> prequential_log_loss(torch.tensor([2.0, 1.0, 0.0]))
        tensor([2.0000, 1.5000, 1.0000], dtype=torch.float64)
    """
    return _cumulative_mean(as_vector(log_loss, "log_loss", allow_infinite=True))


def prequential_regret(log_loss: Array, reference: Array) -> Tensor:
    """Cumulative regret Σ_{i≤k} (loss_i − reference_i) for k = 1 … T, (T,), in nats.

    The reference may be the best of several runs, or a constant such as the entropy of the labels. A bounded regret
    means that the model predicts as well as the reference in the long run.

    Args:
        log_loss: Log loss of each example before its update, (T,); may be infinite.
        reference: Log loss of the reference on the same examples, (T,), finite.

    Raises:
        ValueError: If a vector is malformed or they differ in length.

    Reference: Dawid, *Statistical theory: the prequential approach*, 1984.

    Example:
        >>> prequential_regret(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 1.5]))
        tensor([1.5000, 1.0000], dtype=torch.float64)
    """
    losses, known = as_vector(log_loss, "log_loss", allow_infinite=True), as_vector(reference, "reference")
    if len(losses) != len(known):
        raise ValueError(f"`reference` must hold as many losses as `log_loss`, {len(losses)}, got {len(known)}.")
    return (losses - known).cumsum(0)


def moving_average(values: Array, window: int) -> Tensor:
    """Means over each full window, (T − window + 1,); entry j covers values j … j + window − 1.

    Args:
        values: A vector, (T,); may be infinite.
        window: Number of values in each mean, at most T.

    Raises:
        ValueError: If the vector is empty or holds NaN, or the window does not fit.

    Example:
        >>> moving_average(torch.tensor([1.0, 2.0, 3.0, 4.0]), window=2)
        tensor([1.5000, 2.5000, 3.5000], dtype=torch.float64)
    """
    vector = as_vector(values, "values", allow_infinite=True)
    check_window(window, len(vector))
    return vector.unfold(0, window, 1).mean(dim=1)  # with a running sum, one infinite value would spoil all later means


def check_window(window: int, length: int) -> None:
    """Raises a ValueError unless the window is a positive integer, at most the length of the stream."""
    check_positive_int(window, "window")
    if window > length:
        raise ValueError(f"`window` must be at most the number of values, {length}, got {window}.")


def _cumulative_mean(values: Tensor) -> Tensor:
    """Mean of the first k values for every k."""
    return values.cumsum(0) / torch.arange(1, len(values) + 1, dtype=values.dtype)
