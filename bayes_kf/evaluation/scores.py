"""Scores of predicted class probabilities against the labels that came."""

import torch

from bayes_kf.evaluation._inputs import Array, as_probs, as_targets


def accuracy(probs: Array, targets: Array) -> float:
    """Share of examples whose most probable class is the label; among equal probabilities the first class counts.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If the probabilities or targets are malformed.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([0, 1]))
        0.5
    """
    checked = as_probs(probs)
    return (checked.argmax(dim=1) == as_targets(targets, checked)).double().mean().item()


def negative_log_likelihood(probs: Array, targets: Array) -> float:
    """Mean of −log p(label), in nats per example.

    Nothing is clipped: a label that was given probability zero makes the score infinite.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If the probabilities or targets are malformed.

    Example:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)
        0.6931
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    return -checked.gather(1, labels[:, None]).log().mean().item()


def brier_score(probs: Array, targets: Array) -> float:
    """Mean over examples of Σ_c (p_c − [label = c])², between 0 and 2.

    For two classes this is twice the score that is common for a single probability.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).

    Raises:
        ValueError: If the probabilities or targets are malformed.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        0.5
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    truth = torch.zeros_like(checked).scatter_(1, labels[:, None], 1.0)  # (N, C)
    return (checked - truth).square().sum(dim=1).mean().item()
