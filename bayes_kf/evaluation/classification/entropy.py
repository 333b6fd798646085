"""Predictive uncertainty: entropy in nats, its aleatoric and epistemic parts, confidence, margin and energy."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_float, as_probs

ROUNDING = 1e-12


class EntropyParts(NamedTuple):
    """Total entropy, of the mean prediction, and its two summands, each (N,)."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def entropy(probs: Array) -> Tensor:
    """Entropy −Σ_c p_c log p_c of each prediction, (N,), in nats; 0 log 0 counts as 0.

    Args:
        probs: Class probabilities, (N, C).

    Raises:
        ValueError: If the probabilities are malformed.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    return _entropy(as_probs(probs))


def entropy_parts(samples: Array) -> EntropyParts:
    """Total, aleatoric and epistemic entropy of each example from posterior draws, each (N,), in nats.

    With draws π_1 … π_S, the total entropy is H[mean π_s] and the aleatoric entropy is mean H[π_s]. Their difference is
    the epistemic entropy, the mutual information of label and parameters. It is never negative (Jensen's inequality);
    values between −1e-12 and 0 are rounding and become 0.

    Args:
        samples: Class probabilities of each draw, (S, N, C). They are converted to float64 one draw at a time.

    Raises:
        ValueError: If the samples are malformed.

    Example:
        >>> parts = entropy_parts(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> parts.aleatoric.item(), round(parts.epistemic.item(), 4)
        (0.0, 0.6931)
    """
    draws = torch.as_tensor(samples)
    if draws.ndim != 3 or draws.shape[0] == 0:
        raise ValueError(f"`samples` must have shape (S, N, C) with at least one draw, got {tuple(draws.shape)}.")
    mean = torch.zeros(draws.shape[1:], dtype=torch.float64)  # (N, C)
    aleatoric = torch.zeros(draws.shape[1], dtype=torch.float64)  # (N,)
    for draw in draws:
        probs = as_probs(draw, "samples")
        mean += probs / len(draws)
        aleatoric += _entropy(probs) / len(draws)
    total = _entropy(mean)
    difference = total - aleatoric
    rounding = (difference < 0) & (difference > -ROUNDING)
    return EntropyParts(total, aleatoric, torch.where(rounding, 0.0, difference))


def predictive_entropy(samples: Array) -> Tensor:
    """Total entropy, (N,), in nats; see `entropy_parts` for arguments and errors.

    Example:
        >>> predictive_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6931], dtype=torch.float64)
    """
    return entropy_parts(samples).total


def aleatoric_entropy(samples: Array) -> Tensor:
    """Aleatoric entropy, (N,), in nats; see `entropy_parts` for arguments and errors.

    Example:
        >>> aleatoric_entropy(torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]]))
        tensor([0.6931], dtype=torch.float64)
    """
    return entropy_parts(samples).aleatoric


def epistemic_entropy(samples: Array) -> Tensor:
    """Epistemic entropy, (N,), in nats; see `entropy_parts` for arguments and errors.

    Example:
        >>> epistemic_entropy(torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]]))
        tensor([0.], dtype=torch.float64)
    """
    return entropy_parts(samples).epistemic


def max_probability(probs: Array) -> Tensor:
    """Probability of the most probable class, (N,): the confidence.

    Args:
        probs: Class probabilities, (N, C).

    Raises:
        ValueError: If the probabilities are malformed.

    Reference: Hendrycks, Gimpel, *A baseline for detecting misclassified and out-of-distribution examples in
    neural networks*, 2017.

    Example:
        >>> max_probability(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """
    return as_probs(probs).max(dim=1).values


def margin(probs: Array) -> Tensor:
    """Difference of the two largest probabilities, (N,), from 0 (a tie) to 1 (certain).

    Args:
        probs: Class probabilities, (N, C).

    Raises:
        ValueError: If the probabilities are malformed.

    Example:
        >>> margin(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]))
        tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    first, second = as_probs(probs).topk(2, dim=1).values.unbind(dim=1)
    return first - second


def energy(logits: Array, temperature: float = 1.0) -> Tensor:
    """Energy −T log Σ_c exp(z_c/T) of each example's logits z, (N,); higher for out-of-distribution inputs.

    Unlike probabilities, it changes with a constant shift of all logits, so compare only energies of the same model.

    Args:
        logits: Outputs before the softmax, (N, C).
        temperature: T in the formula, > 0.

    Raises:
        ValueError: If the logits are not a finite (N, C) or the temperature is not positive.

    Reference: Liu et al., *Energy-based out-of-distribution detection*, 2020.

    Example:
        >>> energy(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
        tensor([ -0.6931, -10.0000], dtype=torch.float64)
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature!r}.")
    outputs = as_float(logits, "logits")
    if outputs.ndim != 2:
        raise ValueError(f"`logits` must have shape (N, C), got {tuple(outputs.shape)}.")
    return -temperature * torch.logsumexp(outputs / temperature, dim=1)


def _entropy(probs: Tensor) -> Tensor:
    """Entropy over the last axis; below zero by rounding only."""
    return torch.special.entr(probs).sum(dim=-1).clamp(min=0)
