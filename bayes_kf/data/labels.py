"""The result of every reader, and the mapping from labels to class indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset


class LabelledData(NamedTuple):
    """A loader of batches and its class names by index; no names for regression targets.

    Batches are (inputs, targets), or for text a mapping with `labels`.
    """

    loader: DataLoader[Any]
    class_names: tuple[str, ...]


def encode_labels(
    labels: Sequence[int | str], class_names: Sequence[str] | None = None
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Class indices of labels, and the class names by index.

    Without `class_names`, the classes are the distinct labels: in numerical order if all are integers, else in the
    order of their characters. With `class_names`, a label is looked up by name; if no name is an integer, an integer
    label is also read as an index, as labels 0 and 1 are for a model whose classes are "negative" and "positive".

    Args:
        labels: N labels; 3 and "3" are the same label.
        class_names: the names of an earlier call or of a trained model.

    Returns:
        Indices (N,), int64, and the class names.

    Raises:
        ValueError: if a label is empty, or not among `class_names`.

    Example:
        >>> encode_labels(["spam", "ham", "spam"])
        (tensor([1, 0, 1]), ('ham', 'spam'))
        >>> encode_labels([10, 2])[1]
        ('2', '10')
    """
    texts = [str(label).strip() for label in labels]
    for position, label in enumerate(texts):
        if not label:
            raise ValueError(f"`labels` must not be empty, got an empty label at position {position}.")
    names = tuple(class_names) if class_names is not None else _sorted_names(set(texts))
    index = {name: i for i, name in enumerate(names)}
    if not any(_is_integer(name) for name in names):
        index |= {str(i): i for i in range(len(names))}
    for position, label in enumerate(texts):
        if label not in index:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(f"`labels` must be among the classes {shown}, got {label!r} at position {position}.")
    return torch.tensor([index[label] for label in texts], dtype=torch.int64), names


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    """Distinct labels in numerical order if all are integers, else in the order of their characters."""
    return tuple(sorted(names, key=int) if all(map(_is_integer, names)) else sorted(names))


def _is_integer(text: str) -> bool:
    """Whether a label is the plain decimal form of an integer, so that equal numbers are equal labels."""
    return text.removeprefix("-").isdecimal() and str(int(text)) == text


def make_loader(
    dataset: Dataset[Any], batch_size: int, shuffle: bool, seed: int, collate: Any = None
) -> DataLoader[Any]:
    """A loader. If it shuffles, its order depends on `seed` only."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, collate_fn=collate)
