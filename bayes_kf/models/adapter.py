"""A model as a function of its trainable tensors: the latent vector of the filter."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bayes_kf.models.eval_mode import has_fused, layer_by_layer
from bayes_kf.models.module_restoring import Before, remembered, restored
from bayes_kf.models.peft_adapters import adapter_tensors
from bayes_kf.models.peft_adapters.in_use import is_peft as is_peft
from bayes_kf.models.peft_adapters.in_use import peft_in_use as peft_in_use
from bayes_kf.models.quantized import check_unpacked, four_bit_on_cpu

Inputs = Tensor | Mapping[str, Any]

Owners = list[tuple[nn.Module, str]]  # the modules that hold a tensor, and as which attribute

UNKNOWN = "not yet known"  # how a tensor is linearized, before the first batch
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # of models that are in use
_making = threading.Lock()
LARGE = 20_000_000  # trainable numbers above which full fine-tuning by accident is more likely than intent


class AdapterModel:
    """A PEFT model, or any module with trainable tensors, as outputs = f(θ, inputs).

    θ is every tensor with ``requires_grad`` (LoRA A and B, DoRA magnitudes, ``modules_to_save``), flattened and
    concatenated in the order of ``model.named_parameters()``. The model itself is only read: its weights, gradients
    and training modes are as they were after every call, also after one that raised. Threads may call at once: they
    take turns, whichever adapters and posteriors of one model they use. Calls of the model itself are not kept apart.

    Args:
        model: the user's module; base weights frozen, adapter tensors trainable.

    Raises:
        ValueError: when no tensor is trainable, trainable tensors are offloaded or on several devices, adapters are
            merged into the base, which leaves them without a say, or PEFT has several active adapters or one that
            cannot be saved and read again (``peft_parts``).

    Example:
        >>> adapter = AdapterModel(nn.Linear(3, 2))
        >>> adapter.names, adapter.num_parameters
        (('weight', 'bias'), 8)
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("`model` must have trainable tensors, got none with requires_grad=True.")
        devices = {str(p.device): name for name, p in trainable.items()}
        if len(devices) > 1 or "meta" in devices:
            places = ", ".join(f"{device} ({name})" for device, name in devices.items())
            raise ValueError(f"`model` must have its trainable tensors in the memory of one device, got {places}.")
        merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
        if merged:
            raise ValueError(f"`model` must have its adapters apart from the base, got one merged into {merged[0]!r}.")
        adapter_tensors.check(model)
        self.model = model
        self.names: tuple[str, ...] = tuple(trainable)
        self.shapes: tuple[torch.Size, ...] = tuple(p.shape for p in trainable.values())
        self.dtypes: tuple[torch.dtype, ...] = tuple(p.dtype for p in trainable.values())
        self.sizes: tuple[int, ...] = tuple(p.numel() for p in trainable.values())
        self.num_parameters = sum(self.sizes)
        ends = itertools.accumulate(self.sizes)
        self._slices = {n: slice(end - size, end) for n, end, size in zip(self.names, ends, self.sizes, strict=True)}
        self._modules = list(model.modules())  # walking through them takes milliseconds
        self._has_fused = has_fused(self._modules)
        self._four_bit = four_bit_on_cpu(self._modules)
        self.owners = _owners(model, trainable)
        self.linearized_by: dict[str, str] = dict.fromkeys(self.names, UNKNOWN)  # see describe
        self._autocast: torch.dtype | None = None  # of the caller, inside `full_precision`
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32
        if self.num_parameters > LARGE:
            state_gib = 4 * self.num_parameters * self.dtype.itemsize / 2**30
            warnings.warn(
                f"`model` has {self.num_parameters:,} trainable numbers, above {LARGE:,}: the belief and its prior "
                f"take {state_gib:.1f} GiB, a quarter more for every output row of a step; is the base not frozen?",
                stacklevel=2,
            )

    @property
    def device(self) -> torch.device:
        """The device of the first trainable tensor; the belief lives there."""
        return self._present(self.names[0]).device

    @property
    def is_precise(self) -> bool:
        """Whether forward passes are computed in single precision or better, autocast included."""
        autocast = self._autocast is not None or torch.is_autocast_enabled(self.device.type)
        return not autocast and all(p.dtype in (torch.float32, torch.float64) for p in self.model.parameters())

    def vector(self) -> Tensor:
        """The model's present trainable tensors as one vector, (n,), a copy."""
        with self.lock():
            return self.flatten({name: self.model.get_parameter(name).detach() for name in self.names})

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one vector, (n,), in the latent dtype."""
        return torch.cat([tensors[name].reshape(-1).to(self.dtype) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (n,) as named tensors in their shapes, in the latent dtype (views)."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the latent vector."""
        return dict(self._slices)

    def leaves(self, vector: Tensor) -> dict[str, Tensor]:
        """Leaf tensors of the model's own dtypes that hold ``vector`` (views of it) and ask for gradients."""
        return {name: t.detach().requires_grad_(True) for name, t in self.tensors(vector.detach()).items()}

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (n,) as named tensors of the model's own dtypes."""
        named = self.unflatten(vector)
        return {name: t.to(dtype) for (name, t), dtype in zip(named.items(), self.dtypes, strict=True)}

    @contextmanager
    def substituted(self, tensors: Mapping[str, Tensor], before: Sequence[Before] | None = None) -> Iterator[None]:
        """The model with ``tensors`` in the place of its own trainable ones, tied ones in all their places.

        Backward passes through checkpointed layers run them again, so they belong inside too. Whatever a forward pass
        inside replaces in the model's modules is put back, also after an error (``restoring``).

        Args:
            tensors: name -> tensor.
            before: the modules as they are, from :meth:`remembered`; they are looked at anew without it.
        """
        with self.lock(), restored(self.remembered() if before is None else before), self.swapped(tensors):
            yield

    def remembered(self) -> list[Before]:
        """What the model's modules are like now, for :meth:`substituted`."""
        with self.lock():
            return remembered(self._modules)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """As :meth:`substituted`, to look at modules and not to run them."""
        with self.lock():
            own = {name: self._present(name) for name in tensors}
            try:
                self._place(tensors)
                yield
            finally:
                self._place(own)

    def lock(self) -> threading.RLock:
        """The lock of the model: while tensors or modes of it are replaced, other threads wait."""
        with _making:
            return _locks.setdefault(self.model, threading.RLock())

    def _present(self, name: str) -> Tensor:
        """What stands in a tensor's place now."""
        module, attribute = self.owners[name][0]
        return module._parameters[attribute]  # type: ignore[return-value]

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for module, attribute in self.owners[name]:
                module._parameters[attribute] = tensor  # type: ignore[assignment]  # as torch.func.functional_call does

    @contextmanager
    def preserved_gradients(self) -> Iterator[None]:
        """Gradients that the user's parameters hold are as they were afterwards, whatever backward pass runs inside."""
        held = [(parameter, parameter.grad) for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter, _ in held:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Every module in eval mode inside; each in the mode it had afterwards, whatever happened.

        Layers of transformers that save memory by running again in the backward pass do so in training mode alone, so
        they are left in it until their own code runs, with its dropout off. Torch's encoder layers do not take the
        fused path of eval mode, which passes adapters by. Layers of 4-bit weights on a CPU are in training mode
        (``quantized``).

        Raises:
            ValueError: where 4-bit weights were packed for inference.
        """
        with self.lock():
            check_unpacked(self._four_bit)
            again = [module for module in self._modules if module.training and _checkpointed(module)]
            changed = [module for module in self._modules if module.training and not _checkpointed(module)]
            changed = [module for module in changed if module not in self._four_bit]
            changed += [module for module in self._four_bit if not module.training]
            try:
                for module in changed:
                    module.training = not module.training
                with layer_by_layer() if self._has_fused else nullcontext(), _evaluated_inside(again):
                    yield
            finally:
                for module in changed:
                    module.training = not module.training

    def describe(self) -> str:
        """A table of the trainable tensors: name, shape, the kind of module that holds it, and how it is linearized.

        "hooks": rows of the Jacobian from what went into the module and the cotangent of what came out, m backward
        passes a batch. "general": a backward pass per example and output. "unused": no output depended on it.
        Which it is gets measured on the first batch that a filter or posterior of this adapter sees.

        Example:
            >>> print(AdapterModel(nn.Linear(3, 2)).describe())
            tensor  shape   numbers  module  linearized by
            weight  (2, 3)        6  Linear  not yet known
            bias    (2,)          2  Linear  not yet known
        """
        rows = [
            (name, str(tuple(shape)), f"{size:,}", type(self.owners[name][0][0]).__name__, self.linearized_by[name])
            for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True)
        ]
        header = ("tensor", "shape", "numbers", "module", "linearized by")
        wide = [max(len(row[i]) for row in [header, *rows]) for i in range(5)]
        lines = [
            f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d:<{wide[3]}}  {e}" for a, b, c, d, e in [header, *rows]
        ]
        return "\n".join(lines)

    def call(self, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Raw outputs η of the model with its trainable tensors replaced, (B, m); no modes are changed here.

        Args:
            tensors: name -> tensor for (some of) ``names``.
            inputs: a tensor (B, ...) given as the model's only argument, or a mapping given as keywords.

        Raises:
            ValueError: when what the model returns is not a (B, m) tensor, nor has one as ``logits``.
        """
        with self.substituted(tensors):
            return self.run(inputs)

    def run(self, inputs: Inputs) -> Tensor:
        """Raw outputs η of the model as it stands, (B, m); see :meth:`call`."""
        inputs = self.cast(to_device(inputs, self.device))
        with self.autocast():
            return _as_matrix(self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs))

    def cast(self, inputs: Inputs) -> Inputs:
        """Inputs in the model's own floating-point dtype, where it has one and nothing else casts them.

        float64 inputs (NumPy's arrays, say) of a model without float64 tensors become its widest dtype; others only
        where all of its tensors are of one dtype and autocast is off. Torch would raise for most of them.
        """
        given = inputs.values() if isinstance(inputs, Mapping) else [inputs]
        if all(not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype in self.dtypes for t in given):
            return inputs  # without a walk through the model
        kinds = {t.dtype for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()}
        widest = max(kinds, key=lambda kind: torch.finfo(kind).bits)
        single = len(kinds) == 1 and self._autocast is None and not torch.is_autocast_enabled(self.device.type)

        def fitting(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in kinds:
                return value
            return value.to(widest) if single or value.dtype == torch.float64 else value

        if isinstance(inputs, Mapping):
            return {name: fitting(value) for name, value in inputs.items()}
        return fitting(inputs)

    def autocast(self) -> AbstractContextManager[Any]:
        """The caller's autocast, for a forward pass inside :meth:`full_precision`.

        Casts are not kept for the next pass: inside the caller's own context they would be until that is left.
        """
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast, cache_enabled=False)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Autocast, where the caller has it on, for the model's forward passes alone: nothing else is rounded by it.

        Around all that a call computes, so other threads wait outside.
        """
        with self.lock():
            kind, outside = self.device.type, self._autocast
            if not torch.is_autocast_enabled(kind):
                yield
                return
            self._autocast = torch.get_autocast_dtype(kind)
            try:
                with torch.autocast(kind, enabled=False):
                    yield
            finally:
                self._autocast = outside

    def outputs(self, vector: Tensor, inputs: Inputs) -> Tensor:
        """Raw outputs η = f(θ, inputs) with dropout off and batch norm in eval, without gradients, (B, m)."""
        with self.eval_mode(), torch.no_grad():
            return self.call(self.tensors(vector), inputs).to(self.dtype)

    @torch.no_grad()
    def assign(self, vector: Tensor) -> None:
        """Write ``vector`` into the user's model, in place; the only method that changes it."""
        for name, tensor in self.unflatten(vector).items():
            self.model.get_parameter(name).copy_(tensor)


