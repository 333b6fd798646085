"""ImageNet's photographs, one of each class, in six kinds, with MobileNetV2 trained on ImageNet: a new classifier.

The kinds follow from the WordNet numbers in the names of the classes, which are in WordNet's order: an animal begins
with n01 or n02 up to n02655020 (puffer). Among animals: dogs (n02085620 Chihuahua to n02113978 Mexican hairless), birds
(three ranges), other mammals, all others. An artefact begins with n02666196 (abacus) up to n04613696 (yurt). The sixth
kind is everything after that: food, landscapes, plants, people, signs. The network has most likely been trained on
these photographs.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right

import numpy as np
import torch

from benchmarks.bench.quality_streams import drawn_parts, flowers, resized
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import mobilenet
from benchmarks.common.data import archive_of, data_folder, photographs
from benchmarks.common.learners import Stream

KINDS = ("dog", "bird", "other mammal", "other animal", "artefact", "nature, food and the rest")
STARTS = {  # the first WordNet number of each range, and its kind
    1440764: "other animal",  # tench
    1514668: "bird",  # cock
    1629819: "other animal",  # European fire salamander
    1795545: "bird",  # black grouse
    1871265: "other mammal",  # tusker
    1910747: "other animal",  # jellyfish
    2002556: "bird",  # white stork
    2066245: "other mammal",  # grey whale
    2085620: "dog",  # Chihuahua
    2114367: "other mammal",  # timber wolf
    2165105: "other animal",  # tiger beetle
    2325366: "other mammal",  # wood rabbit
    2514041: "other animal",  # barracouta
    2666196: "artefact",  # abacus
    6359193: "nature, food and the rest",  # web site
}
DAISY = 985  # a class of ImageNet and of the flowers


def kind_of(name: str) -> str:
    """The kind of a class, from its name in the form "n02085620_Chihuahua"."""
    starts = list(STARTS)
    return STARTS[starts[bisect_right(starts, int(name.split("_")[0][1:])) - 1]]


def quality(seed: int) -> QualityData:
    """450 photographs drawn by the seed, and 550 others; flowers, but no daisies, are out of distribution."""
    names = json.loads((data_folder() / "imagenet-1000-128px" / "class_names.json").read_text(encoding="utf-8"))
    labels = torch.tensor([KINDS.index(kind_of(name)) for name in names])
    images = resized(photographs(archive_of("imagenet-1000-128px/images"), np.arange(len(names))))
    outside = flowers()
    outside = outside.at(outside.labels != 0)  # daisies are class 0
    return drawn_parts(images, labels, seed, Stream(resized(outside.inputs), outside.labels), 450, 550)


QUALITY = QualityProblem(
    "imagenet-kinds",
    "MobileNetV2 → six kinds of ImageNet's photographs, new head: 450 of them; out of distribution: flowers",
    quality,
    functools.partial(mobilenet, num_classes=len(KINDS)),
    classes=len(KINDS),
    priority=130,
    is_one_of_nine=False,
)
