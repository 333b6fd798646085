"""Predictions of tokens, pixels or several labels as a list of examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import SUM_TOLERANCE, as_float, as_numpy, plain_array

IGNORED = -100  # a target that does not count, as in PyTorch


class Flattened(NamedTuple):
    """Predictions and targets of N examples.

    Attributes:
        probs: Class probabilities, (N, C), not checked.
        targets: Class indices, (N,), not checked.
        note: How the examples came about, a sentence; empty if they were given one by one.
        inputs: The number of the input that each example is part of, (N,); None if they were given one by one.
    """

    probs: Any
    targets: Any
    note: str = ""
    inputs: Tensor | None = None


def flattened(probs: Any, targets: Any) -> Flattened:
    """Tokens, pixels and several labels as examples; others as they are.

    - Classes of tokens (B, T, C) or of pixels (B, C, H, W), with targets of the shape without C, of which -100 does
      not count.
    - Several labels (N, L): probabilities whose rows do not sum to one, with targets of zeros and ones of that shape.

    Args:
        probs: Probabilities.
        targets: Targets.

    Raises:
        ValueError: If the shapes do not fit, or no target counts.

    Example:
        >>> flat = flattened(torch.full((2, 3, 4), 0.25), torch.tensor([[0, 1, -100], [2, -100, -100]]))
        >>> flat.probs.shape, flat.targets.tolist()
        (torch.Size([3, 4]), [0, 1, 2])
    """
    shape, wanted = (tuple(getattr(plain_array(values), "shape", ())) for values in (probs, targets))
    if len(shape) > 2:
        return _places(as_float(probs, "probs"), as_float(targets, "targets").long())
    if len(shape) == 2 and shape[1] > 1 and shape == wanted:
        given, answers = as_float(probs, "probs"), as_float(targets, "targets")
        if bool(((given.sum(dim=1) - 1).abs() > SUM_TOLERANCE).any()) and bool((given <= 1).all()):
            return _labels(given, answers)
    return Flattened(probs, targets)


def of_inputs(values: Any, inputs: Tensor, count: int) -> Any:
    """Weights or clusters of B = `count` inputs as those of their N parts; others as they are."""
    if values is None:
        return None
    own = as_numpy(values)
    return own[inputs.numpy()] if own.shape == (count,) else own


def _places(probs: Tensor, targets: Tensor) -> Flattened:
    """Tokens or pixels."""
    if probs.shape[:-1] == targets.shape:
        moved, word = probs, "tokens" if targets.ndim == 2 else "places"
    elif (probs.shape[0], *probs.shape[2:]) == tuple(targets.shape):
        moved, word = probs.movedim(1, -1), "tokens" if targets.ndim == 2 else "pixels"
    else:
        raise ValueError(
            "`targets` must have the shape of `probs` without its last or second dimension, "
            f"got {tuple(targets.shape)} with {tuple(probs.shape)}."
        )
    counted = targets != IGNORED
    if not bool(counted.any()):
        raise ValueError(f"`targets` must have an entry that counts, got {IGNORED} everywhere.")
    inputs = counted.nonzero()[:, 0]
    note = _note(int(counted.sum()), word, len(inputs.unique()))
    return Flattened(moved[counted], targets[counted], note, inputs)


def _labels(probs: Tensor, targets: Tensor) -> Flattened:
    """Several labels."""
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError("`targets` of several labels must be zeros and ones, got others.")
    second = probs.flatten()
    probs = torch.stack([1 - second, second], dim=1)
    size, number = targets.shape
    inputs = torch.arange(size).repeat_interleave(number)
    note = _note(second.numel(), "yes-or-no labels", size)
    return Flattened(probs, targets.flatten().long(), note, inputs)


def _note(number: int, word: str, num_inputs: int) -> str:
    if num_inputs == 1:
        return (
            f"The {number:,} {word} of the one input count as independent, so intervals and null bands are too narrow."
        )
    return f"The {number:,} {word} are those of {num_inputs:,} inputs; intervals and null bands allow for that."
