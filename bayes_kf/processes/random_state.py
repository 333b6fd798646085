"""The random numbers of the first process in all that share the work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from bayes_kf.processes import shared_work


def use_random_state_of_first(loader: Iterable[Any], *generators: torch.Generator) -> None:
    """Give torch's generator for CPUs, a loader's and these the state that they have in the first process.

    Args:
        loader: one that shuffles does so alike in all processes.
        generators: others.
    """
    group = shared_work.present_group()
    if group is None:
        return
    torch.set_rng_state(group.of_first(torch.get_rng_state()))
    for generator in (*_generators(loader), *generators):
        generator.set_state(group.of_first(generator.get_state()))
    sampler: Any = getattr(loader, "sampler", None)
    if isinstance(seed := getattr(sampler, "initial_seed", None), int):  # of Accelerate's random sampler
        sampler.initial_seed = shared_work.numbers_of_first([seed])[0]


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The random generators of a DataLoader and its sampler."""
    if not isinstance(loader, DataLoader):
        return []
    sampler: Any = loader.sampler
    return [g for g in (loader.generator, getattr(sampler, "generator", None)) if isinstance(g, torch.Generator)]
