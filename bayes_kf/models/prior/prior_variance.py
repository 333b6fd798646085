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


def logit_variance(
    gains: Sequence[float], squares: Sequence[float], modules: Sequence[str], logit_sd: float, spread: str
) -> list[float]:
    """Prior variance of every tensor under which the outputs have standard deviation ``logit_sd``.

    A tensor with gain g (mean of ‖J_bj‖² over examples and outputs, its own columns) and variance c adds c·g to the
    prior variance of the outputs. With ``spread`` "constant" all tensors share one c: whichever tensors have most gain
    hold nearly all of that variance. With "tensors" each adds the same share, c = share/g: a tensor that the outputs
    hardly see, as LoRA's B behind a freshly drawn head, gets a variance that explodes once they do. "modules" lies
    halfway: the tensors of a module share one c ∝ 1/√g, g the module's gain, so that it adds a share ∝ √g.

    A tensor without gain, as LoRA's A is while B = 0, has no say in the outputs yet and gets the mean square of its own
    start. The scales of A and B are not identified, so this is a choice, and ours; LoKO has none of these rules.

    Args:
        gains: per tensor, at the prior mean.
        squares: mean square of every tensor's elements at the prior mean.
        modules: per tensor, the name of its module; only "modules" looks at it.
        logit_sd: wanted standard deviation of the outputs, in their own unit (logits for classifiers).
        spread: "modules", "tensors" or "constant".

    Raises:
        ValueError: when no output depends on any parameter.

    Example:
        >>> logit_variance([1.0, 8.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.01], ["a", "b", "b", "c"], 2.0, "modules")
        [1.0, 0.3333333333333333, 0.3333333333333333, 0.01]
        >>> logit_variance([2.0, 8.0, 0.0], [1.0, 1.0, 0.01], ["a", "b", "c"], 2.0, "tensors")
        [1.0, 0.25, 0.01]
        >>> logit_variance([2.0, 8.0, 0.0], [1.0, 1.0, 0.01], ["a", "b", "c"], 2.0, "constant")
        [0.4, 0.4, 0.4]
    """
    total = sum(gains)
    if not 0.0 < total < float("inf"):
        raise ValueError(
            f"`initial_logit_sd` needs outputs that depend on the trainable tensors, got a gain of {total:g}."
        )
    if spread == "constant":
        return [logit_sd**2 / total] * len(gains)
    groups = list(modules) if spread == "modules" else [str(index) for index in range(len(gains))]
    seen = [gain > SMALLEST_GAIN * total for gain in gains]
    group_gains: dict[str, float] = {}
    for group, gain, sees in zip(groups, gains, seen, strict=True):
        if sees:
            group_gains[group] = group_gains.get(group, 0.0) + gain
    power = 0.5 if spread == "modules" else 1.0
    scale = logit_sd**2 / sum(gain ** (1.0 - power) for gain in group_gains.values())
    variances = {group: scale / gain**power for group, gain in group_gains.items()}
    smallest = min(variances.values())
    return [
        variances[group] if sees else square or smallest
        for group, square, sees in zip(groups, squares, seen, strict=True)
    ]
