"""Data, models and devices that the arguments name, opened and checked."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayes_kf.cli.base_model import kind_of
from bayes_kf.data import LabelledData, open_dataset
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.models.likelihood import NUMERIC

OPTIONS = {
    "batch_size": "--batch-size",
    "text_column": "--text-column",
    "label_column": "--label-column",
    "max_length": "--max-length",
    "model": "--model",
    "base_model": "--model",
}
"""Arguments of the library by the option that gives them."""


def open_data(
    args: argparse.Namespace,
    path: Path,
    folder: Path,
    settings: KalmanConfig,
    names: tuple[str, ...] | None,
    *,
    option: str = "--data",
    is_ood: bool = False,
    shuffle: bool = False,
    seed: int = 0,
) -> LabelledData:
    """A data set, read with the options of the command. Labels of out-of-distribution data are ignored.

    Errors name ``option``, which gave the path.
    """
    options: dict[str, Any] = {}
    if kind_of(path) == "text":
        options = {"text_column": args.text_column, "label_column": args.label_column, "max_length": args.max_length}
        options["numeric"] = settings.likelihood in NUMERIC and not is_ood
    common: dict[str, Any] = {"class_names": names, "batch_size": args.batch_size, "shuffle": shuffle, "seed": seed}
    with naming_options(path=option):
        return open_dataset(path, model=folder, **common, **options)


@contextlib.contextmanager
def naming_options(**options: str) -> Iterator[None]:
    """Errors raised inside name the option of the command line instead of the argument of the library.

    Args:
        **options: argument -> option, besides ``OPTIONS``.
    """
    names = OPTIONS | options
    try:
        yield
    except (ValueError, OSError) as error:
        text = re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(error))
        if text == str(error):
            raise
        raise ValueError(text) from error


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device. A device that does not exist is a ValueError."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` must be available, got {device}: {error}") from error


def read_device(name: str) -> torch.device:
    """The device of ``--device``."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`--device` must be a torch device, got {name!r}.") from error


def first_batch(loader: Iterable[Any], path: Path) -> tuple[Inputs, Any]:
    """Inputs and targets of the first batch."""
    for batch in loader:
        return split_batch(batch)
    raise ValueError(f"`--data` must hold at least one example, got none in {path}.")


def check_takes(model: nn.Module, loader: Iterable[Any], path: Path) -> None:
    """Raise ValueError if the model cannot read the data, whatever error the model raises."""
    inputs, _ = first_batch(loader, path)
    adapter = AdapterModel(model)
    try:
        adapter.outputs(adapter.vector(), inputs)
    except Exception as error:
        raise ValueError(f"`--model` must take the inputs of {path}, got {type(error).__name__}: {error}") from error
