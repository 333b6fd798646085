"""The start of a fit on several processes: the same model, settings and random numbers everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.processes import shared_work
from bayes_kf.processes.launched import working_together
from bayes_kf.processes.random_state import use_random_state_of_first


@contextmanager
def fitting_together(
    model: nn.Module | AdapterModel, loader: Iterable[Any], call: str, *settings: Any
) -> Iterator[None]:
    """Inside, the processes of this run share the work of a fit; one process works as ever.

    Torch's generator for CPUs and those of a DataLoader get the state that they have in the first process, so that all
    processes shuffle alike.

    Args:
        model: of the fit.
        loader: of the fit.
        call: the name of the function.
        settings: its arguments that must be the same everywhere.

    Raises:
        RuntimeError: in every process, if models or settings differ.
    """
    with working_together(call) as begins:
        if begins:
            shared_work.check_same_model(model.model if isinstance(model, AdapterModel) else model, settings)
            use_random_state_of_first(loader)
        yield
