"""A filter's state as named tensors, in which form Pyro's parameter store holds it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.saving.state_file import make_state

COUNTS = ("step", "examples", "noise_step", "scored", "scaled", "revisited")
"""Whole numbers of the state, in one tensor ``counts``; ``revisited`` is the number of examples in further passes."""


def to_tensors(state: FilterState, revisited: int = 0) -> dict[str, Tensor]:
    """All of a state except the mean of its belief, name -> floating-point tensor.

    Whole numbers are float64, which is exact below 2⁵³. Fields of the noise model that are None are tensors without
    elements, so that an older set of tensors in the store replaces every tensor of a newer one.
    """
    parts = {f"belief.{k}": v for k, v in state.belief._asdict().items() if k != "mean"}
    parts |= {f"prior.{k}": v for k, v in state.prior._asdict().items()}
    empty = state.prior.mean.new_zeros(0)
    parts |= {f"noise.{k}": empty if v is None else v for k, v in state.noise._asdict().items() if k != "step"}
    scores = state.temperature_scores
    parts |= {"scores.total": scores.total, "scores.differences": scores.differences}
    counts = (state.step, state.examples, state.noise.step, scores.updates, state.prior_is_scaled, revisited)
    parts["counts"] = torch.tensor(counts, dtype=torch.float64)
    return {k: v.detach() if v.is_floating_point() else v.double() for k, v in parts.items()}


def from_tensors(kf: KalmanFilter, mean: Tensor, tensors: Mapping[str, Tensor]) -> tuple[FilterState, int]:
    """The state of :func:`to_tensors`'s tensors with the mean of its belief, (n,), and ``revisited``.

    Raises:
        TypeError, ValueError: if they do not fit the filter's settings or its model.
    """
    values = [int(count) for count in tensors["counts"].tolist()]
    counts = dict(zip(COUNTS, values, strict=True))
    integers = _integer_types(kf, mean)
    tensors = {k: v.to(integers.get(k, v.dtype)) for k, v in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if v.numel() or not k.startswith("noise.")}
    state = make_state(kf, {**tensors, "belief.mean": mean}, counts | {"scaled": bool(counts["scaled"])})
    return state, counts["revisited"]


def _integer_types(kf: KalmanFilter, mean: Tensor) -> dict[str, torch.dtype]:
    """The types of a belief's tensors that are whole numbers, such as the sizes of blocks."""
    one = torch.empty_like(mean[:1], device="meta")
    belief = kf.config.structure.from_variance(one, one, rank=1, block_sizes=[1])
    return {f"belief.{k}": v.dtype for k, v in belief._asdict().items() if not v.is_floating_point()}
