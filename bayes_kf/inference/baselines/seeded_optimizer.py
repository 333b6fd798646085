"""What the optimizers here share: a model's trained tensors, drawn labels, exact resuming, checks of arguments."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class SeededOptimizer(torch.optim.Optimizer):
    """An optimizer over a model's trained tensors with a generator of its own.

    What watches the model is taken off by :meth:`close`, at the end of a ``with`` block, or with the optimizer itself.

    Args:
        model: whose tensors with ``requires_grad`` are optimized.
        defaults: of the parameter group.
        seed: of what is drawn.
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
        weakref.finalize(self, remove, self._handles).atexit = False

    def close(self) -> None:
        """Watch the model no longer; nothing is learned after that."""
        remove(self._handles)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the generator and the count of updates."""
        return super().state_dict() | {"generator": self._generator.get_state(), "updates": self._updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            ValueError: for the state of an optimizer of another kind, or of another model.
        """
        missing = [name for name in ("generator", "updates") if name not in state_dict]
        if missing:
            raise ValueError(f"`state_dict` must have {' and '.join(missing)}, got {', '.join(state_dict)}.")
        super().load_state_dict(dict(state_dict))
        for index, saved in state_dict["state"].items():  # in the precision that they were kept in
            parameter = self._parameters()[index]
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)
        self._generator.set_state(state_dict["generator"].cpu())
        self._updates, self._ready = int(state_dict["updates"]), False

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _drawn_labels(self, outputs: Tensor) -> Tensor:
        """Labels drawn from softmax of the outputs, (B,)."""
        probs = outputs.detach().double().softmax(1).cpu()
        return torch.multinomial(probs, 1, generator=self._generator).squeeze(1).to(outputs.device)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("`backward` needs an optimizer that watches its model, got one that was closed.")

    def _check_step(self, closure: None) -> None:
        """Whether a step may follow."""
        if closure is not None:
            raise ValueError("`closure` must be None: call `backward(loss, outputs)` before `step()`, got a closure.")
        if not self._ready:
            raise RuntimeError("`step` needs `backward(loss, outputs)` before it, got none since the last step.")


def remove(handles: list[RemovableHandle]) -> None:
    """Take hooks off."""
    while handles:
        handles.pop().remove()


def check_finite(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise FloatingPointError where an entry is infinite or no number."""
    if not all(bool(torch.isfinite(values).all()) for values in tensors):
        raise FloatingPointError(f"the {what} are not finite; the parameters are as they were")


def check_outputs(outputs: Tensor) -> None:
    """Raise ValueError for what are not logits with a graph, FloatingPointError where they are not finite."""
    if outputs.ndim != 2 or not outputs.requires_grad:
        raise ValueError(f"`outputs` must be logits (B, m) with a graph, got shape {tuple(outputs.shape)}.")
    check_finite("outputs", [outputs])


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless ``betas`` are two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0 <= value < 1 for value in betas):
        raise ValueError(f"`betas` must be two numbers in [0, 1), got {betas!r}.")
