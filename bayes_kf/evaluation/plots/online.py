"""Figures of a stream and of the belief behind it. Each draws on `ax` (or a new one) and returns it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.online.innovations import innovation_health
from bayes_kf.evaluation.online.prequential import moving_average, running_accuracy
from bayes_kf.evaluation.plots.reliability import BLUE, SKY, VERMILLION, _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PEFT_PARTS = re.compile(
    r"(?:(\.lora_\w+)\.\w+(?:\.weight)?$|\.modules_to_save\.\w+(?=\.))"
)  # an adapter's name is one part


def online_curves(history: Mapping[str, Array], *, window: int = 100, ax: Axes | None = None) -> Axes:
    """Running accuracy (left scale) and the moving mean of the log loss (right scale) over a stream.

    Args:
        history: "log_loss" and, where there are labels to be right about, "correct": one value for each example, taken
            before its update.
        window: Examples in the moving mean, at most the length of the stream.
        ax: Where to draw; the right scale is a twin of it.

    Raises:
        ValueError: If neither series is there, or one is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = online_curves({"correct": torch.ones(5), "log_loss": torch.zeros(5)}, window=2, ax=ax)
        >>> ax.get_lines()[0].get_ydata().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if not {"correct", "log_loss"} & set(history):
        raise ValueError(f"`history` must hold correct or log_loss, got {sorted(history)}.")
    ax = _axes(ax)
    if "correct" in history:
        accuracy = running_accuracy(history["correct"])
        alone = "." if len(accuracy) == 1 else None
        ax.plot(np.arange(1, len(accuracy) + 1), accuracy.numpy(), color=BLUE, marker=alone, label="running accuracy")
        ax.set(ylim=(0, 1.02))
        ax.set_ylabel("running accuracy (solid)", color=BLUE)
    if "log_loss" in history:
        right = ax.twinx() if "correct" in history else ax
        loss = moving_average(history["log_loss"], window)
        steps = np.arange(window, window + len(loss))
        alone = "." if len(loss) == 1 else None  # a line of one point is not seen
        label = f"log loss, mean of {window}"
        right.plot(steps, loss.numpy(), color=VERMILLION, linestyle="--", marker=alone, label=label)
        right.set_ylabel(f"log loss, mean of {window} (dashed, nats)", color=VERMILLION)
        if loss.min() >= 0:  # of densities it may be negative
            right.set_ylim(bottom=0)
    ax.set_xlabel("examples seen")
    ax.grid(alpha=0.3)
    return ax


def innovation_plot(
    nis: Array, dof: Array | int, *, window: int = 100, level: float = 0.95, ax: Axes | None = None
) -> Axes:
    """Windowed innovation ratio over the stream with the band of a consistent filter.

    Args:
        nis: Normalized innovation squared of each update, (T,).
        dof: Degrees of freedom of each update, (T,), or one number for all.
        window: Updates in a window, at most T.
        level: Probability that a consistent filter stays in the band, at each step.
        ax: Where to draw.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> _ = innovation_plot(torch.ones(20), dof=1, window=5, ax=ax)
        >>> ax.get_lines()[0].get_ydata().tolist() == [1.0] * 16
        True
    """
    health = innovation_health(nis, dof, window, level)
    steps = health.step.numpy()
    ax = _axes(ax)
    label = f"consistent filter: {level:.0%} of chance"
    if len(steps) == 1:  # a line and a band of one point are not seen
        ax.plot(steps, health.ratio.numpy(), "o", color=BLUE, label=f"mean of {window} updates")
        ax.vlines(steps, health.low.numpy(), health.high.numpy(), color=SKY, linewidth=6, alpha=0.6, label=label)
    else:
        ax.plot(steps, health.ratio.numpy(), color=BLUE, label=f"mean of {window} updates")
        ax.fill_between(steps, health.low.numpy(), health.high.numpy(), color=SKY, alpha=0.35, label=label)
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="updates", ylabel="innovation² / degrees of freedom")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    return ax


def variance_by_tensor(
    variance: Mapping[str, Array],
    prior_variance: Mapping[str, Array] | None = None,
    *,
    max_tensors: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Mean posterior variance of each tensor as a point on a logarithmic scale, relative to its prior's if given.

    A tensor without any variance has no place on that scale: it is left out and counted below.

    Args:
        variance: Name to posterior variances of each tensor, any shape.
        prior_variance: Name to prior variances, of the same names and shapes.
        max_tensors: Tensors to draw; the first ones are kept and the number left out is written below.
        ax: Where to draw.

    Raises:
        ValueError: If the mapping is empty, a prior is missing, a mean is negative, or that of a prior zero.

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
    some = {name: mean for name, mean in means.items() if mean > 0}
    names = list(some)[:max_tensors]
    ax = _axes(ax)
    ax.plot([means[name] for name in names], range(len(names)), "o", color=BLUE)  # a bar has no foot on a log scale
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), short_names(names), fontsize=8)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.grid(alpha=0.4)
    more, without = len(some) - len(names), len(means) - len(some)
    left_out = f" ({more} more tensors not drawn)" if more else ""
    left_out += f" ({without} without variance not drawn)" if without else ""
    quantity = "mean posterior variance" if prior_variance is None else "posterior / prior variance"
    ax.set_xlabel(quantity + left_out)
    return ax


def output_variance_plot(
    output_variance: Mapping[str, float], *, max_tensors: int = 40, ax: Axes | None = None
) -> Axes:
    """What each tensor contributes to the variance of the outputs: a bar for each, or for the largest.

    Args:
        output_variance: Name of a tensor to its contribution, as `Posterior.output_variance` gives it. A negative one
            takes away, by its covariances, from what others contribute.
        max_tensors: Tensors to draw, in their order; the number left out is written below.
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
    kept = set(sorted(output_variance, key=lambda name: -abs(output_variance[name]))[:max_tensors])
    names = [name for name in output_variance if name in kept]
    ax = _axes(ax)
    ax.barh(range(len(names)), [output_variance[name] for name in names], color=SKY, edgecolor="black", linewidth=0.6)
    ax.set_yticks(range(len(names)), short_names(names), fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.4)
    left_out = len(output_variance) - len(names)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel("contribution to the variance" + (f" ({left_out} smaller ones not drawn)" if left_out else ""))
    return ax


def short_names(names: list[str]) -> list[str]:
    """Names without the dotted parts that all share at either end; each keeps at least its last part of its own.

    What PEFT adds, an adapter's name and the "weight" of a LoRA factor, is left out where names stay different.

    Example:
        >>> short_names(["base.model.0.lora_A.default.weight", "base.model.0.lora_B.default.weight"])
        ['lora_A', 'lora_B']
        >>> short_names(["m.0.q.lora_A.default.weight", "m.head.modules_to_save.default.bias"])
        ['0.q.lora_A', 'head.bias']
    """
    plain = [PEFT_PARTS.sub(lambda found: found[1] or "", name) for name in names]
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
    """Mean of each tensor, which must not be negative."""
    means = {key: as_float(values, name).mean().item() for key, values in tensors.items()}
    worst = min(means, key=lambda key: means[key])
    if means[worst] < 0:
        raise ValueError(f"`{name}` must not be negative on average, got {means[worst]:.3g} for {worst}.")
    return means
