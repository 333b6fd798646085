"""A model as a function of its trainable tensors: the latent vector of the filter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.models.eval_mode import EvalMode
from bayes_kf.models.forward import as_matrix, to_model
from bayes_kf.models.model_lock import model_lock
from bayes_kf.models.module_restoring import ModuleState, restore, restore_parameters, take_snapshot
from bayes_kf.models.peft_adapters import adapter_tensors
from bayes_kf.models.trainable_tensors import table, tensor_places, trainable_tensors, warn_if_large
from bayes_kf.processes import shared_work
from bayes_kf.processes.divided_tensors import is_divided

UNKNOWN = "not yet known"  # how a tensor is linearized, before the first batch


class AdapterModel:
    """A PEFT model, or any module with trainable tensors, as outputs = f(θ, inputs).

    θ is every tensor with ``requires_grad`` (LoRA A and B, DoRA magnitudes, ``modules_to_save``), flattened and
    concatenated in the order of ``model.named_parameters()``. The model itself is only read: after every call, also
    one that raised, its weights, gradients and training modes are as they were. The class is thread-safe: threads that
    use one model, through any adapter or posterior, wait for each other. Direct calls of the model do not.

    Args:
        model: the user's module; base weights frozen, adapter tensors trainable.

    Attributes:
        names: of the tensors, with their ``shapes``, ``dtypes`` and ``sizes`` in the same order.
        num_parameters: n, the length of θ.
        owners: name -> every module and attribute that holds the tensor.
        eval_mode: context managers with the model in eval mode, see ``models.eval_mode.EvalMode``.
        linearized_by: name -> how the tensor is linearized, see :meth:`describe`.
        dtype: of θ, float64 if any tensor has it, else float32.

    Raises:
        ValueError: if no tensor is trainable, if trainable tensors are divided, offloaded or on several devices, if
            adapters are merged into the base, or if PEFT has several active adapters or one that cannot be saved and
            loaded (``peft_adapters.adapter_tensors``).

    Example:
        >>> adapter = AdapterModel(nn.Linear(3, 2))
        >>> adapter.names, adapter.num_parameters
        (('weight', 'bias'), 8)
    """

    as_matrix = staticmethod(as_matrix)  # from what the model returned to (B, m)

    rows_are_examples = True  # of the outputs; a subclass may have other rows

    def __init__(self, model: nn.Module) -> None:
        trainable = trainable_tensors(model)
        adapter_tensors.check_supported(model)
        self.model = model
        self.names: tuple[str, ...] = tuple(trainable)
        self.shapes: tuple[torch.Size, ...] = tuple(p.shape for p in trainable.values())
        self.dtypes: tuple[torch.dtype, ...] = tuple(p.dtype for p in trainable.values())
        self.sizes: tuple[int, ...] = tuple(p.numel() for p in trainable.values())
        self.num_parameters = sum(self.sizes)
        ends = itertools.accumulate(self.sizes)
        self._slices = {n: slice(end - size, end) for n, end, size in zip(self.names, ends, self.sizes, strict=True)}
        self._modules = list(model.modules())  # walking through them takes milliseconds
        self.eval_mode = EvalMode(model)
        self.owners = tensor_places(model, trainable)
        self.linearized_by: dict[str, str] = dict.fromkeys(self.names, UNKNOWN)  # see describe
        self.is_divided = any(map(is_divided, model.parameters()))  # the base, among processes
        self._autocast: torch.dtype | None = None  # of the caller, inside `full_precision`
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32
        warn_if_large(self.num_parameters, self.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the first trainable tensor; the Gaussian over θ is on it."""
        module, attribute = self.owners[self.names[0]][0]
        return module._parameters[attribute].device  # type: ignore[union-attr]

    @property
    def is_precise(self) -> bool:
        """Whether forward passes are computed in single precision or better, autocast included."""
        autocast = self._autocast is not None or torch.is_autocast_enabled(self.device.type)
        return not autocast and all(p.dtype in (torch.float32, torch.float64) for p in self.model.parameters())

    def vector(self) -> Tensor:
        """A copy of the model's present trainable tensors as one vector, (n,)."""
        with model_lock(self.model):
            return self.flatten({name: self.model.get_parameter(name).detach() for name in self.names})

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one vector, (n,), in the latent dtype."""
        return torch.cat([tensors[name].reshape(-1).to(self.dtype) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (n,) as named tensors in their shapes, in the latent dtype (views)."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def slices(self) -> dict[str, slice]:
        """The range of each tensor in the latent vector."""
        return dict(self._slices)

    def leaves(self, vector: Tensor) -> dict[str, Tensor]:
        """Leaf tensors of the model's own dtypes that hold ``vector`` (views of it) and require gradients."""
        leaves = self.tensors(vector.detach())
        for name, tensor in leaves.items():
            leaves[name] = tensor.detach().requires_grad_(True)
        return leaves

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (n,) as named tensors of the model's own dtypes."""
        tensors = {}
        parts = zip(self.names, vector.split(self.sizes), self.shapes, self.dtypes, strict=True)
        for name, part, shape, dtype in parts:
            tensors[name] = part.view(shape).to(dtype)
        return tensors

    @contextmanager
    def substituted(
        self, tensors: Mapping[str, Tensor], snapshot: Sequence[ModuleState] | None = None
    ) -> Iterator[Sequence[ModuleState]]:
        """The model with ``tensors`` in the place of its own trainable ones, tied ones in all their places.

        Backward passes through checkpointed layers run the layers again, so they belong inside too. On leaving, also
        by an error, the modules are restored (``module_restoring``).

        Args:
            tensors: name -> tensor.
            snapshot: the modules before, as this context manager yields it; without it one is taken.

        Yields:
            The snapshot, for further passes over the same modules.
        """
        with model_lock(self.model):
            if snapshot is None:
                snapshot = take_snapshot(self._modules)
            try:
                for name, tensor in tensors.items():
                    for module, attribute in self.owners[name]:  # as torch.func.functional_call does
                        module._parameters[attribute] = tensor  # type: ignore[assignment]
                yield snapshot
            except BaseException:
                restore(snapshot)
                raise
            restore_parameters(snapshot)

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """As :meth:`substituted`, for reading modules without running them."""
        with model_lock(self.model):
            places = [(tensor, *place) for name, tensor in tensors.items() for place in self.owners[name]]
            before = [module._parameters[attribute] for _, module, attribute in places]
            try:
                for tensor, module, attribute in places:
                    module._parameters[attribute] = tensor  # type: ignore[assignment]
                yield
            finally:
                for (_, module, attribute), parameter in zip(places, before, strict=True):
                    module._parameters[attribute] = parameter

    @contextmanager
    def preserved_gradients(self) -> Iterator[None]:
        """Inside, the user's parameters have no gradients; afterwards they have those from before."""
        held = [(parameter, parameter.grad) for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter, _ in held:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient

    def describe(self) -> str:
        """A table of the trainable tensors: name, shape, the kind of module that holds it, and how it is linearized.

        "hooks": the rows of the Jacobian come from the module's input and the gradient of its output, m backward passes
        a batch. "general": a backward pass for each example and output. "unused": no output depends on the tensor.
        This is measured on the first batch that a filter or posterior of this adapter gets.

        Example:
            >>> print(AdapterModel(nn.Linear(3, 2)).describe())
            tensor  shape   numbers  module  linearized by
            weight  (2, 3)        6  Linear  not yet known
            bias    (2,)          2  Linear  not yet known
        """
        kinds = [type(places[0][0]).__name__ for places in self.owners.values()]
        return table(self.names, self.shapes, kinds, list(self.linearized_by.values()))

    def call(self, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Raw outputs η of the model with its trainable tensors replaced, (B, m); modes are not changed.

        Args:
            tensors: name -> tensor for (some of) ``names``.
            inputs: a tensor (B, ...) given as the model's only argument, or a mapping given as keywords.

        Raises:
            ValueError: if the model returns neither a (B, m) tensor nor an object that has one as ``logits``.
        """
        with self.substituted(tensors):
            return self.run(inputs)

    def run(self, inputs: Inputs) -> Tensor:
        """Raw outputs η of the model as it stands, (B, m); see :meth:`call`."""
        device = self.device
        autocast = self._autocast is not None or torch.is_autocast_enabled(device.type)
        inputs = to_model(inputs, self.model, device, self.dtypes, autocast)
        with nullcontext() if self._autocast is None else self.autocast():
            outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)
        return outputs if isinstance(outputs, Tensor) and outputs.ndim == 2 else self.as_matrix(outputs)

    def read(self, batch: Any) -> Any:
        """A loader's batch, or its inputs, with one row for each example: the same, unless a subclass changes it."""
        return batch

    def with_targets(self, batch: Batch, seed: int = 0) -> Batch:
        """The batch with all inputs that a forward pass with targets needs: the same, unless a subclass adds some.

        Args:
            batch: with targets.
            seed: of random numbers in the forward pass.
        """
        return batch

    def part(self, batch: Batch, where: slice) -> Batch:
        """Some examples of a batch, for a forward pass over them alone that gives what one over all of them gives."""
        return batch[where]

    def predicted_targets(self, inputs: Inputs, targets: Tensor | None) -> Tensor | None:
        """The targets in the order of predictions: as given, unless a subclass predicts parts of an example."""
        return targets

    def autocast(self) -> AbstractContextManager[object]:
        """The caller's autocast, inside :meth:`full_precision`. Casts are not cached, else they would outlive it."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast, cache_enabled=False)

    def full_precision(self) -> AbstractContextManager[object]:
        """Confines the caller's autocast, if it is on, to the model's forward passes: nothing else is rounded.

        It encloses a whole computation, so other threads wait outside.
        """
        kind = self.device.type
        return self._confined_autocast(kind) if torch.is_autocast_enabled(kind) else model_lock(self.model)

    @contextmanager
    def _confined_autocast(self, kind: str) -> Iterator[None]:
        with model_lock(self.model):
            outside, self._autocast = self._autocast, torch.get_autocast_dtype(kind)
            try:
                with torch.autocast(kind, enabled=False):
                    yield
            finally:
                self._autocast = outside

    def outputs(self, vector: Tensor, inputs: Inputs) -> Tensor:
        """Raw outputs η = f(θ, inputs) with dropout off and batch norm in eval, without gradients, (B, m).

        Processes that share the work (``processes.shared_work``) compute the outputs of a part of the examples each.
        """
        if self.rows_are_examples and shared_work.present_group() is not None:
            batch = Batch.of(inputs)
            share = shared_work.share_of(batch.size)
            if share is not None:
                some = self.part(batch, share.where).inputs
                own = shared_work.done_everywhere(lambda: self._own_outputs(vector, some), is_share=True)
                return share.gathered(own)
        return self._own_outputs(vector, inputs)

    def _own_outputs(self, vector: Tensor, inputs: Inputs) -> Tensor:
        """:meth:`outputs` in this process alone."""
        with self.eval_mode(), torch.no_grad(), self.substituted(self.tensors(vector)):
            return self.run(inputs).to(self.dtype)

    @torch.no_grad()
    def assign(self, vector: Tensor) -> None:
        """Writes ``vector`` into the user's model, in place; no other method changes it."""
        for name, tensor in self.unflatten(vector).items():
            self.model.get_parameter(name).copy_(tensor)
