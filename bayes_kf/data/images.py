"""Labelled images from folders, one folder per class, in the image format of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from bayes_kf.data.labels import LabelledData, make_loader
from bayes_kf.validation import check_one_of

_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic")  # index: the number in Pillow
_CROPPED_BELOW = 384  # pixels; ConvNeXt crops only smaller images


@dataclass(frozen=True)
class ImageFormat:
    """The image format of a model: pixels / 255, resized, then (pixel - mean) / sd in each channel.

    Attributes:
        size: height and width of the input.
        channels: 1 (grey) or 3 (RGB).
        mean: subtracted from each channel, C numbers.
        sd: divides each channel, C numbers.
        shortest_edge: length of the shorter side before the centre crop; None: resize to `size` without a crop.
        resample: nearest, lanczos, bilinear or bicubic.
        resize: height and width before the centre crop; the aspect ratio may change.

    Raises:
        ValueError: if a field is out of range.

    Example:
        >>> ImageFormat((2, 2), 1, (0.5,), (0.5,)).from_pixels(np.full((1, 2, 2), 255, np.uint8))
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    sd: tuple[float, ...] = (0.229, 0.224, 0.225)
    shortest_edge: int | None = None
    resample: str = "bilinear"
    resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"`size` must be a positive height and width, got {self.size}.")
        check_one_of("resample", self.resample, _RESAMPLE)
        if self.channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 or 3, got {self.channels}.")
        if len(self.mean) != self.channels or len(self.sd) != self.channels or min(self.sd) <= 0:
            raise ValueError(
                f"`mean` and `sd` must be {self.channels} numbers each, `sd` positive, got {self.mean} and {self.sd}."
            )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ImageFormat | None:
        """The format of a Hugging Face model folder; None if the folder has no `preprocessor_config.json`."""
        config = _read_json(Path(folder) / "preprocessor_config.json")
        if config is None:
            return None
        model = _read_json(Path(folder) / "config.json") or {}
        try:
            return cls(**_fields(config, model.get("num_channels")))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"`folder` must hold a preprocessor_config.json with sizes, means and deviations, got {error!r}"
                f" in {folder}."
            ) from error

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """A function from a PIL image to an input (C, H, W)."""
        mode = transforms.InterpolationMode(self.resample)
        first = self.shortest_edge if self.resize is None else self.resize
        resize: list[Any] = [transforms.Resize(self.size if first is None else first, mode)]
        if first is not None:
            resize.append(transforms.CenterCrop(self.size))
        steps = [transforms.Grayscale(self.channels)] if self.channels == 1 else []
        return transforms.Compose([*steps, *resize, transforms.ToTensor(), transforms.Normalize(self.mean, self.sd)])

    def from_pixels(self, pixels: np.ndarray) -> torch.Tensor:
        """Inputs (N, C, H, W) from uint8 pixels (N, H, W), (N, H, W, C) or (N, C, H, W)."""
        x = pixels[..., None] if pixels.ndim == 3 else pixels
        if x.ndim == 4 and x.shape[-1] != self.channels and x.shape[1] == self.channels:
            x = x.transpose(0, 2, 3, 1)
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(
                f"`pixels` must be (N, H, W), (N, H, W, C) or (N, C, H, W) with {self.channels} channels,"
                f" got {pixels.shape}."
            )
        x, to_input = x.squeeze(-1) if self.channels == 1 else x, self.transform()
        return torch.stack([to_input(Image.fromarray(image)) for image in np.ascontiguousarray(x)])


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a JSON object in {path.name}, got {path}: {error}.") from error


def _fields(config: dict[str, Any], channels: int | None) -> dict[str, Any]:
    """The fields of `ImageFormat` in a preprocessor configuration."""
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"`rescale_factor` must be 1/255, got {factor}.")
    mean = tuple(config.get("image_mean", ImageFormat.mean))
    sd = tuple(config.get("image_std", ImageFormat.sd))
    if not config.get("do_normalize", True):
        mean, sd = (0.0,) * len(mean), (1.0,) * len(sd)
    resample = _RESAMPLE[config.get("resample", 2)]
    return dict(channels=channels or len(mean), mean=mean, sd=sd, resample=resample) | _sizes(config)


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in a preprocessor configuration."""
    size = config.get("size", 224)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    crop_fraction = config.get("crop_pct")
    if shortest is not None and crop_fraction is not None:  # ConvNeXt does not crop large images
        uncropped = shortest >= _CROPPED_BELOW
        return dict(size=(shortest, shortest), shortest_edge=None if uncropped else int(shortest / crop_fraction))
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    if crop is None:
        return dict(size=_pair(size if shortest is None else shortest), shortest_edge=shortest)
    return dict(size=_pair(crop), shortest_edge=shortest, resize=_pair(size) if shortest is None else None)


def _pair(size: int | dict[str, int]) -> tuple[int, int]:
    """Height and width of an image processor's size."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def read_image(path: str) -> Image.Image:
    """A file as an RGB image. 16-bit and float images are rejected, because the conversion would clip them."""
    try:
        with Image.open(path) as image:
            mode, rgb = image.mode, image.convert("RGB")
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise ValueError(f"`path` must hold readable images, got {path}: {error}.") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"`path` must hold 8-bit images, got mode {mode} in {path}.")
    return rgb


def image_folder_data(
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    image_format: ImageFormat | None = None,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
) -> LabelledData:
    """Batches (inputs, targets) from `path/CLASS/IMAGE` files, as torchvision's ImageFolder reads them.

    Args:
        path: a folder with one folder per class.
        class_names: the classes in order, some perhaps without a folder; None: the sorted names of the folders.
        image_format: the image format of the model; None: 224x224 RGB with ImageNet's mean and standard deviation.
        batch_size: examples per batch.
        shuffle: whether every pass has a new random order.
        seed: seed of the order.

    Returns:
        The loader of inputs (B, C, H, W) and class indices (B,), and the class names.

    Raises:
        ValueError: if there are no class folders or no images, or a folder is not among `class_names`. The loader
            raises it for an unreadable image.
    """
    try:
        dataset = ImageFolder(str(path), (image_format or ImageFormat()).transform(), loader=read_image)
    except FileNotFoundError as error:
        raise ValueError(f"`path` must hold one folder of images a class, got {path}: {error}") from error
    names = tuple(dataset.classes if class_names is None else class_names)
    unknown = sorted(set(dataset.classes) - set(names))
    if unknown:
        raise ValueError(f"`path` must hold folders named after the classes {', '.join(names)}, got {unknown[0]}.")
    dataset.target_transform = [names.index(name) for name in dataset.classes].__getitem__
    return LabelledData(make_loader(dataset, batch_size, shuffle, seed), names)
