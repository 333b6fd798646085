"""The state of a guide in Pyro's global parameter store."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.pyro import stored_state


class StoredState:
    """A state as it was read from the store, and what a guide computes from it once.

    Attributes:
        state: with the mean of its belief as it was at the last update; the guide's ``loc`` is the present one.
        revisited: number of examples in further passes over data that the state has learned.
    """

    def __init__(self, kf: KalmanFilter, state: FilterState, revisited: int) -> None:
        self.state, self.revisited, self._kf = state, revisited, kf

    @cached_property
    def temperature(self) -> float:
        """T."""
        return self._kf.temperature(self.state)

    @cached_property
    def marginal_sd(self) -> Tensor:
        """√diag(P), (n,)."""
        return self.state.belief.marginal_variance().sqrt()

    @cached_property
    def root(self) -> Callable[[Tensor], Tensor]:
        """The map z → Lz, LLᵀ = P."""
        return self.state.belief.root()

    @cached_property
    def half_log_determinant(self) -> Tensor:
        """½ log det P, a scalar in float64."""
        return 0.5 * self.state.belief.log_determinant()


class GuideStore:
    """Writes the state of a guide into Pyro's parameter store, and reads it from there.

    The guide follows the store: it takes entries that were replaced (``set_state``). If the entries are gone
    (``clear``), it writes its last ones again, as every PyroModule does.

    Args:
        guide: a PyroModule with the PyroParams ``loc`` and ``scale``.
        kf: the filter.
        start: a state; it is written when there is none in the store.
    """

    def __init__(self, guide: PyroModule, kf: KalmanFilter, start: FilterState) -> None:
        self._guide, self._kf = guide, kf
        self._tensors = stored_state.to_tensors(start)  # the last entries, without loc and scale
        self._read: StoredState | None = None

    def write(self, state: FilterState, revisited: int = 0, keep_params: bool = False) -> None:
        """Put a state into the store.

        Args:
            state: the mean of its belief becomes ``loc``, and ``scale`` becomes 1.
            revisited: see :class:`StoredState`.
            keep_params: whether ``loc`` and ``scale`` stay as they are.
        """
        _refuse_local_params()
        self._tensors, self._read = stored_state.to_tensors(state, revisited), None
        self._put_tensors()
        if not keep_params:
            # new tensors, so that a state of the store from before does not change
            mean = state.belief.mean.detach().clone()
            put_param(self._guide, "loc", nn.Parameter(mean), constraints.real)
            put_param(self._guide, "scale", nn.Parameter(torch.zeros_like(mean)), constraints.positive)  # log scale

    def read(self) -> StoredState:
        """The state in the store.

        Raises:
            ValueError: if it is not a state of this model and these settings.
        """
        _refuse_local_params()
        entries, name = pyro.get_param_store()._params, self._guide._pyro_name
        if f"{name}.counts" not in entries:
            self._put_tensors()
        present = {key: entries.get(f"{name}.{key}") for key in self._tensors}
        if self._read is not None and all(present[key] is tensor for key, tensor in self._tensors.items()):
            return self._read
        tensors = {key: tensor for key, tensor in present.items() if tensor is not None}
        if missing := sorted(set(present) - set(tensors)):
            raise ValueError(f"`name` {name!r} must have a whole state in the parameter store, got no {missing[0]}.")
        try:
            detached = {key: tensor.detach() for key, tensor in tensors.items()}
            parsed = stored_state.from_tensors(self._kf, self._guide.loc.detach(), detached)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`name` {name!r} must have a state of this model and config, got: {error}.") from error
        self._tensors, self._read = tensors, StoredState(self._kf, *parsed)
        return self._read

    def _put_tensors(self) -> None:
        for key, tensor in self._tensors.items():
            _put(f"{self._guide._pyro_name}.{key}", tensor, constraints.real)


def put_param(guide: PyroModule, key: str, unconstrained: nn.Parameter, constraint: Any) -> None:
    """Replace a PyroParam of a guide as PyroModule does: one Parameter in the store and in the module.

    A state of the store that was taken before does not change.
    """
    _put(f"{guide._pyro_name}.{key}", unconstrained, constraint)
    guide._parameters[f"{key}_unconstrained"] = unconstrained


def _put(name: str, unconstrained: Tensor, constraint: Any) -> None:
    """Replace an entry of the store. The store's own ``__setitem__`` would keep the old tensor alive."""
    store = pyro.get_param_store()
    before = store._params.pop(name, None)
    if before is not None:
        store._param_to_name.pop(before, None)
    store._params[name], store._constraints[name] = unconstrained, constraint
    store._param_to_name[unconstrained] = name


def _refuse_local_params() -> None:
    """Raise ValueError if modules have parameter stores of their own."""
    if pyro.settings.get("module_local_params"):
        raise ValueError(
            "`module_local_params` of pyro.settings must be False, since the state of the guide is in the global "
            "parameter store, got True."
        )
