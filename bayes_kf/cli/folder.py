"""A posterior's folder as the command line writes it: with its classes, any new head's start, and the history.

Beside what `Posterior.save_pretrained` writes lie ``labels.json`` (class names by index, number of outputs),
``history.npz`` (one array a series) and, where the base model had no head for these classes, ``new_head.safetensors``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayes_kf.inference.config import CONFIG_FILE
from bayes_kf.inference.folders import replace_folder
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.sums import check_sums, write_sums

LABELS_FILE, HEAD_FILE, HISTORY_FILE = "labels.json", "new_head.safetensors", "history.npz"


class Labels(NamedTuple):
    """Class names by index, none for numbers, and the number of the model's outputs."""

    class_names: tuple[str, ...]
    num_outputs: int


def check_output(folder: Path) -> None:
    """Refuses to replace anything but an earlier posterior.

    Raises:
        ValueError: if something else is there.
    """
    if folder.exists() and not (folder / CONFIG_FILE).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`--output` must be a new folder or a posterior to replace, got {folder}, which is neither.")


def save_posterior(
    posterior: Posterior,
    folder: Path,
    labels: Labels,
    new_head: Mapping[str, Tensor],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes everything into a folder beside, then puts it in ``folder``'s place; ``texts`` are further files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "new"
        posterior.save_pretrained(fresh)
        (fresh / LABELS_FILE).write_text(json.dumps(labels._asdict(), indent=2) + "\n", encoding="utf-8")
        series: dict[str, Any] = {name: tensor.numpy() for name, tensor in posterior.history.items()}
        np.savez_compressed(fresh / HISTORY_FILE, **series)
        for name, text in (texts or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")
        if new_head:
            try:
                save_file({name: t.detach().cpu().contiguous() for name, t in new_head.items()}, fresh / HEAD_FILE)
            except SafetensorError as error:  # what it makes of a full disk
                raise OSError(f"{folder} could not be written: {error}") from error
        write_sums(fresh)
        replace_folder(fresh, folder)


def read_labels(folder: Path) -> Labels | None:
    """What ``labels.json`` says; None where there is none, as in a folder that Python code saved.

    Raises:
        ValueError: if it, or another file of the folder, is damaged.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    check_sums(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, num_outputs = content["class_names"], content["num_outputs"]
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is no list of strings")
        if not isinstance(num_outputs, int) or num_outputs < 1:
            raise ValueError(f"num_outputs is {num_outputs!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`POSTERIOR` must hold a sound {LABELS_FILE}, got {path}: {error}.") from error
    return Labels(tuple(names), num_outputs)


def read_new_head(folder: Path) -> dict[str, Tensor]:
    """The tensors that a new head started from; none where the base model had its own."""
    path = folder / HEAD_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`POSTERIOR` must hold a sound {HEAD_FILE}, got {path}: {error}.") from error
