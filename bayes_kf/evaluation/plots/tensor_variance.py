"""Posterior variance and output variance of each tensor. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.plots.style import BLUE, SKY, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEFT_PARTS = re.compile(
    r"(?:(\.lora_\w+)\.\w+(?:\.weight)?$|\.modules_to_save\.\w+(?=\.))"
)  # the adapter's name is one part


def variance_by_tensor(
    variance: Mapping[str, Array],
    prior_variance: Mapping[str, Array] | None = None,
    *,
    max_tensors: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Mean posterior variance of each tensor on a logarithmic scale, divided by its prior variance if given.

    A tensor of zero variance cannot be drawn on that scale; the axis label states how many there are.

    Args:
        variance: Name to posterior variances of each tensor, any shape.
        prior_variance: Name to prior variances, of the same names and shapes.
        max_tensors: Number of tensors to draw, the first ones; the axis label states how many are left out.
        ax: Where to draw.

    Raises:
        ValueError: If the mapping is empty, a prior is missing, a mean is negative, or a prior's mean is zero.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = variance_by_tensor({"a": torch.full((2, 2), 0.5)}, {"a": torch.ones(2, 2)}, ax=ax)
        >>> ax.get_lines()[0].get_xdata().tolist()
        [0.5]
    """
    if not variance:
        raise ValueError("`variance` must hold at least one tensor, got an empty mapping.")
    means = _means(variance, "variance")
    if prior_variance is not None:
        if set(prior_variance) != set(variance):
            raise ValueError(f"`prior_variance` must name the tensors of `variance`, got {sorted(prior_variance)}.")
        prior = _means(prior_variance, "prior_variance")
        if not all(prior.values()):
            zero = next(name for name, mean in prior.items() if mean == 0)
            raise ValueError(f"`prior_variance` must be positive on average, got 0 for {zero}.")
        means = {name: mean / prior[name] for name, mean in means.items()}
    positive = {name: mean for name, mean in means.items() if mean > 0}
    names = list(positive)[:max_tensors]
    ax = axes_or_new(ax)
    ax.plot(
        [means[name] for name in names], range(len(names)), "o", color=BLUE
    )  # points, not bars: a log scale has no zero
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), short_names(names), fontsize=8)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.grid(alpha=0.4)
    more, without = len(positive) - len(names), len(means) - len(positive)
    left_out = f" ({more} more tensors not drawn)" if more else ""
    left_out += f" ({without} without variance not drawn)" if without else ""
    quantity = "mean posterior variance" if prior_variance is None else "posterior / prior variance"
    ax.set_xlabel(quantity + left_out)
    return ax


def output_variance_plot(
    output_variance: Mapping[str, float], *, max_tensors: int = 40, ax: Axes | None = None
) -> Axes:
    """Contribution of each tensor to the variance of the outputs, as bars.

    Args:
        output_variance: Name of a tensor to its contribution, as `Posterior.output_variance` returns it. Covariances
            with other tensors can make a contribution negative.
        max_tensors: Number of tensors to draw, the largest contributions; the axis label states how many are left out.
        ax: Where to draw.

    Raises:
        ValueError: If the mapping is empty or a contribution is not finite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = output_variance_plot({"a.weight": 0.5, "b.weight": 2.0}, ax=Figure().subplots())
        >>> [float(bar.get_width()) for bar in ax.patches]
        [0.5, 2.0]
    """
    if not output_variance:
        raise ValueError("`output_variance` must hold at least one tensor, got an empty mapping.")
    for name, value in output_variance.items():
        if not np.isfinite(value):
            raise ValueError(f"`output_variance` must be finite, got {value} for {name}.")
    largest = set(sorted(output_variance, key=lambda name: -abs(output_variance[name]))[:max_tensors])
    names = [name for name in output_variance if name in largest]
    ax = axes_or_new(ax)
    ax.barh(range(len(names)), [output_variance[name] for name in names], color=SKY, edgecolor="black", linewidth=0.6)
    ax.set_yticks(range(len(names)), short_names(names), fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.4)
    left_out = len(output_variance) - len(names)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("contribution to the variance" + (f" ({left_out} smaller ones not drawn)" if left_out else ""))
    return ax


def short_names(names: list[str]) -> list[str]:
    """Names without the leading and trailing dotted parts that all of them share; at least one part remains.

    The parts that PEFT adds (the adapter's name and the "weight" of a LoRA factor) are removed too, if the names stay
    different.

    Example:
        >>> short_names(["base.model.0.lora_A.default.weight", "base.model.0.lora_B.default.weight"])
        ['lora_A', 'lora_B']
        >>> short_names(["m.0.q.lora_A.default.weight", "m.head.modules_to_save.default.bias"])
        ['0.q.lora_A', 'head.bias']
    """
    plain = [PEFT_PARTS.sub(lambda match: match[1] or "", name) for name in names]
    names = plain if len(set(plain)) == len(set(names)) else names
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return names
    shortest = min(len(p) for p in parts)
    start = 0
    while start < shortest - 1 and len({p[start] for p in parts}) == 1:
        start += 1
    end = 0
    while end < shortest - 1 - start and len({p[-1 - end] for p in parts}) == 1:
        end += 1
    return [".".join(p[start : len(p) - end]) for p in parts]


def _means(tensors: Mapping[str, Array], name: str) -> dict[str, float]:
    """Mean of each tensor. Raises ValueError if one is negative."""
    means = {key: as_float(values, name).mean().item() for key, values in tensors.items()}
    worst = min(means, key=lambda key: means[key])
    if means[worst] < 0:
        raise ValueError(f"`{name}` must not be negative on average, got {means[worst]:.3g} for {worst}.")
    return means
