"""Scores of predicted class probabilities against the observed labels."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.resampling.binning import classwise_bins
from bayes_kf.evaluation.score import ROUNDING, Score


class BrierParts(NamedTuple):
    """brier = miscalibration − resolution + uncertainty + within."""

    brier: float
    miscalibration: float  # squared distance of mean probability and frequency over the bins; lower is better
    resolution: float  # squared distance of the bins' frequencies from the overall frequency; higher is better
    uncertainty: float  # Brier score of the overall frequencies
    within: float  # variance of probabilities inside the bins minus twice their covariance with the labels


def accuracy(probs: Array, targets: Array) -> float:
    """Share of examples whose most probable class is the label; ties are broken in favour of the first class.

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

    Probabilities are not clipped: a label of probability zero makes the score infinite.

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
    return log_losses(checked, as_targets(targets, checked)).mean().item()


def brier_score(probs: Array, targets: Array) -> float:
    """Mean over examples of Σ_c (p_c − [label = c])², between 0 and 2.

    For two classes this is twice the Brier score of a single probability.

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
    return brier_scores(checked, as_targets(targets, checked)).mean().item()


def ranked_probability_score(probs: Array, targets: Array) -> float:
    """RPS of ordered classes: mean of Σ_k (F_k − [label ≤ k])², where F_k is the total probability of classes up to k.

    It is between 0 and C − 1; for two classes it is half the Brier score. Probability far from the label costs more.

    Args:
        probs: Class probabilities, (N, C), classes in order.
        targets: Class indices, (N,).

    Raises:
        ValueError: If the probabilities or targets are malformed.

    Reference: Epstein, *A scoring system for probability forecasts of ranked categories*, 1969.

    Example:
        >>> ranked_probability_score(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0]))
        2.0
    """
    checked = as_probs(probs)
    return ranked_probability_scores(checked, as_targets(targets, checked)).mean().item()


def ordinal_error(probs: Array, targets: Array) -> float:
    """Mean distance, in classes, of the label from the median class: the absolute error of ordered classes.

    The median class is the first one up to which the total probability is at least one half; of all answers it has the
    least expected distance. The most probable class may be another.

    Args:
        probs: Class probabilities, (N, C), classes in order.
        targets: Class indices, (N,).

    Raises:
        ValueError: If the probabilities or targets are malformed.

    Example:
        >>> ordinal_error(torch.tensor([[0.4, 0.3, 0.3]]), torch.tensor([2]))
        1.0
    """
    checked = as_probs(probs)
    return ordinal_errors(checked, as_targets(targets, checked)).mean().item()


def weighted_kappa(probs: Array, targets: Array) -> float:
    """Cohen's kappa with quadratic weights: agreement of the most probable class with the label, of ordered classes.

    One minus the mean squared distance, in classes, of answer and label, over that of answers and labels paired at
    random. It is 1 if all answers are right, about 0 if they do not depend on the label, and NaN if all answers and
    labels are one class.

    Args:
        probs: Class probabilities, (N, C), classes in order.
        targets: Class indices, (N,).

    Raises:
        ValueError: If the probabilities or targets are malformed.

    Reference: Cohen, *Weighted kappa*, 1968.

    Example:
        >>> weighted_kappa(torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]]), torch.tensor([0, 2]))
        1.0
    """
    checked = as_probs(probs)
    return kappa_of(checked.argmax(dim=1), as_targets(targets, checked))


def brier_decomposition(probs: Array, targets: Array, num_bins: int = 15) -> BrierParts:
    """Brier score = miscalibration − resolution + uncertainty + within-bin part, each summed over the classes.

    The probabilities of each class are put into bins of equal width. The identity is exact: the fourth part accounts
    for the differences of probabilities inside a bin, which the classical three parts leave out.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        num_bins: Number of bins for each class.

    Raises:
        ValueError: If an argument is malformed.

    Reference: Murphy 1973; the within-bin part: Stephenson, Coelho, Jolliffe 2008.

    Example:
        >>> parts = brier_decomposition(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> parts.brier, parts.miscalibration, parts.resolution, parts.uncertainty
        (0.0, 0.0, 0.5, 0.5)
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    check_positive_int(num_bins, "num_bins")
    bins = classwise_bins(checked, num_bins, "equal_width")
    flat = bins.index.flatten()
    label_bins = bins.index.gather(1, labels[:, None])[:, 0]
    label_probs = checked.gather(1, labels[:, None])[:, 0]
    return brier_parts(
        len(checked),
        checked.shape[1],
        bins.counts,
        bins.confidence_sum,
        torch.bincount(flat, weights=checked.square().flatten(), minlength=bins.num_bins_total),
        torch.bincount(label_bins, minlength=bins.num_bins_total).double(),
        torch.bincount(label_bins, weights=label_probs, minlength=bins.num_bins_total),
    )


def brier_parts(
    num_examples: float, num_classes: int, counts: Tensor, sums: Tensor, squares: Tensor, hits: Tensor, products: Tensor
) -> BrierParts:
    """The parts of the Brier score from sums over the classwise bins, each (C · bins,).

    Args:
        num_examples: The number of examples, N.
        num_classes: The number of classes, C.
        counts: Number of examples.
        sums: Sums of the probabilities p.
        squares: Sums of p².
        hits: Number of examples whose label is the class of the bin.
        products: Sums of p over the hits.
    """
    divisor = counts.clamp(min=1)
    mean, frequency = sums / divisor, hits / divisor
    overall = (hits.view(num_classes, -1).sum(dim=1) / num_examples)[:, None].expand(
        num_classes, len(counts) // num_classes
    )
    miscalibration = (counts * (mean - frequency).square()).sum()
    resolution = (counts * (frequency - overall.flatten()).square()).sum()
    uncertainty = (overall[:, 0] * (1 - overall[:, 0])).sum()
    within = (squares - counts * mean.square() - 2 * (products - mean * hits)).sum()
    brier = squares.sum() - 2 * products.sum() + num_examples
    parts = [part.item() / num_examples for part in (brier, miscalibration, resolution, within)]
    return BrierParts(parts[0], parts[1], parts[2], uncertainty.item(), parts[3])


def brier_part_scores(parts: BrierParts) -> dict[str, Score]:
    """Uncertainty, resolution, reliability and the other summands of the Brier score, under the names of a report."""
    return {f"brier_{name}": Score(value) for name, value in parts._asdict().items() if name != "brier"}


def log_losses(probs: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) of each example of checked probabilities, (N,)."""
    return -probs.gather(1, labels[:, None])[:, 0].clamp(max=1).log()  # above one only by rounding


def brier_scores(probs: Tensor, labels: Tensor) -> Tensor:
    """The Brier score of each example of checked probabilities, (N,)."""
    return probs.square().sum(dim=1) - 2 * probs.gather(1, labels[:, None])[:, 0] + 1


def ordinal_errors(probs: Tensor, labels: Tensor) -> Tensor:
    """Distance of each label from the median class of checked probabilities, (N,)."""
    below = probs.cumsum(dim=1)[:, :-1] < 0.5 - ROUNDING
    return (below.sum(dim=1) - labels).abs().double()


def kappa_of(answers: Tensor, labels: Tensor) -> float:
    """Quadratically weighted kappa of answers and labels, (N,) each."""
    first, second = answers.double(), labels.double()
    observed = (first - second).square().mean()
    expected = first.square().mean() + second.square().mean() - 2 * first.mean() * second.mean()
    return (1 - observed / expected).item()


def ranked_probability_scores(probs: Tensor, labels: Tensor) -> Tensor:
    """The ranked probability score of each example of checked probabilities, (N,)."""
    cumulative = probs.cumsum(dim=1)[:, :-1]
    observed = torch.arange(cumulative.shape[1]) >= labels[:, None]
    return (cumulative - observed.double()).square().sum(dim=1)
