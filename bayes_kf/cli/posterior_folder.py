"""The folder of a posterior that the command line writes: with classes, history and the initial weights of a new head.

It adds to the files of `Posterior.save_pretrained`: ``labels.json`` (class names by index, number of outputs),
``history.npz`` (one array per series) and, if the base model has no head for these classes, ``new_head.safetensors``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayes_kf.files.atomic_folder import read_consistently, recover
from bayes_kf.files.checksums import is_listed, verify_checksums
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving import pretrained
from bayes_kf.inference.saving.file_names import HEAD_FILE, HISTORY_FILE, STREAM_FILE
from bayes_kf.inference.saving.file_names import LABELS_FILE as LABELS_FILE


class Labels(NamedTuple):
    """Class names by index, empty without classes, and the number of outputs of the model."""

    class_names: tuple[str, ...]
    num_outputs: int


def check_output(folder: Path) -> None:
    """Raise ValueError if other files in ``folder`` prevent saving a posterior there.

    An interrupted earlier save is completed or removed first.
    """
    names = (LABELS_FILE, HEAD_FILE, HISTORY_FILE, STREAM_FILE)
    with _naming_output():
        pretrained.check_folder(folder, of_peft=True, names=names)


def recover_output(folder: Path) -> None:
    """Complete or remove an interrupted save in ``folder``."""
    with _naming_output():
        recover(folder)


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    """Errors about the folder name ``--output``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`--output` cannot hold the posterior: {error}") from error


def save_posterior(
    posterior: Posterior | MixturePosterior,
    folder: Path,
    labels: Labels,
    new_head: Mapping[str, Tensor],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write all files in one atomic step. ``texts`` maps names of further files to their content."""

    def write(target: Path) -> None:
        (target / LABELS_FILE).write_text(json.dumps(labels._asdict(), indent=2) + "\n", encoding="utf-8")
        series: dict[str, Any] = {name: tensor.numpy() for name, tensor in posterior.history.items()}
        np.savez_compressed(target / HISTORY_FILE, **series)
        for name, text in (texts or {}).items():
            (target / name).write_text(text, encoding="utf-8")
        if new_head:
            save_file({name: t.detach().cpu().contiguous() for name, t in new_head.items()}, target / HEAD_FILE)

    if isinstance(posterior, MixturePosterior):
        pretrained.save_mixture(posterior.members, posterior.weights, folder, write_more=write)
    else:
        pretrained.save(posterior, folder, write_more=write)


def read_labels(folder: Path) -> Labels | None:
    """The labels in ``labels.json``; None without that file, as in a folder from `Posterior.save_pretrained`.

    Raises:
        ValueError: if a file of the folder is damaged.
    """
    return read_consistently(folder, _read_labels)


def _read_labels(folder: Path) -> Labels | None:
    path = folder / LABELS_FILE
    if not is_listed(folder, LABELS_FILE):  # a file of this name may not be ours
        return None
    verify_checksums(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, num_outputs = content["class_names"], content["num_outputs"]
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is not a list of strings")
        if not isinstance(num_outputs, int) or num_outputs < 1:
            raise ValueError(f"num_outputs is {num_outputs!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`POSTERIOR` must hold a sound {LABELS_FILE}, got {path}: {error}.") from error
    return Labels(tuple(names), num_outputs)


def read_new_head(folder: Path) -> dict[str, Tensor]:
    """The initial weights of a new head; empty if the base model has a head."""
    return read_consistently(folder, _read_new_head)


def _read_new_head(folder: Path) -> dict[str, Tensor]:
    path = folder / HEAD_FILE
    if not is_listed(folder, HEAD_FILE):
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`POSTERIOR` must hold a sound {HEAD_FILE}, got {path}: {error}.") from error
