"""AdamW's search over rates, run once for all rows that begin with it.

Its best adapter and the numbers of its runs are kept beside the features, under a name of what they were trained on.
Rows that find them count the search's seconds and memory all the same.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.common.learners import Stream
from benchmarks.common.subprocesses import MIB, held, peak
from benchmarks.language.questions import LanguageProblem, cache_folder, name_of
from benchmarks.quality.split.strong import Plan, Run, facts, search

CPU = torch.device("cpu")


class Search(NamedTuple):
    """AdamW's runs.

    Attributes:
        runs: one at each rate, the one with the least held-out loss first; if kept, all hold the best model.
        facts: numbers for the results.
    """

    runs: list[Run]
    facts: dict[str, Any]

    @property
    def best(self) -> Run:
        """The run that is used."""
        return self.runs[0]


def adamw_search(problem: LanguageProblem, fitted: Stream, heldout: Stream, seed: int, plan: Plan) -> Search:
    """The search, or what an earlier row kept of it.

    Args:
        problem: whose adapter of this seed is trained.
        fitted: questions to learn.
        heldout: questions that stop the runs and choose the rate.
        seed: of adapter and order.
        plan: epochs, patience and rates.
    """
    assert isinstance(fitted.inputs, dict)
    setting = f"{problem.reading} {problem.targets} {seed} {plan.epochs} {plan.patience} {plan.rates}"
    path = cache_folder() / f"adamw-{name_of(setting, fitted.labels, *fitted.inputs.values())}.safetensors"
    if path.is_file():
        return _kept(problem.model(seed, 0.0), path)
    before = held(CPU, reset=True)
    runs = search(partial(_model, problem), fitted, heldout, seed, plan)
    numbers = {
        "runs": [run._replace(model=None)._asdict() for run in runs],  # type: ignore[arg-type]
        "mib": (peak(CPU) - before) / MIB,
    }
    best = {name: p.detach() for name, p in runs[0].model.named_parameters() if p.requires_grad}
    save_file(best, path, metadata={"numbers": json.dumps(numbers)})
    return Search(runs, facts(runs[:1], runs[1:]))


def _kept(model: nn.Module, path: Any) -> Search:
    with safe_open(path, "pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])
    runs = [Run(**{**run, "model": model}) for run in numbers["runs"]]
    before = {"kept_seconds": sum(run.seconds for run in runs), "kept_mib": numbers["mib"]}
    return Search(runs, facts(runs[:1], runs[1:]) | before)


def _model(problem: LanguageProblem, seed: int) -> nn.Module:
    return problem.model(seed, 0.0)
