"""Tasks of the few-shot bench: training pool, test images, shifted and out-of-distribution images.

A new task is a function that returns a :class:`Task`, and a line in ``TASKS``. The first sentence of its docstring is a
title in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.data.corruption import corrupt
from benchmarks.few_shot.images import (
    Named,
    clothes,
    font_letters,
    handwritten_letters,
    kana,
    mnist_digits,
    uci_digits,
    usps_digits,
)

SHOTS = (1, 2, 4, 8, 16)
MOST_VALIDATION = 4  # most validation shots of a class; CoOp's and CLIP-LoRA's rule
TESTED, SHIFTED, FOREIGN = 500, 200, 150  # most images of each set
SPLIT_SEED = 12_345  # of the test images, the same for every seed


class Task(NamedTuple):
    """A classification task.

    Attributes:
        title: for tables.
        pool: images and labels from which shots are drawn.
        test: images like those of the pool.
        shifts: name -> images of the same classes that differ from those of the pool.
        foreign: name -> out-of-distribution images, of none of the classes, (N, 1, 28, 28).
    """

    title: str
    pool: Named
    test: Named
    shifts: dict[str, Named]
    foreign: dict[str, Tensor]


class Shots(NamedTuple):
    """Validation shots, to choose settings, and training shots."""

    validation: Named
    training: Named


def draw(pool: Named, shots: int, seed: int) -> Shots:
    """Validation shots of every class, drawn first, and training shots."""
    generator = torch.Generator().manual_seed(seed)
    validation_shots = min(shots, MOST_VALIDATION)
    validation, training = [], []
    for label in range(len(pool.names)):
        own = torch.nonzero(pool.labels == label).squeeze(1)
        order = own[torch.randperm(len(own), generator=generator)]
        if len(order) < validation_shots + shots:
            raise ValueError(
                f"`shots` must leave {validation_shots} images for validation, got {shots} of {len(order)}."
            )
        validation.append(order[:validation_shots])
        training.append(order[validation_shots : validation_shots + shots])
    order = torch.cat(training)
    order = order[torch.randperm(len(order), generator=generator)]
    return Shots(pool.at(torch.cat(validation)), pool.at(order))


def relabelled(images: Named, share: float, seed: int) -> Named:
    """The same images with a share of their labels replaced by other classes.

    Args:
        images: with labels.
        share: of the labels, 0 to 1; rounded down to whole images.
        seed: of the replaced labels and of the new ones.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, classes = images.labels.clone(), len(images.names)
    which = torch.randperm(len(labels), generator=generator)[: int(share * len(labels))]
    labels[which] = (labels[which] + torch.randint(1, classes, (len(which),), generator=generator)) % classes
    return images._replace(labels=labels)


def digits() -> Task:
    """MNIST; USPS, which the backbone has seen, and UCI's digits, which it has not, as shifts."""
    test = _some(mnist_digits("test"), TESTED)
    shifts = {"USPS": _some(usps_digits("test"), SHIFTED), "UCI": _some(uci_digits(), SHIFTED)}
    shifts["rotated"] = _corrupted(test, "rotation", 2)
    foreign = {"letters": _some(font_letters(), FOREIGN).images, "clothes": _some(clothes(), FOREIGN).images}
    return Task("MNIST digits", mnist_digits("train"), test, shifts, foreign)


def letters() -> Task:
    """Letters of fonts; handwritten ones, which the backbone has seen, as a shift."""
    pool, test = _halves(font_letters())
    shifts = {"handwritten": _some(handwritten_letters(), SHIFTED)}
    shifts |= {"noise": _corrupted(test, "gaussian_noise", 4), "rotated": _corrupted(test, "rotation", 2)}
    foreign = {"digits": _some(mnist_digits("test"), FOREIGN).images, "clothes": _some(clothes(), FOREIGN).images}
    return Task("notMNIST letters", pool, test, shifts, foreign)


def syllables() -> Task:
    """Cursive Japanese, which the backbone knows only by the names of syllables in another script."""
    pool, test = _halves(kana())
    shifts = {
        "noise": _corrupted(test, "gaussian_noise", 3),
        "rotated": _corrupted(test, "rotation", 1),
        "occluded": _corrupted(test, "occlusion", 1),
    }
    foreign = {"digits": _some(mnist_digits("test"), FOREIGN).images, "clothes": _some(clothes(), FOREIGN).images}
    return Task("KMNIST syllables", pool, test, shifts, foreign)


def garments() -> Task:
    """Clothes, which the backbone has not seen at all."""
    data = clothes()
    order = torch.cat([torch.nonzero(data.labels == label).squeeze(1)[:30] for label in range(10)])  # more than 4 + 16
    rest = torch.ones(len(data.labels), dtype=torch.bool)
    rest[order] = False
    test = data.at(rest)
    shifts = {
        "noise": _corrupted(test, "gaussian_noise", 2),
        "rotated": _corrupted(test, "rotation", 1),
        "occluded": _corrupted(test, "occlusion", 2),
    }
    foreign = {"digits": _some(mnist_digits("test"), FOREIGN).images, "syllables": _some(kana(), FOREIGN).images}
    return Task("Fashion-MNIST", data.at(order), test, shifts, foreign)


TASKS: dict[str, Callable[[], Task]] = {
    "letters": letters,
    "syllables": syllables,
    "digits": digits,
    "garments": garments,
}
BENCH = ("letters", "syllables", "digits")  # tasks of a default run


def _some(data: Named, number: int) -> Named:
    """A fixed random choice of at most ``number`` images."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return data.at(order[:number])


def _halves(data: Named) -> tuple[Named, Named]:
    """Two halves of a data set without an official split: the pool, and test images."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    cut = len(order) // 2
    return data.at(order[:cut]), data.at(order[cut : cut + TESTED])


def _corrupted(data: Named, kind: str, severity: int) -> Named:
    few = data.at(slice(SHIFTED))
    return few._replace(images=corrupt(few.images, kind, severity))
