"""Labelled data from files of any supported kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayes_kf.data.arrays import array_data
from bayes_kf.data.images import ImageFormat, image_folder_data
from bayes_kf.data.labels import LabelledData
from bayes_kf.data.text import TEXT_SUFFIXES, text_data


def open_dataset(
    path: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    image_format: ImageFormat | None = None,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
    **text_options: Any,
) -> LabelledData:
    """A loader and its class names from an image folder, an `.npz` file, or a `.csv`, `.tsv` or `.jsonl` file.

    Args:
        path: a folder (`path/CLASS/IMAGE`) or a file, whose suffix decides the reader.
        model: a Hugging Face model folder with the tokenizer or the image format.
        class_names: the classes in order; None: the classes of the data.
        image_format: replaces the image format of the model.
        batch_size: examples per batch.
        shuffle: whether every pass has a new random order.
        seed: seed of the order.
        **text_options: arguments `text_column`, `label_column`, `numeric` and `max_length` of `text_data`.

    Returns:
        Batches (inputs, targets) of arrays and images, or mappings with `labels` of text; and the class names.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if no reader supports `path`, or its reader raises.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"`path` must be an existing file or folder, got {path}.")
    common: dict[str, Any] = dict(class_names=class_names, batch_size=batch_size, shuffle=shuffle, seed=seed)
    if file.is_file() and file.suffix in TEXT_SUFFIXES:
        if model is None:
            raise ValueError(f"`model` must be a Hugging Face model folder with a tokenizer to read {path}, got None.")
        return text_data(file, model, **common, **text_options)
    if text_options:
        raise ValueError(f"`{next(iter(text_options))}` must be left out unless `path` is text, got {path}.")
    if image_format is None and model is not None:
        image_format = ImageFormat.from_pretrained(model)
    if file.is_dir():
        return image_folder_data(file, image_format=image_format, **common)
    if file.suffix == ".npz":
        return array_data(file, image_format=image_format, **common)
    raise ValueError(f"`path` must be an image folder or end in .npz, {', '.join(TEXT_SUFFIXES)}, got {path}.")
