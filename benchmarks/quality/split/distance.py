"""Distances from the training set in the frozen network, and their rank correlation with epistemic entropy."""

from __future__ import annotations

import torch
from peft.utils.other import ModulesToSaveWrapper
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.common.learners import Stream, logits
from benchmarks.quality.rows import AHEAD


@torch.no_grad()
def features(model: nn.Module, stream: Stream) -> Tensor:
    """The inputs of the classifier, (N, d), float64.

    Args:
        model: a PEFT model at its start, where LoRA's B is zero: its features are those of the frozen network.
        stream: inputs; labels are not used.

    Raises:
        ValueError: if the model has no classifier in PEFT's ``modules_to_save``.
    """
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    if not heads:
        got = f"{type(model).__name__} without one"
        raise ValueError(f"`model` must have a classifier in `modules_to_save`, got {got}.")
    seen: list[Tensor] = []
    hook = heads[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).double()))
    try:
        for inputs, _ in stream.batches(AHEAD):
            logits(model, inputs)
    finally:
        hook.remove()
    return torch.cat(seen)


def nearest_distance(train: Tensor, test: Tensor) -> Tensor:
    """The Euclidean distance of each test example (M, d) to its nearest training example (N, d), (M,).

    Features are divided by their standard deviation over the training examples; constant features do not count.

    Example:
        >>> train = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
        >>> nearest_distance(train, torch.tensor([[3.0, 9.0]], dtype=torch.float64)) * 2**0.5
        tensor([1.], dtype=torch.float64)
    """
    sd = train.std(0)
    varies = sd > 0
    return torch.cdist(test[:, varies] / sd[varies], train[:, varies] / sd[varies]).min(1).values


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation of two vectors (N,), equal values with their mean rank; None if one is constant.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.4, 0.5]))
        1.0
    """
    if bool((one == one[0]).all()) or bool((other == other[0]).all()):
        return None
    return round(float(spearmanr(one.numpy(), other.numpy()).statistic), 12)
