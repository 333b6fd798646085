"""Log probabilities instead of logits, for fits from class probabilities alone."""

from torch import Tensor

from bayes_kf.evaluation.inputs import Array, as_probs, as_targets

FLOOR = 1.4e-45  # the smallest positive float32


def log_probs(probs: Tensor) -> Tensor:
    """Logarithms of checked probabilities; probabilities below the floor count as the floor."""
    return probs.clamp(min=FLOOR).log()


def log_probs_and_labels(probs: Array, targets: Array) -> tuple[Tensor, Tensor]:
    """Logarithms of the probabilities, (N, C), and class indices, (N,)."""
    checked = as_probs(probs)
    return log_probs(checked), as_targets(targets, checked)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean of −log softmax(logits) at the labels."""
    return -logits.log_softmax(dim=1).gather(1, labels[:, None]).mean().item()


def check_num_classes(probs: Array, num_classes: int) -> Tensor:
    """Checked probabilities (N, C); raises a ValueError unless C is the number of classes of the fit."""
    checked = as_probs(probs)
    if checked.shape[1] != num_classes:
        raise ValueError(f"`probs` must have the {num_classes} classes of the fit, got {checked.shape[1]}.")
    return checked


def describe_fit(split: str, num_examples: int) -> str:
    """Words for the examples of a fit."""
    return f"fitted on “{split}”, {num_examples:,} examples"
