"""The data sets of the benches: every file of ``problems/`` is one.

A file has a docstring and serves the optimizer bench (``run_online``, ``run_epochs``), the benches of posteriors
(``benchmarks/quality/``), or both.

For the optimizer bench it has

- ``TITLE``: the data set and the network, for tables.
- ``NETWORK``: the network's name (``networks.small.NETWORKS``); ``--backbone`` replaces it.
- ``CLASSES`` and ``FRESH_HEAD``: the number of classes, and whether the classifier is new.
- ``TRAIN`` and ``TEST``: the numbers of training and test examples.
- ``train(which)`` and ``test(which)``: from indices (N,) to raw inputs and labels (N,). Raw inputs are images
  (N, C, H, W) in [0, 1], or lists of texts or of pairs of texts.
- ``SIZES``: bench -> :class:`Sizes`; it runs in these benches by default.

It may have ``PRIORITY``, as rows do, and ``EXTRA = True`` if it is not one of the online bench's six.

For the benches of posteriors (``benchmarks/quality/run.py``, ``benchmarks/quality/split/run.py``) it has ``QUALITY``, a
:class:`QualityProblem` or a tuple of them, or ``REGRESSION``, one or several :class:`RegressionProblem`. A file with
one of these and none of the names above serves only those benches. They have streams and models of their own: with
out-of-distribution inputs and dropout, adapters drawn in another order, and a seed that also sets the split.
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
from benchmarks.bench.registry.quality_problems import (
    QualityData,
    QualityProblem,
    RegressionData,
    RegressionProblem,
    found_quality_problems,
    found_split_problems,
)
from benchmarks.common.learners import Inputs, Stream

__all__ = [
    "Problem",
    "QualityData",
    "QualityProblem",
    "RegressionData",
    "RegressionProblem",
    "Sizes",
    "Split",
    "first_inputs",
    "found_problems",
    "found_quality_problems",
    "found_split_problems",
]

SPLIT_SEED = 12_345  # of the tuning examples, the same for every seed
TUNING_SEED = 99_991  # of the network during tuning
OPTIMIZER_FIELDS = ("TITLE", "NETWORK", "CLASSES", "FRESH_HEAD", "TRAIN", "TEST", "train", "test", "SIZES")


class Sizes(NamedTuple):
    """Numbers of examples: of a stream, of the tuning stream, of its validation examples, and of the test."""

    stream: int
    tuning: int
    validation: int
    heldout: int


class Split(NamedTuple):
    """A stream, in its order, and held-out examples."""

    stream: Stream
    heldout: Stream


class Problem(NamedTuple):
    """A data set of the optimizer bench; the module's docstring explains the fields."""

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
        """The network at its start, the same for every row with this adapter."""
        asked = Request(self.classes, self.fresh_head, adapter, seed, self.random_weights)
        return self.network.build(asked)

    def tuning(self, bench: str, limit: int | None = None) -> Split:
        """The tuning stream and its validation examples, which no seed's stream and no test set contains."""
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
        """The numbers of examples, each at most ``limit``."""
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
        stream = Stream(self.network.prepare(raw), labels)
        if by_length and self.network.texts:  # sorted by length, so that batches have little padding
            stream = stream.at(stream.inputs["attention_mask"].sum(1).argsort(stable=True))
        return stream


def found_problems(
    extra: Path | None = None, backbone: str | None = None, random_weights: bool = False
) -> dict[str, Problem]:
    """All problems of the optimizer bench by name, in their order.

    Args:
        extra: a folder with further files in ``problems``.
        backbone: the network in the place of the problems' own; problems with other inputs are left out.
        random_weights: whether networks have random weights.

    Raises:
        ValueError: if a file lacks a name, or the network is unknown.
    """
    files = {name: module for name, module in modules("problems", extra).items() if _serves_optimizers(module)}
    problems = [_problem(name, module, backbone, random_weights) for name, module in files.items()]
    readable = [problem for problem in problems if problem is not None]
    return {problem.name: problem for problem in sorted(readable, key=lambda problem: (problem.priority, problem.name))}


def first_inputs(stream: Stream, number: int) -> Inputs:
    """A stream's first inputs."""
    return stream.first(number).inputs


def _serves_optimizers(module: ModuleType) -> bool:
    serves_posteriors = hasattr(module, "QUALITY") or hasattr(module, "REGRESSION")
    return not serves_posteriors or any(hasattr(module, field) for field in OPTIMIZER_FIELDS)


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
