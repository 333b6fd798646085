"""The base class of the optimizers: trained tensors of a model, labels drawn from it, exact resuming."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class SeededOptimizer(torch.optim.Optimizer):
    """An optimizer over the trained tensors of a model, with its own random generator.

    :meth:`close`, the end of a ``with`` block, or the deletion of the optimizer removes its hooks from the model.

    Args:
        model: its tensors with ``requires_grad`` are optimized.
        defaults: options of the parameter group.
        seed: seed of the random generator.
    """

    def __init__(self, model: nn.Module, defaults: dict[str, Any], seed: int) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be a module, got {type(model).__name__}.")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("`model` must have trainable tensors, got none.")
        super().__init__(parameters, defaults)
        self._generator = torch.Generator().manual_seed(seed)
        self._updates, self._ready, self._closed = 0, False, False
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, remove_hooks, self._handles).atexit = False

    def close(self) -> None:
        """Remove the hooks from the model. A closed optimizer cannot run :meth:`backward`."""
        remove_hooks(self._handles)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of a torch optimizer, the state of the generator and the number of updates."""
        return super().state_dict() | {"generator": self._generator.get_state(), "updates": self._updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state exactly.

        Raises:
            ValueError: if the state belongs to an optimizer of another class, or to another model.
        """
        missing = [name for name in ("generator", "updates") if name not in state_dict]
        if missing:
            raise ValueError(f"`state_dict` must have {' and '.join(missing)}, got {', '.join(state_dict)}.")
        super().load_state_dict(dict(state_dict))
        for index, saved in state_dict["state"].items():  # torch casts them to the dtype of the parameter
            parameter = self._parameters()[index]
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)
        self._generator.set_state(state_dict["generator"].cpu())
        self._updates, self._ready = int(state_dict["updates"]), False

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _draw_labels(self, outputs: Tensor) -> Tensor:
        """Labels ỹ ~ softmax(outputs), (B,)."""
        probs = outputs.detach().double().softmax(1).cpu()
        return torch.multinomial(probs, 1, generator=self._generator).squeeze(1).to(outputs.device)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("`backward` needs an open optimizer, got a closed one.")

    def _check_step(self, closure: None) -> None:
        """Raise unless :meth:`backward` ran since the last step."""
        if closure is not None:
            raise ValueError("`closure` must be None: call `backward(loss, outputs)` before `step()`, got a closure.")
        if not self._ready:
            raise RuntimeError("`step` needs `backward(loss, outputs)` before it, got none since the last step.")


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove hooks from their modules and tensors."""
    while handles:
        handles.pop().remove()


def check_finite(name: str, tensors: Iterable[Tensor]) -> None:
    """Raise FloatingPointError if an entry is infinite or NaN."""
    if not all(bool(torch.isfinite(values).all()) for values in tensors):
        raise FloatingPointError(f"the {name} are not finite; the parameters are as they were")


def check_outputs(outputs: Tensor) -> None:
    """Raise ValueError unless ``outputs`` are logits with a graph, FloatingPointError unless they are finite."""
    if outputs.ndim != 2 or not outputs.requires_grad:
        raise ValueError(f"`outputs` must be logits (B, m) with a graph, got shape {tuple(outputs.shape)}.")
    check_finite("outputs", [outputs])


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless ``betas`` are two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0 <= value < 1 for value in betas):
        raise ValueError(f"`betas` must be two numbers in [0, 1), got {betas!r}.")
