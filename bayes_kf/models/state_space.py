"""How latent states start and move: prior variance rules and the random walk, before any data is seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_GAIN = 1e-8  # of all tensors' gain together; a tensor below it has no say in the outputs


def constant_variance(num_parameters: int, variance: float) -> Tensor:
    """p₀ = c for every parameter, (n,) (LoKO's method 1)."""
    return torch.full((num_parameters,), variance, dtype=torch.float64)


def uniform_variance(num_parameters: int, upper: float, generator: torch.Generator) -> Tensor:
    """p₀ ~ Uniform(0, c) independently, (n,), never exactly 0 (LoKO's method 2)."""
    draws = 1.0 - torch.rand(num_parameters, generator=generator, dtype=torch.float64)  # (0, 1]
    return upper * draws


def logit_variance(gains: Sequence[float], squares: Sequence[float], logit_sd: float, spread: str) -> list[float]:
    """Prior variance of every tensor under which the outputs have standard deviation ``logit_sd``.

    A tensor with gain g (mean of ‖J_bj‖² over examples and outputs, its own columns) and variance c adds c·g to the
    prior variance of the outputs. With ``spread`` "constant" all tensors share one c. With "tensors" each adds the same
    share; one without gain, as LoRA's A is while B = 0, has no say in the outputs yet and gets the mean square of its
    own start. The scales of A and B are not identified, so this is a choice, and ours; LoKO has neither rule.

    Args:
        gains: per tensor, at the prior mean.
        squares: mean square of every tensor's elements at the prior mean.
        logit_sd: wanted standard deviation of the outputs, in their own unit (logits for classifiers).
        spread: "tensors" or "constant".

    Raises:
        ValueError: when no output depends on any parameter.

    Example:
        >>> logit_variance([2.0, 8.0, 0.0], [1.0, 1.0, 0.01], 2.0, "tensors")
        [1.0, 0.25, 0.01]
        >>> logit_variance([2.0, 8.0, 0.0], [1.0, 1.0, 0.01], 2.0, "constant")
        [0.4, 0.4, 0.4]
    """
    total = sum(gains)
    if not 0.0 < total < float("inf"):
        raise ValueError(
            f"`initial_logit_sd` needs outputs that depend on the trainable tensors, got a gain of {total:g}."
        )
    if spread == "constant":
        return [logit_sd**2 / total] * len(gains)
    seen = [gain > SMALLEST_GAIN * total for gain in gains]
    share = logit_sd**2 / sum(seen)
    smallest = min(share / gain for gain, sees in zip(gains, seen, strict=True) if sees)
    return [
        share / gain if sees else square or smallest for gain, square, sees in zip(gains, squares, seen, strict=True)
    ]
