"""Prior variance rules: p₀ of every parameter, before any target is seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_GAIN_SHARE = 1e-8  # of the gain of all tensors; a tensor below it has no effect on the outputs


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

    A tensor with gain g (mean of ‖J_bj‖² over examples and outputs, in the tensor's columns) and variance c adds c·g to
    the prior variance of the outputs. With ``spread`` "constant" all tensors have one c, and the tensors with most gain
    hold nearly all of that variance; "bounded" too, before ``filtering/prior.py`` narrows the adapter layers.
    With "tensors" each tensor adds the same share, c = share/g. Then a tensor with little effect, such as LoRA's B
    behind a new head, gets a variance that is far too large once the head has learned. "modules" is between the two:
    the tensors of a module have one c ∝ 1/√g, g the module's gain, and add a share ∝ √g.

    A tensor without gain, such as LoRA's A while B = 0, has no effect on the outputs yet. Its variance is the mean
    square of its initial values. The scales of A and B are not identified, so this is a choice, and ours; LoKO has none
    of these rules.

    Args:
        gains: per tensor, at the prior mean.
        squares: mean square of every tensor's elements at the prior mean.
        modules: per tensor, the name of its module; only "modules" uses it.
        logit_sd: standard deviation of the outputs, in their own unit (logits for classifiers).
        spread: "modules", "tensors", "constant" or "bounded".

    Raises:
        ValueError: if no output depends on any parameter.

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
    if spread in ("constant", "bounded"):
        return [logit_sd**2 / total] * len(gains)
    groups = list(modules) if spread == "modules" else [str(index) for index in range(len(gains))]
    has_effect = [gain > MIN_GAIN_SHARE * total for gain in gains]
    group_gains: dict[str, float] = {}
    for group, gain, effective in zip(groups, gains, has_effect, strict=True):
        if effective:
            group_gains[group] = group_gains.get(group, 0.0) + gain
    power = 0.5 if spread == "modules" else 1.0
    scale = logit_sd**2 / sum(gain ** (1.0 - power) for gain in group_gains.values())
    variances = {group: scale / gain**power for group, gain in group_gains.items()}
    smallest = min(variances.values())
    return [
        variances[group] if effective else square or smallest
        for group, square, effective in zip(groups, squares, has_effect, strict=True)
    ]
