"""Section with examples: the most uncertain predictions, and the most confident wrong ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayes_kf.evaluation.classification.entropy import entropy
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.report.contents import Example, Gallery, Picture, Sections
from bayes_kf.evaluation.report.html_page import data_uri

if TYPE_CHECKING:
    from PIL import Image

MAX_TEXT_LENGTH = 300  # characters
MAX_SIDE = 160  # pixels; larger images are reduced to it
ENLARGED_SIDE = 128  # pixels; smaller images are enlarged by the largest whole factor up to it
CHANNELS = (1, 3, 4)
PLAIN_MODES = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "P": "RGBA", "PA": "RGBA"}
NUMERIC_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def example_section(
    probs: Array, targets: Array, examples: Any, class_names: Sequence[str] | None = None, *, num_examples: int = 12
) -> Sections:
    """The wrong predictions with the highest confidence, and the examples with the highest predictive entropy.

    Ties are resolved in favour of earlier examples. `examples` may be any object with a length that returns its i-th
    element as `examples[i]`; only the examples shown are read. Texts are cut at 300 characters. Images are reduced to
    160 pixels or enlarged by a whole factor, and their metadata are removed. Pixels of type uint8 or bool are shown
    unchanged; so are floats if all shown ones lie within 0..1. Other numbers, such as standardized pixels, are rescaled
    in each image: the smallest value becomes black and the largest becomes white.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        examples: N texts, or N images: an array (N, H, W), (N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels (if
            both orders fit, channels come first), or a sequence of such single images or of PIL images. A tuple of
            texts is shown as lines.
        class_names: C names; by default the class indices.
        num_examples: Largest number of examples of each kind.

    Raises:
        ValueError: If there are not N examples or C names, or an example to be shown is neither text nor image.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
        >>> section = example_section(probs, torch.tensor([1, 0, 1]), ["sure", "unsure", "right"], num_examples=2)
        >>> [[example.text for example in gallery.examples] for gallery in section.galleries]
        [['sure'], ['unsure', 'right']]
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    check_positive_int(num_examples, "num_examples")
    items = _checked(examples, len(checked))
    names = _names(class_names, checked.shape[1])
    entropies, (confidence, predicted) = entropy(checked), checked.max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    uncertain = _largest(entropies, num_examples).tolist()
    mistaken = wrong[_largest(confidence[wrong], num_examples)].tolist()
    described = {
        index: Example(
            index=index,
            label=names[labels[index]],
            prediction=names[predicted[index]],
            is_right=bool(predicted[index] == labels[index]),
            label_probability=checked[index, labels[index]].item(),
            probability=confidence[index].item(),
            entropy=entropies[index].item(),
            text=text,
            image=image,
        )
        for index, (text, image) in _texts_or_pictures(items, sorted({*uncertain, *mistaken})).items()
    }
    uncertain_note = f"The {len(uncertain):,} of {len(checked):,} examples with the highest predictive entropy."
    wrong_note = f"The {len(mistaken):,} of {len(wrong):,} wrong predictions with the highest confidence."
    return Sections(
        galleries=[
            Gallery(
                "Most wrong",
                wrong_note if mistaken else "No prediction is wrong.",
                tuple(described[index] for index in mistaken),
            ),
            Gallery("Most uncertain", uncertain_note, tuple(described[index] for index in uncertain)),
        ]
    )


def _checked(examples: Any, num_examples: int) -> Any:
    """The examples, checked: a sequence with one element for each prediction."""
    from PIL import Image

    is_sequence = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
    if isinstance(examples, str | bytes | Mapping | Image.Image) or not is_sequence:
        raise ValueError(f"`examples` must be a sequence of texts or images, got {type(examples).__name__}.")
    # a pandas column looks up [] by label, not by position
    items = examples.to_numpy() if hasattr(examples, "to_numpy") else examples
    of_numbers = isinstance(items, Tensor) or (isinstance(items, np.ndarray) and items.dtype.kind not in "OUT")
    if of_numbers and items.ndim not in (3, 4):
        wanted = "images of shape (N, H, W), (N, C, H, W) or (N, H, W, C), or texts"
        raise ValueError(f"`examples` must be {wanted}, got shape {tuple(items.shape)}.")
    if len(items) != num_examples:
        raise ValueError(f"`examples` must hold {num_examples}, as many as `probs` has rows, got {len(items)}.")
    return items


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Names of the classes, by default their indices."""
    names = [str(c) for c in range(num_classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != num_classes:
        raise ValueError(f"`class_names` must hold {num_classes} names, got {len(names)}.")
    return names


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values; equal ones in their order."""
    return values.sort(descending=True, stable=True).indices[:count]


def _texts_or_pictures(items: Any, indices: list[int]) -> dict[int, tuple[str, Picture | None]]:
    """Each of these examples as a text or a picture, by its index."""
    read = {index: _read(items[index], index) for index in indices}
    floats = [pixels for pixels in read.values() if isinstance(pixels, np.ndarray) and pixels.dtype.kind == "f"]
    is_unit = all(pixels.min() >= 0 and pixels.max() <= 1 for pixels in floats)
    shown: dict[int, tuple[str, Picture | None]] = {}
    for index, example in read.items():
        if isinstance(example, str):
            shown[index] = (example, None)
        else:
            shown[index] = ("", _picture(_image(example, is_unit) if isinstance(example, np.ndarray) else example))
    return shown


def _read(example: Any, index: int) -> str | np.ndarray | Image.Image:
    """A text, cut to its maximum length; pixels (H, W) or (H, W, channels), uint8 or not yet scaled; or a PIL image."""
    from PIL import Image

    if isinstance(example, tuple | list) and example and all(isinstance(part, str) for part in example):
        example = "\n".join(example)
    if isinstance(example, str):
        return example if len(example) <= MAX_TEXT_LENGTH else example[: MAX_TEXT_LENGTH - 1].rstrip() + "…"
    if isinstance(example, Image.Image):
        return _pixels(np.asarray(example), index) if example.mode in NUMERIC_MODES else example
    if isinstance(example, Tensor):
        plain = example.detach().cpu()
        return _pixels((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(), index)
    if isinstance(example, np.ndarray):
        return _pixels(example, index)
    raise ValueError(f"`examples` must hold texts or images, got {type(example).__name__} in example {index}.")


def _pixels(values: np.ndarray, index: int) -> np.ndarray:
    """Pixels (H, W) or (H, W, channels), as uint8 if they need no scaling."""
    if values.dtype.kind not in "buif":
        raise ValueError(f"`examples` must hold numbers as pixels, got {values.dtype} in example {index}.")
    if values.ndim == 3 and values.shape[0] in CHANNELS:
        values = np.moveaxis(values, 0, -1)
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[-1] not in CHANNELS):
        wanted = "images of shape (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels"
        raise ValueError(f"`examples` must hold {wanted}, got {values.shape} in example {index}.")
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.dtype == np.uint8 or values.dtype == np.bool_:
        return values if values.dtype == np.uint8 else values * np.uint8(255)
    if not np.isfinite(values).all():
        raise ValueError(f"`examples` must be finite, got NaN or infinity in example {index}.")
    return values.astype(np.float64) if values.dtype.kind == "f" else values.astype(np.int64)


def _image(pixels: np.ndarray, is_unit: bool) -> Image.Image:
    """Pixels as an image, rescaled unless they are uint8 or floats within 0..1."""
    from PIL import Image

    if pixels.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(pixels))
    if pixels.dtype.kind == "i" or not is_unit:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / ((high - low) or 1)
    return Image.fromarray(np.ascontiguousarray((255 * pixels).round().astype(np.uint8)))


def _picture(image: Image.Image) -> Picture:
    """The image at its displayed size, without its metadata."""
    from PIL import Image, ImageOps

    plain = ImageOps.exif_transpose(image)
    plain = plain.convert(PLAIN_MODES.get(plain.mode, "RGB"))
    plain.info.clear()
    if max(plain.size) > MAX_SIDE:
        plain.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    factor = max(1, ENLARGED_SIDE // max(plain.size))
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG")
    width, height = plain.size
    return Picture(data_uri(buffer.getvalue(), "image/png"), factor * width, factor * height, factor > 1)
