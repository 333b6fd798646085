"""Eval mode in which adapters act and gradients flow. Three kinds of layers need more than ``module.eval()``.

- Torch's encoder layers take a fused path in eval mode that ignores adapters: :func:`without_fused_path`.
- Layers of transformers with gradient checkpointing recompute in training mode alone:
  :func:`checkpointing_in_eval_mode`.
- bitsandbytes packs 4-bit weights on a CPU in eval mode, and no gradient flows through them: :func:`four_bit_on_cpu`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from bayes_kf.models.model_lock import model_lock

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

_lock = threading.Lock()
_num_inside, _enabled_before = 0, True


class EvalMode:
    """Context managers in which every module of a model is in eval mode.

    Afterwards, also after an error, each module has its own mode again. Other threads wait outside.

    Args:
        model: its modules are listed once.

    Raises:
        ValueError: on entering, if 4-bit weights were packed for inference.

    Example:
        >>> model = nn.Dropout()
        >>> with EvalMode(model)():
        ...     model.training
        False
        >>> model.training
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, list(model.modules())
        self._has_fused_path = has_fused_path(self._modules)
        self._four_bit = four_bit_on_cpu(self._modules)
        self._checkpointing = checkpointing_layers(self._modules)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context manager for one use."""
        with model_lock(self._model):
            if self._four_bit:
                check_unpacked(self._four_bit)
            changed: list[nn.Module] = []
            recomputed: list[nn.Module] = []
            for module in self._modules:
                if module.training and module in self._checkpointing and module.gradient_checkpointing:
                    recomputed.append(module)
                elif module.training != (module in self._four_bit):
                    changed.append(module)
            fused = without_fused_path() if self._has_fused_path else nullcontext()
            try:
                for module in changed:
                    module.training = not module.training
                with fused, checkpointing_in_eval_mode(recomputed) if recomputed else nullcontext():
                    yield
            finally:
                for module in changed:
                    module.training = not module.training


def has_fused_path(modules: Iterable[nn.Module]) -> bool:
    """Whether a model has layers that may take torch's fused path."""
    return any(isinstance(module, FUSED) for module in modules)


@contextmanager
def without_fused_path() -> Iterator[None]:
    """Disables the fused path of torch's encoder layers, for all threads.

    In eval mode these layers pass the weights of their Linear layers to one fused kernel, which ignores the low-rank
    branches that PEFT adds. The switch is global. The last thread that leaves sets it as it was.
    """
    global _num_inside, _enabled_before
    with _lock:
        if _num_inside == 0:
            _enabled_before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                torch.backends.mha.set_fastpath_enabled(_enabled_before)


def four_bit_on_cpu(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers that bitsandbytes packs in eval mode, on processors that it has a kernel for.

    That kernel returns outputs without a graph. In training mode, which changes nothing else in these layers, they are
    not packed. The class is recognized by its name, so bitsandbytes is not imported.
    """
    return [module for module in modules if _is_four_bit(module) and module.weight.device.type == "cpu"]


def check_unpacked(layers: Iterable[nn.Module]) -> None:
    """Raises ValueError if one of these layers was packed before."""
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "`model` must have 4-bit weights that gradients flow through, got ones that bitsandbytes packed for "
                "inference when the model was called in eval mode on this CPU: load it again, in training mode."
            )


def _is_four_bit(module: nn.Module) -> bool:
    return any(k.__name__ == "Linear4bit" and k.__module__.startswith("bitsandbytes") for k in type(module).__mro__)


def checkpointing_layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers of transformers that can recompute in the backward pass; recognized by their class's name."""
    kinds = "GradientCheckpointingLayer"
    return [module for module in modules if any(kind.__name__ == kinds for kind in type(module).__mro__)]


@contextmanager
def checkpointing_in_eval_mode(layers: list[nn.Module]) -> Iterator[None]:
    """Runs the code of checkpointed layers in eval mode, in the forward pass and when the backward pass recomputes.

    The layers themselves stay in training mode, without which they do not checkpoint. Without gradients they neither
    recompute nor call their checkpoint function, so hooks set their mode.
    """
    originals = [(layer, layer.__dict__.get("_gradient_checkpointing_func")) for layer in layers]
    handles = []
    try:
        for layer, original in originals:
            if original is not None:
                layer.__dict__["_gradient_checkpointing_func"] = _in_eval_mode(layer, original)
            handles.append(layer.register_forward_pre_hook(_evaluate_without_gradients))
            handles.append(layer.register_forward_hook(_train_again, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, original in originals:
            layer.training = True
            if original is not None:
                layer.__dict__["_gradient_checkpointing_func"] = original


def _evaluate_without_gradients(layer: nn.Module, args: Any) -> None:
    layer.training = torch.is_grad_enabled()


def _train_again(layer: nn.Module, args: Any, output: Any) -> None:
    layer.training = True


def _in_eval_mode(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's checkpoint function, which runs the layer's code in eval mode."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def evaluate(*inner_args: Any, **inner_kwargs: Any) -> Any:
            mode, layer.training = layer.training, False
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                layer.training = mode

        return checkpoint(evaluate, *args, **kwargs)

    return run
