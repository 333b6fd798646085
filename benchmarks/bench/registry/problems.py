"""Data sets of the bench: every file of ``problems/`` is one.

A file holds, besides a docstring:

- ``TITLE``: the data set and what learns it, for tables.
- ``NETWORK``: the network's name (``networks.NETWORKS``); ``--backbone`` puts another in its place.
- ``CLASSES`` and ``FRESH_HEAD``: how many, and whether the classifier is drawn afresh for them.
- ``TRAIN`` and ``TEST``: how many examples there are to learn from and to be tested on.
- ``train(which)`` and ``test(which)``: from indices (N,) to raw inputs and labels (N,). Raw inputs are images
  (N, C, H, W) in [0, 1], or lists of texts or of pairs of texts.
- ``SIZES``: bench -> :class:`Sizes`. The benches named there are those that it runs in.

and may hold ``PRIORITY``, as rows do, and ``EXTRA = True``: not one of the online bench's six.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bench.networks.small import Network, Request, network
from benchmarks.bench.registry.plugins import attribute, modules
from benchmarks.common.learners import Inputs, Stream

SPLIT_SEED = 12_345  # of what is kept apart for tuning, the same for every seed
TUNING_SEED = 99_991  # of the network in tuning


class Sizes(NamedTuple):
    """Examples of a stream, of the tuning stream, of the part that tuning is scored on, and of the test."""

    stream: int
    tuning: int
    validation: int
    heldout: int


class Split(NamedTuple):
    """What is learned, in its order, and what is predicted afterwards."""

    stream: Stream
    heldout: Stream


class Problem(NamedTuple):
    """A data set of the bench; see the module."""

    name: str
    title: str
    network_name: str
    network: Network
    classes: int
    fresh_head: bool
    num_train: int
    num_test: int
    train: Callable[[Tensor], tuple[Any, Tensor]]
    test: Callable[[Tensor], tuple[Any, Tensor]]
    sizes: dict[str, Sizes]
    priority: int
    extra: bool
    random_weights: bool

    def model(self, adapter: str, seed: int) -> nn.Module:
        """The network at its start: the same for every row with this adapter."""
        asked = Request(self.classes, self.fresh_head, adapter, seed, self.random_weights)
        return self.network.build(asked)

    def tuning(self, bench: str, limit: int | None = None) -> Split:
        """The tuning stream, and what tuning is scored on: no seed's stream nor the test has any of it."""
        order, size = self._order(), self.sizes_of(bench, limit)
        first, rest = order[: size.tuning], order[size.tuning : size.tuning + size.validation]
        return Split(self._stream(self.train, first), self._stream(self.train, rest, by_length=True))

    def split(self, bench: str, seed: int, limit: int | None = None) -> Split:
        """The stream of a seed and the held-out examples, the same for every seed."""
        size = self.sizes_of(bench, limit)
        rest = self._order()[size.tuning + size.validation :]
        chosen = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: size.stream]]
        test = torch.randperm(self.num_test, generator=torch.Generator().manual_seed(SPLIT_SEED))[: size.heldout]
        return Split(self._stream(self.train, chosen), self._stream(self.test, test, by_length=True))

    def sizes_of(self, bench: str, limit: int | None) -> Sizes:
        """How many examples there are of what, each at most ``limit``."""
        size = self.sizes.get(bench) or Sizes(1000, 300, 300, 500)
        size = size if limit is None else Sizes(*(min(limit, number) for number in size))
        needed = size.tuning + size.validation + size.stream
        if needed > self.num_train or size.heldout > self.num_test:
            raise ValueError(
                f"`SIZES` of {self.name} must fit its {self.num_train:,} and {self.num_test:,} examples, got {size}."
            )
        return size

    def _order(self) -> Tensor:
        return torch.randperm(self.num_train, generator=torch.Generator().manual_seed(SPLIT_SEED))

    def _stream(self, read: Callable[[Tensor], tuple[Any, Tensor]], which: Tensor, by_length: bool = False) -> Stream:
        raw, labels = read(which)
        found = Stream(self.network.prepare(raw), labels)
        if by_length and self.network.texts:  # predicted in batches that need little padding
            found = found.at(found.inputs["attention_mask"].sum(1).argsort(stable=True))
        return found


def found_problems(
    extra: Path | None = None, backbone: str | None = None, random_weights: bool = False
) -> dict[str, Problem]:
    """All problems by name, in their order.

    Args:
        extra: a folder whose ``problems`` holds further files.
        backbone: the network in place of the problems' own; those that it cannot read are left out.
        random_weights: whether networks' weights are drawn.

    Raises:
        ValueError: a file lacks something, or there is no network of that name.
    """
    found = [_problem(name, module, backbone, random_weights) for name, module in modules("problems", extra).items()]
    kept = [problem for problem in found if problem is not None]
    return {problem.name: problem for problem in sorted(kept, key=lambda problem: (problem.priority, problem.name))}


def first_inputs(stream: Stream, number: int) -> Inputs:
    """A stream's first inputs."""
    return stream.first(number).inputs


def _problem(name: str, module: ModuleType, backbone: str | None, random_weights: bool) -> Problem | None:
    def wants(field: str, wanted: str) -> Any:
        return attribute(module, field, wanted)

    own = str(wants("NETWORK", "the network's name"))
    chosen = network(backbone or own)
    if backbone is not None and chosen.texts != network(own).texts:
        return None
    if random_weights and chosen.prepare_random is not None:
        chosen = chosen._replace(prepare=chosen.prepare_random)
    return Problem(
        name,
        wants("TITLE", "the data set's name"),
        backbone or own,
        chosen,
        wants("CLASSES", "the number of classes"),
        backbone is not None or wants("FRESH_HEAD", "whether the classifier is drawn afresh"),
        wants("TRAIN", "the number of examples to learn"),
        wants("TEST", "the number of examples to test"),
        wants("train", "a function of indices"),
        wants("test", "a function of indices"),
        wants("SIZES", "the sizes by bench"),
        getattr(module, "PRIORITY", 50),
        getattr(module, "EXTRA", False),
        random_weights,
    )
