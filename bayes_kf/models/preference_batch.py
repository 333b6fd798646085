"""Batches of preference pairs: of each pair a chosen and a rejected text.

The two texts have names of their own, ``input_ids_chosen`` (B, T), ``input_ids_rejected`` (B, T'), and so on. TRL's
``RewardTrainer`` stacks them instead: the first half of ``input_ids`` (2B, T) is chosen, the second half rejected.
``margin`` (B,), if given, is by how much the chosen reward should be larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayes_kf.models.batch import batch_size

CHOSEN, REJECTED = "_chosen", "_rejected"  # ends of the names of a pair's two texts
MARGIN, LABELS = "margin", "labels"
OF_PAIRS = (MARGIN, LABELS)  # names of what a pair has once


def is_named(batch: Mapping[str, Any]) -> bool:
    """Whether a batch names chosen or rejected texts."""
    return any(name.endswith((CHOSEN, REJECTED)) for name in batch)


def is_certain(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is of TRL's forms for sure: it names both texts, or has margins for half of its texts."""
    if any("input_ids" + end in batch for end in (CHOSEN, REJECTED)):
        return True
    ids, margin = batch.get("input_ids"), batch.get(MARGIN)
    if not isinstance(ids, Tensor) or not isinstance(margin, Tensor):
        return False
    return ids.ndim == 2 and margin.ndim == 1 and 2 * len(margin) == len(ids)


def named_pairs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with names for both texts of every pair; one that has them is checked.

    Raises:
        ValueError: if a text has no counterpart, or margins or labels are not one for each pair.

    Example:
        >>> import torch
        >>> pairs = named_pairs({"input_ids": torch.tensor([[1, 2], [1, 3]])})
        >>> {name: ids.tolist() for name, ids in pairs.items()}
        {'input_ids_chosen': [[1, 2]], 'input_ids_rejected': [[1, 3]]}
    """
    pairs = _checked(batch) if is_named(batch) else _unstacked(batch)
    size = _size(pairs)
    for name in OF_PAIRS:
        value = pairs.get(name)
        if isinstance(value, Tensor) and tuple(value.shape) not in ((size,), (size, 1)):
            raise ValueError(f"`{name}` must be one for each of {size} pairs, got shape {tuple(value.shape)}.")
    return pairs


def read_pairs(batch: Any) -> Any:
    """A loader's batch, ``(inputs, labels)`` or a mapping, with names for the texts of each pair.

    A mapping without ``labels`` gets the label True for every pair, (B,): the first text is the chosen one.
    """
    if isinstance(batch, Mapping):
        pairs = named_pairs(batch)
        if pairs.get(LABELS) is None:
            pairs[LABELS] = torch.ones(_size(pairs), dtype=torch.bool)
        return pairs
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Mapping):
        return named_pairs(batch[0]), batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return read_pairs(batch[0])
    return batch


def randomly_ordered(batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
    """The pairs with half of them, drawn at random, in the other order, which their labels and margins say.

    A fit is the same. Scores that look at each label by itself, such as the classwise calibration error, need pairs
    whose order does not give the label away.

    Args:
        batch: of pairs, in either form.
        generator: of the order; by default a new one seeded with 0.

    Raises:
        ValueError: if texts of several widths have no ``attention_mask``.
    """
    pairs = read_pairs(batch)
    size = _size(pairs)
    swapped = torch.rand(size, generator=generator or torch.Generator().manual_seed(0)) < 0.5
    chosen, rejected = one_text(pairs, CHOSEN), one_text(pairs, REJECTED)
    if "attention_mask" not in chosen and any(v.shape != rejected[n].shape for n, v in chosen.items()):
        raise ValueError(f"`batch` must have `attention_mask{CHOSEN}` for texts of several widths, got none.")
    width = {name: max(value.shape[-1], rejected[name].shape[-1]) for name, value in chosen.items()}
    for name, value in chosen.items():
        one, other = (_widened(text, width[name]) for text in (value, rejected[name]))
        first = swapped.view(-1, *[1] * (one.ndim - 1)).to(one.device)
        pairs[name + CHOSEN], pairs[name + REJECTED] = one.where(~first, other), other.where(~first, one)
    labels = pairs[LABELS].float()
    pairs[LABELS] = labels.where(~swapped.view_as(labels).to(labels.device), 1.0 - labels)
    if isinstance(margin := pairs.get(MARGIN), Tensor):
        pairs[MARGIN] = margin.where(~swapped.view_as(margin).to(margin.device), -margin)
    return pairs


def _widened(texts: Tensor, width: int) -> Tensor:
    """Tokens, or their mask, (B, T), with zeros behind them up to a width."""
    return torch.nn.functional.pad(texts, (0, width - texts.shape[-1]))


def one_text(pairs: Mapping[str, Any], end: str) -> dict[str, Any]:
    """The model's inputs of the chosen or of the rejected texts, without the ends of their names."""
    return {name.removesuffix(end): value for name, value in pairs.items() if name.endswith(end)}


def _size(pairs: Mapping[str, Any]) -> int:
    """The number of pairs."""
    return batch_size(one_text(pairs, CHOSEN))


def _checked(batch: Mapping[str, Any]) -> dict[str, Any]:
    pairs = {name: value for name, value in batch.items() if name in OF_PAIRS or name.endswith((CHOSEN, REJECTED))}
    for end, other in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)):
        for name in one_text(pairs, end):
            if name + other not in pairs:
                raise ValueError(f"`batch` must have `{name}{other}` beside `{name}{end}`, got {', '.join(batch)}.")
    sizes = {name: len(value) for name, value in pairs.items() if isinstance(value, Tensor) and value.ndim == 2}
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{size} in `{name}`" for name, size in sizes.items())
        raise ValueError(f"`batch` must hold as many rejected texts as chosen ones, got {text}.")
    return pairs


def _unstacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: value for name, value in batch.items() if name not in OF_PAIRS and isinstance(value, Tensor)}
    rows = batch_size(texts)
    if rows % 2:
        raise ValueError(
            f"`batch` must hold the chosen texts and then as many rejected ones, got an odd number of texts, {rows}."
        )
    pairs = {name: batch[name] for name in OF_PAIRS if name in batch}
    for name, value in texts.items():
        halves = value.ndim > 0 and len(value) == rows
        pairs[name + CHOSEN] = value[: rows // 2] if halves else value
        pairs[name + REJECTED] = value[rows // 2 :] if halves else value
    return pairs
