"""How latent states start and move: prior variance rules and the random walk, before any data is seen."""

from __future__ import annotations

import torch
from torch import Tensor


def constant_variance(num_parameters: int, variance: float) -> Tensor:
    """p₀ = c for every parameter, (n,) (LoKO's method 1)."""
    return torch.full((num_parameters,), variance, dtype=torch.float64)


def uniform_variance(num_parameters: int, upper: float, generator: torch.Generator) -> Tensor:
    """p₀ ~ Uniform(0, c) independently, (n,), never exactly 0 (LoKO's method 2)."""
    draws = 1.0 - torch.rand(num_parameters, generator=generator, dtype=torch.float64)  # (0, 1]
    return upper * draws


def logit_variance(gains: Tensor, logit_sd: float) -> float:
    """The constant prior variance under which the outputs have standard deviation ``logit_sd``.

    The prior variance of output j of example b is c·‖J_bj‖²; c is chosen so that its mean over examples and outputs
    is ``logit_sd``². Our rule, not LoKO's.

    Args:
        gains: ‖J_bj‖² at the prior mean, (B, m).
        logit_sd: wanted standard deviation of the outputs, in their own unit (logits for classifiers).

    Raises:
        ValueError: when no output depends on any parameter.

    Example:
        >>> logit_variance(torch.tensor([[2.0, 6.0]]), 2.0)
        1.0
    """
    gain = float(gains.mean())
    if not 0.0 < gain < float("inf"):
        raise ValueError(f"`initial_logit_sd` needs outputs that depend on the trainable tensors, got a gain of {gain:g}.")
    return logit_sd**2 / gain
