"""The distribution that the site ``member`` chooses among several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

Shape = torch.Size | list[int] | tuple[int, ...]
MEMBER = "member"  # the name of the site


class MemberDistribution(TorchDistribution):
    """p_k(x)^(1/T_k), where k is the value of the site ``member``.

    The temperatures flatten log densities, not draws, as :class:`KalmanModel` explains.

    Args:
        member: k, whole numbers from 0; its shape is broadcast against the batch shapes of the parts.
        parts: p_0, ..., p_(K−1), of one event shape.
        temperatures: T_0, ..., T_(K−1); 1 by default.
    """

    def __init__(
        self, member: Tensor, parts: Sequence[TorchDistribution], temperatures: Sequence[float] | None = None
    ) -> None:
        self.member, self.parts = member, tuple(parts)
        self.temperatures = tuple(temperatures or [1.0] * len(self.parts))
        shape = torch.broadcast_shapes(member.shape, *(part.batch_shape for part in self.parts))
        super().__init__(shape, self.parts[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the parts."""
        return self.parts[0].support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether gradients reach the parts through a draw."""
        return all(part.has_rsample for part in self.parts)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> MemberDistribution:
        """The same for a larger batch shape."""
        shape = torch.Size(batch_shape)
        return MemberDistribution(self.member.expand(shape), [p.expand(shape) for p in self.parts], self.temperatures)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """A draw of the chosen part, (*sample_shape, *batch_shape, *event_shape)."""
        with torch.no_grad():
            return self._chosen([part.sample(sample_shape) for part in self._expanded()])

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """The same with gradients."""
        return self._chosen([part.rsample(sample_shape) for part in self._expanded()])

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_k(value) / T_k."""
        pairs = zip(self.parts, self.temperatures, strict=True)
        return choose(self.member, [part.log_prob(value) / temperature for part, temperature in pairs])

    def _expanded(self) -> list[TorchDistribution]:
        return [part.expand(self.batch_shape) for part in self.parts]

    def _chosen(self, draws: Sequence[Tensor]) -> Tensor:
        return choose(self.member, draws, len(self.event_shape))


def choose(member: Tensor, values: Sequence[Tensor], event_dim: int = 0) -> Tensor:
    """``values[k]`` where ``member`` is k, broadcast.

    Args:
        member: k, of any shape.
        values: of every k; the last ``event_dim`` dimensions are not those of ``member``.
        event_dim: their number.
    """
    index = member.reshape(member.shape + (1,) * event_dim)
    chosen = values[0]
    for k, value in enumerate(values[1:], 1):
        chosen = torch.where(index == k, value, chosen)
    return chosen.expand(torch.broadcast_shapes(index.shape, chosen.shape))
