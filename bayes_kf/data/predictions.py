"""Saved predictions: class probabilities or predicted values beside the targets, as .npz or .csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayes_kf.data.arrays import open_arrays
from bayes_kf.data.csv_rows import read_csv

PREDICTION_SUFFIXES = (".npz", ".csv")
TARGET_NAMES = ("target", "targets", "label", "labels", "y")
REGRESSION_COLUMNS = ("mean", "variance")


@dataclass(frozen=True)
class SavedPredictions:
    """The content of a file of predictions; missing parts are None.

    Attributes:
        targets: class indices (N,), or real values (N,) or (N, m).
        probs: class probabilities, (N, C).
        samples: class probabilities of posterior draws, (S, N, C), or draws of real targets, (S, N) or (S, N, m).
        mean: predicted means of real targets.
        variance: their predictive variances, noise included.
        class_names: the C classes in order.
    """

    targets: np.ndarray | None = None
    probs: np.ndarray | None = None
    samples: np.ndarray | None = None
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


def read_predictions(path: str | os.PathLike[str], *, need_targets: bool = True) -> SavedPredictions:
    r"""Saved predictions with their targets. Nothing is unpickled.

    An `.npz` holds `targets` (or `target`, `label`, `labels`, `y`) and either `probs` (N, C), optionally with
    `class_names` and `samples` (S, N, C), or `mean` with `variance` or `samples`. The header of a `.csv` has one of
    these names for the targets. The other columns are class probabilities under the class names, or `mean` and
    `variance`. Targets are class names if all of them are; otherwise they are class indices from 0.

    Args:
        path: the file.
        need_targets: whether targets are required; out-of-distribution inputs may have none.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if the file is unreadable or holds no predictions.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "predictions.csv"
        >>> _ = file.write_text("target,cat,dog\ncat,0.9,0.1\ndog,0.4,0.6\n")
        >>> saved = read_predictions(file)
        >>> saved.class_names, saved.targets.tolist(), saved.probs.shape
        (('cat', 'dog'), [0, 1], (2, 2))
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"`path` must be an existing file of predictions, got {path}.")
    if file.suffix == ".csv":
        return _from_csv(file, need_targets)
    if file.suffix == ".npz":
        return _from_npz(file, need_targets)
    raise ValueError(f"`path` must end in {' or '.join(PREDICTION_SUFFIXES)}, got {path}.")


def _from_npz(path: Path, need_targets: bool) -> SavedPredictions:
    arrays, names = open_arrays(path, (*TARGET_NAMES, "probs", "mean", "variance", "samples", "class_names"))
    targets = _find_targets(arrays, names, path, need_targets)
    if ("probs" in arrays) == ("mean" in arrays):
        raise ValueError(f"`path` must hold either probs or mean, got {names} in {path}.")
    samples, class_array = arrays.get("samples"), arrays.get("class_names")
    if "mean" in arrays:
        return SavedPredictions(targets, samples=samples, mean=arrays["mean"], variance=arrays.get("variance"))
    class_names = None if class_array is None else tuple(str(name) for name in class_array)
    return SavedPredictions(_as_indices(targets, class_names, path), arrays["probs"], samples, class_names=class_names)


def _from_csv(path: Path, need_targets: bool) -> SavedPredictions:
    try:
        rows = [row for _, row in read_csv(path)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"`path` must be a readable CSV file in UTF-8, got {path}: {error}.") from error
    if not rows:
        raise ValueError(f"`path` must hold a header and at least one row, got no row in {path}.")
    columns = {name.strip(): np.array([row[name].strip() for row in rows]) for name in rows[0]}
    targets = _find_targets(columns, ", ".join(columns), path, need_targets)
    others = {name: _numbers(values, name, path) for name, values in columns.items() if values is not targets}
    if set(others) == set(REGRESSION_COLUMNS):
        values = None if targets is None else _numbers(targets, "target", path)
        return SavedPredictions(values, mean=others["mean"], variance=others["variance"])
    class_names = tuple(others)
    probs = np.stack(list(others.values()), axis=1) if others else np.empty((len(rows), 0))
    return SavedPredictions(_as_indices(targets, class_names, path), probs, class_names=class_names)


def _find_targets(
    arrays: Mapping[str, np.ndarray], array_names: str, path: Path, need_targets: bool
) -> np.ndarray | None:
    """The array under one of the target names."""
    names = [name for name in TARGET_NAMES if name in arrays]
    if not names and not need_targets:
        return None
    if len(names) != 1:
        raise ValueError(
            f"`path` must hold targets under one of {', '.join(TARGET_NAMES)}, got {array_names} in {path}."
        )
    return arrays[names[0]]


def _as_indices(targets: np.ndarray | None, class_names: tuple[str, ...] | None, path: Path) -> np.ndarray | None:
    """Class indices from class indices or names."""
    if targets is None:
        return None
    if targets.dtype.kind in "iu":
        return targets
    if targets.dtype.kind not in "US":
        raise ValueError(f"`path` must hold targets in integers or strings, got {targets.dtype} in {path}.")
    texts = targets.astype(str)
    if class_names is not None and set(texts) <= set(class_names):
        order = {name: i for i, name in enumerate(class_names)}
        return np.array([order[text] for text in texts])
    try:
        return np.array([int(text) for text in texts])
    except ValueError as error:
        expected = "indices" if class_names is None else f"indices or among {', '.join(class_names[:20])}"
        raise ValueError(f"`path` must hold targets that are {expected}, got {error.args[0]} in {path}.") from error


def _numbers(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """A column in float64."""
    try:
        return values.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"`path` must hold numbers in column {name}, got {error} in {path}.") from error
