"""The data sets of the benches of posteriors: what ``QUALITY`` and ``REGRESSION`` of a file of ``problems/`` hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn

from benchmarks.bench.registry.plugins import modules
from benchmarks.common.learners import Stream


class QualityData(NamedTuple):
    """The data of a classification for one seed.

    Attributes:
        stream: the training examples, in their order.
        heldout: the test examples.
        ood: out-of-distribution inputs; their labels have no meaning.
        human: shares of people's answers to the held-out inputs, (N, C); None if unknown.
    """

    stream: Stream
    heldout: Stream
    ood: Stream
    human: Tensor | None = None


class QualityProblem(NamedTuple):
    """A classification and the model that learns it.

    Attributes:
        name: for options and keys of results.
        title: for the table.
        load: from a seed to the data.
        model: from a seed and LoRA's dropout rate to the model at its start.
        classes: the number of classes.
        priority: place among the problems; smaller numbers come first.
        sealed: 0 for development; 1 or 2 for the first or second sets that are opened only once (``data_split``).
        is_one_of_nine: whether ``posterior_quality`` measures it, too.
    """

    name: str
    title: str
    load: Callable[[int], QualityData]
    model: Callable[[int, float], PeftModel]
    classes: int
    priority: int
    sealed: int = 0
    is_one_of_nine: bool = True


class RegressionData(NamedTuple):
    """The data of a regression for one seed; labels are targets (N, 1), with mean 0 and sd 1 in ``stream``."""

    stream: Stream
    heldout: Stream


class RegressionProblem(NamedTuple):
    """A regression and the model that learns it; fields as in :class:`QualityProblem`."""

    name: str
    title: str
    load: Callable[[int], RegressionData]
    model: Callable[[int], nn.Module]
    priority: int
    sealed: int = 0


def found_quality_problems() -> dict[str, QualityProblem]:
    """The nine problems of ``posterior_quality`` by name, in their order.

    Raises:
        ValueError: if two files have problems of the same name.
    """
    everything = _by_name(modules("problems"), "QUALITY", QualityProblem)
    return {name: problem for name, problem in everything.items() if problem.is_one_of_nine}


def found_split_problems() -> dict[str, QualityProblem | RegressionProblem]:
    """The problems of the split bench by name, classifications first.

    Raises:
        ValueError: if two files have problems of the same name.
    """
    files = modules("problems")
    classifications = _by_name(files, "QUALITY", QualityProblem)
    return {**classifications, **_by_name(files, "REGRESSION", RegressionProblem)}


def _by_name(files: Mapping[str, ModuleType], field: str, kind: type[Any]) -> dict[str, Any]:
    """The problems in a field of the files, which holds one or a tuple of them, by name in their order."""
    problems: list[Any] = []
    for module in files.values():
        held = getattr(module, field, ())
        problems += [held] if isinstance(held, kind) else held
    by_name = {problem.name: problem for problem in sorted(problems, key=lambda problem: problem.priority)}
    if len(by_name) < len(problems):
        names = sorted(problem.name for problem in problems)
        raise ValueError(f"`{field}` of every file must have a name of its own, got {', '.join(names)}.")
    return by_name
