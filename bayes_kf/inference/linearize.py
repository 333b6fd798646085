"""From a batch to its outputs and the operator of their Jacobian.

The Jacobian of a batch takes one backward pass per output (or direction of the outputs) whatever the batch's size,
not one per example and output: examples do not mix in eval mode, so the pass of output j summed over the batch carries
every example's cotangents at once. For tensors that a module applies in a known way (``layers.RULES``) the rows of
every example are products of what went into the module and the cotangent of what came out. Where the model ends in a
Linear on d < m features per example, d passes from the features give the rows of all m outputs. Passes on small batches
share their overhead: the batch is repeated so that several outputs go through at once. Tensors without a rule take
one backward pass per example and output. Which tensor takes which path is measured on the first batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.blocks import PIECE, Block, Outer, Rows
from bayes_kf.inference.jacobian import Jacobian, Part
from bayes_kf.inference.layers import Call
from bayes_kf.inference.plan import Plan, choose, repeat
from bayes_kf.inference.store import Directions, RowsError, Store
from bayes_kf.inference.tape import Tape
from bayes_kf.models.adapter import AdapterModel, Inputs, batch_size

PASS_BYTES = 2**23  # of graph that a small batch is repeated up to
LEAST_BUDGET = 2**25  # of graph, rows and temporaries; larger batches go through in pieces
GRAPHS = 3  # or so many times what the graph of the batch takes


class _Graph(NamedTuple):
    plan: Plan
    tape: Tape
    size: int
    repeats: int


class Linearized:
    """A batch's outputs at a point, and what is needed to pull directions of them back to the adapter.

    Attributes:
        outputs: η, (B, m), in the latent dtype, detached.
    """

    def __init__(
        self, adapter: AdapterModel, again: Callable[[], _Graph], subset: Callable[[Tensor, int], _Graph]
    ) -> None:
        self._adapter, self._again, self._subset = adapter, again, subset
        self._plan, self._tape, self._size, self._repeats = again()
        self.outputs = self._tape.outputs[: self._size].detach().to(adapter.dtype)

    def pull(self, directions: Directions | None = None, *, keep: bool = False) -> Jacobian:
        """The Jacobian of directions of the outputs, or of all outputs, one row per example and direction.

        Args:
            directions: None for the outputs themselves.
            keep: whether more is to be pulled from this batch later.
        """
        with self._adapter.full_precision(), self._adapter.evaluating(), torch.enable_grad():
            try:
                return self._pull(directions, keep)
            except RowsError:  # a module now sees something else first than examples: check again, once
                self._plan, self._tape, self._size, self._repeats = self._again()
                return self._pull(directions, keep)

    def pull_differences(self) -> Jacobian:
        """As :meth:`pull`, but for a row that all outputs of an example share: for softmax, which does not see it.

        The outputs less the last of them, whose own row is then zero, take a pass less.
        """
        head, num_outputs = self._tape.head, self.outputs.shape[1]
        if head is not None and head.taken.shape[1] < num_outputs:
            return self.pull()
        seeds = torch.eye(num_outputs, dtype=self.outputs.dtype, device=self.outputs.device)[:-1]
        seeds[:, -1] = -1.0
        jacobian = self.pull(
            Directions(num_outputs - 1, lambda start, stop: seeds[start:stop].expand(self._size, -1, -1))
        )
        lift = torch.eye(num_outputs, num_outputs - 1, dtype=seeds.dtype, device=seeds.device)
        return jacobian.multiplied(lift.expand(self._size, -1, -1))

    def _pull(self, directions: Directions | None, keep: bool) -> Jacobian:
        general = self._without_rule()
        head, num_outputs = self._tape.head, self.outputs.shape[1]
        if directions is None and not general and head is not None and head.taken.shape[1] < num_outputs:
            return self._through_head(head, keep)
        if directions is None:
            directions = identity(self.outputs)
        blocks = self._blocks(directions, None, keep or bool(general))
        if general:
            blocks += self._general(general, directions, keep)
        part = Part(blocks or [self._nothing(directions.number)], (self._size, directions.number))
        return Jacobian([(None, part)], self._size, directions.number, self._adapter.num_parameters)

    def _without_rule(self) -> list[str]:
        """Tensors on the general path; those that the first batch did not use are asked for once more, by one pass."""
        general = [name for name in self._adapter.names if name not in self._plan.hooked]
        if not general or not self._plan.unused.issuperset(general):
            return general
        reached = self._tape.gradients(torch.zeros_like(self._tape.outputs), general, keep=True)
        return [name for name, gradient in zip(general, reached, strict=True) if gradient is not None]

    def _through_head(self, head: Call, keep: bool) -> Jacobian:
        """∂η/∂θ = W ∂h/∂θ below the classifier η = W h + b, and its own rows beside it."""
        features = head.taken[: self._size].detach().to(self._adapter.dtype)
        size, width = features.shape
        own = {name: place for name, place in self._plan.hooked.items() if place[0] is head.module}
        with self._adapter.substituted(self._tape.leaves):
            weight: Tensor = head.module.weight  # type: ignore[assignment]
        left = weight.detach().to(features).expand(size, -1, -1)
        below = self._blocks(identity(features), head.taken, keep)
        num_outputs, slices = len(weight), self._adapter.slices()
        eye = torch.eye(num_outputs, dtype=features.dtype, device=features.device).expand(size, -1, -1)
        taken = {"weight": features, "bias": features.new_ones(size, 1)}
        above: list[Block] = [Outer(slices[name], eye, taken[attribute]) for name, (_, attribute) in own.items()]
        terms: list[tuple[Tensor | None, Part]] = []
        if below:
            terms.append((left, Part(below, (size, width))))
        if above:
            terms.append((None, Part(above, (size, num_outputs))))
        return Jacobian(terms, size, num_outputs, self._adapter.num_parameters)

    def _blocks(self, directions: Directions, at: Tensor | None, keep: bool) -> list[Block]:
        """Rows of every hooked tensor, ``repeats`` directions a backward pass.

        Once half of the examples have no direction left, the others go on without them.
        """
        store, start = Store(self._adapter, self._plan, self._size, directions), 0
        graph, which = _Graph(self._plan, self._tape, self._size, self._repeats), torch.arange(self._size)
        while start < directions.number:
            left = which if directions.needed is None else which[directions.needed.cpu()[which] > start]
            if 0 < 2 * len(left) <= len(which) and self._plan.repeatable and not keep:
                graph, which = self._subset(left, directions.number - start), left
            stop = min(start + graph.repeats, directions.number)
            end = graph.tape.outputs if at is None else at
            seed = torch.zeros_like(end).view(graph.repeats, graph.size, -1)
            seed[: stop - start] = directions.seeds(start, stop)[which].transpose(0, 1)
            arrived = graph.tape.cotangents(seed.view_as(end), at, keep=keep or stop < directions.number)
            with self._adapter.substituted(graph.tape.leaves):
                store.add(arrived, which, start, stop, graph.repeats)
            start = stop
        return store.blocks()

    def _general(self, names: list[str], directions: Directions, keep: bool) -> list[Block]:
        """One backward pass per example and direction, for tensors without a rule."""
        slices, outputs = self._adapter.slices(), self._tape.outputs
        found = {
            name: self.outputs.new_zeros(self._size, directions.number, slices[name].stop - slices[name].start)
            for name in names
        }
        last = (self._size - 1, directions.number - 1)
        for b in range(self._size):
            for j in range(directions.number):
                seed = torch.zeros_like(outputs)
                seed[b] = directions.seeds(j, j + 1)[b, 0]
                gradients = self._tape.gradients(seed, names, keep=keep or (b, j) != last)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is None:  # the graph does not reach it, whatever the direction
                        del found[name]
                    else:
                        found[name][b, j] = gradient.reshape(-1).to(self.outputs.dtype)
                names = list(found)
                if not names:
                    return []
        return [Rows(slices[name], rows) for name, rows in found.items()]

    def _nothing(self, count: int) -> Block:
        """Zero rows, where no tensor was reached."""
        return Rows(slice(0, 1), self.outputs.new_zeros(self._size, count, 1))


class Linearizer:
    """Outputs and their Jacobian at a point, for one :class:`AdapterModel`.

    Args:
        adapter: the model.
        outputs_per_pass: of each example, in one backward pass; chosen from the sizes by default.
        bytes_budget: what the graph, rows and temporaries of a piece of a batch may take; by default 32 MiB, or three
            times the graph of the whole batch where that is more.

    Example:
        >>> adapter = AdapterModel(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> Linearizer(adapter)(adapter.vector(), x).pull().dense()[0]
        tensor([[1., 2., 3., 0., 0., 0.],
                [0., 0., 0., 1., 2., 3.]])
    """

    def __init__(
        self, adapter: AdapterModel, outputs_per_pass: int | None = None, bytes_budget: int | None = None
    ) -> None:
        self.adapter, self.outputs_per_pass, self.bytes_budget = adapter, outputs_per_pass, bytes_budget
        self._plan: Plan | None = None

    def __call__(self, vector: Tensor, inputs: Inputs, *, directions: int | None = None) -> Linearized:
        """The outputs at θ = ``vector`` with their graph.

        Args:
            vector: θ, (n,).
            inputs: a batch of B examples.
            directions: how many directions will be pulled, all outputs by default; only speed depends on it.
        """
        tried: list[Plan] = []

        def graph() -> _Graph:
            plan = self._planned(vector, inputs, refuse=tried)
            tried.append(plan)
            return self._graph(plan, vector, inputs, directions or plan.num_outputs)

        def subset(which: Tensor, count: int) -> _Graph:
            assert self._plan is not None
            return self._graph(self._plan, vector, some_examples(inputs, which, batch_size(inputs)), count)

        return Linearized(self.adapter, graph, subset)

    @property
    def num_outputs(self) -> int:
        """m, or 0 before the first batch."""
        return self._plan.num_outputs if self._plan else 0

    def prepare(self, vector: Tensor, inputs: Inputs) -> int:
        """The number of outputs, m, found with the path of every tensor on the first batch."""
        return self._planned(vector, inputs).num_outputs

    def rows_at_once(self, vector: Tensor, inputs: Inputs) -> int:
        """How many examples' graphs fit the budget."""
        plan = self._planned(vector, inputs)
        return max(1, self._budget(plan, batch_size(inputs)) // plan.bytes_each)

    def pieces(
        self,
        vector: Tensor,
        inputs: Inputs,
        directions: int | None = None,
        multiple: int = 1,
        most: int | None = None,
    ) -> Iterator[tuple[slice, Inputs]]:
        """A batch in pieces whose graph and rows stay under ``bytes_budget``, and where they lie.

        Args:
            vector: θ, (n,).
            inputs: the batch.
            directions: how many an example has, all outputs by default.
            multiple: what the number of examples of a piece divides by, but for the last, where the budget allows that.
            most: a bound on the examples of a piece. A piece has at least one example, whatever that takes.
        """
        size, plan = batch_size(inputs), self._planned(vector, inputs)
        step = min(self._examples(plan, size, directions or plan.num_outputs), most or size)
        step = step if step == size else step // multiple * multiple or step
        if step >= size:
            yield slice(0, size), inputs
            return
        for start in range(0, size, step):
            where = slice(start, min(start + step, size))
            yield where, some_examples(inputs, where, size)

    def _graph(self, plan: Plan, vector: Tensor, inputs: Inputs, count: int) -> _Graph:
        """A forward pass, of a batch repeated so that ``count`` directions share backward passes."""
        size = batch_size(inputs)
        repeats = self._repeats(plan, size, count)
        modules = {module for module, _ in plan.hooked.values()} | ({plan.head} if plan.head else set())
        with self.adapter.full_precision(), self.adapter.evaluating(), torch.enable_grad():
            leaves = self.adapter.leaves(vector)
            tape = Tape(self.adapter, leaves, repeat(inputs, size, repeats), modules, plan.plain)
        return _Graph(plan, tape, size, repeats)

    def _planned(self, vector: Tensor, inputs: Inputs, refuse: list[Plan] | None = None) -> Plan:
        """The plan, made on the first batch and where it does not serve; another one than those to ``refuse``."""
        if self._plan is None or refuse or not self._plan.serves(batch_size(inputs)):
            with self.adapter.full_precision(), self.adapter.evaluating(), torch.enable_grad():
                self._plan = choose(self.adapter, vector, inputs)
        return self._plan

    def _repeats(self, plan: Plan, size: int, count: int) -> int:
        """How many directions share a pass."""
        if not plan.repeatable or len(plan.hooked) + len(plan.unused) < len(self.adapter.names):
            return 1
        wanted = self.outputs_per_pass or max(1, PASS_BYTES // (plan.bytes_each * size))
        return min(wanted, _passes(plan, count))

    def _budget(self, plan: Plan, size: int) -> int:
        return self.bytes_budget or max(LEAST_BUDGET, GRAPHS * size * plan.bytes_each)

    def _examples(self, plan: Plan, size: int, count: int) -> int:
        """Examples whose graph, rows and temporaries fit the budget, at least one."""
        rows = _passes(plan, count) * plan.row_numbers * self.adapter.dtype.itemsize
        shared = (PASS_BYTES if self._repeats(plan, 1, count) > 1 else 0) + 2 * 8 * PIECE
        return max(1, (self._budget(plan, size) - shared) // (rows + plan.bytes_each))


def identity(like: Tensor) -> Directions:
    """Every output by itself, for outputs (B, m)."""
    size, width = like.shape
    eye = torch.eye(width, dtype=like.dtype, device=like.device)
    return Directions(width, lambda start, stop: eye[start:stop].expand(size, -1, -1))


def _passes(plan: Plan, count: int) -> int:
    """Backward passes for all outputs or for fewer directions."""
    if plan.head is None or count < plan.num_outputs:
        return count
    return min(count, plan.head.get_parameter("weight").shape[1])


def some_examples(inputs: Inputs, where: slice | Tensor, size: int) -> Inputs:
    """Some examples of a batch of ``size``."""
    if isinstance(inputs, Tensor):
        return inputs[where]
    return {k: v[where] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v for k, v in inputs.items()}