def _checkpointed(module: nn.Module) -> bool:
    """Whether this is a layer of transformers that runs again in the backward pass; known by name, not imported."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return bool(getattr(module, "gradient_checkpointing", False)) and "GradientCheckpointingLayer" in kinds


@contextmanager
def _evaluated_inside(layers: list[nn.Module]) -> Iterator[None]:
    """Checkpointed layers in eval mode while their own code runs, in the forward pass and again in the backward.

    Without gradients they are not run again, nor by their checkpoint function, and hooks see to it.
    """
    originals = [(layer, layer.__dict__.get("_gradient_checkpointing_func")) for layer in layers]
    handles = []
    try:
        for layer, original in originals:
            if original is not None:
                layer.__dict__["_gradient_checkpointing_func"] = _evaluated(layer, original)
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


def _evaluated(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's checkpoint function around its code in eval mode."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def inside(*given: Any, **named: Any) -> Any:
            mode, layer.training = layer.training, False
            try:
                return function(*given, **named)
            finally:
                layer.training = mode

        return checkpoint(inside, *args, **kwargs)

    return run


def split_batch(batch: Any) -> tuple[Inputs, Tensor | None]:
    """The inputs and targets of a loader's batch; targets are None where the batch carries none.

    Args:
        batch: ``(inputs, targets)``, a mapping with or without ``labels``, or a tensor of inputs alone.

    Raises:
        ValueError: for anything else.

    Example:
        >>> inputs, targets = split_batch({"input_ids": torch.ones(2, 3), "labels": torch.tensor([0, 1])})
        >>> sorted(inputs), targets.tolist()
        (['input_ids'], [0, 1])
    """
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}, batch.get("labels")
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor | Mapping):
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return split_batch(batch[0])
    raise ValueError(
        f"`batch` must be (inputs, targets) or a mapping with `labels`, got {type(batch).__name__}"
        f"{f' of {len(batch)} parts' if isinstance(batch, tuple | list) else ''}."
    )


def batch_size(inputs: Inputs) -> int:
    """Number of examples in a batch: the commonest first dimension of its tensors, the largest among equals.

    Example:
        >>> batch_size({"position_ids": torch.zeros(1, 5), "input_ids": torch.zeros(4, 5)})
        4
    """
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    counts = Counter(t.shape[0] for t in tensors if isinstance(t, Tensor) and t.ndim)
    if not counts:
        raise ValueError("`inputs` must hold a tensor with a batch dimension, got none.")
    return max(counts, key=lambda size: (counts[size], size))


def some_examples(inputs: Inputs, where: slice | Tensor, size: int) -> Inputs:
    """Some examples of a batch of ``size``."""
    if isinstance(inputs, Tensor):
        return inputs[where]
    return {k: v[where] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in inputs.items()}


def check_inputs(inputs: Inputs) -> None:
    """Raise ValueError when a floating-point input holds NaN or infinity, or when the batch is empty."""
    items = inputs.items() if isinstance(inputs, Mapping) else [("inputs", inputs)]
    for name, tensor in items:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"`{name}` must be finite, got {bad} NaN or infinite values out of {tensor.numel()}.")
    if batch_size(inputs) == 0:
        raise ValueError("`inputs` must hold at least one example, got an empty batch.")


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with every tensor on ``device``."""
    if isinstance(inputs, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return inputs.to(device)


def _owners(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[str, Owners]:
    """Trainable tensor -> every module and attribute that holds it; several where tensors are tied."""
    names = {id(parameter): name for name, parameter in trainable.items()}
    owners: dict[str, Owners] = {name: [] for name in trainable}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                owners[names[id(parameter)]].append((module, attribute))
    return owners


def _as_matrix(outputs: Any) -> Tensor:
    """The (B, m) tensor in what a model returned."""
    if not isinstance(outputs, Tensor):
        outputs = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(outputs, Tensor):
        raise ValueError("`model` must return a tensor or an object with `logits`, got neither.")
    if outputs.ndim != 2:
        raise ValueError(f"`model` must return outputs of shape (batch, outputs), got {tuple(outputs.shape)}.")
    return outputs
