"""The data sets of ``run.py``: a stream, held-out and out-of-distribution examples, and the model that learns.

Streams are short, because adapters are fitted where labels are few. Sizes, splits and models are in ``PROBLEMS``. They
are not the problems of ``benchmarks/bench``: they have out-of-distribution inputs and dropout, draw adapters in another
order, and a seed also sets their split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.common.backbones import mobilenet, resnet_cifar, vit_cifar
from benchmarks.common.data import archive_of, fashion_mnist, kmnist, notmnist, photographs, usps
from benchmarks.common.learners import Stream, draw_classifier
from benchmarks.common.text import minilm, rows_of, sentences, tokenized

MAX_FOREIGN = 500  # out-of-distribution inputs


class Problem(NamedTuple):
    """A data set for one seed.

    Attributes:
        stream: to learn, in this order.
        heldout: to predict.
        foreign: out-of-distribution inputs; their labels have no meaning.
        human: people's answers to the held-out inputs, shares (N, C); None if unknown.
    """

    stream: Stream
    heldout: Stream
    foreign: Stream
    human: Tensor | None = None


class Setting(NamedTuple):
    """A data set and the model that learns it.

    Attributes:
        title: for the table.
        load: returns the data of a seed.
        model: returns the model at its start, from a seed and LoRA's dropout rate.
        classes: their number.
    """

    title: str
    load: Callable[[int], Problem]
    model: Callable[[int, float], PeftModel]
    classes: int


def _usps(seed: int) -> Problem:
    train, test = usps("train"), usps("test")
    order = _order(len(train.labels), seed)[:1000]
    return Problem(Stream(train.images[order], train.labels[order]), Stream(*test).first(1000), _letters())


def _split(images: Tensor, labels: Tensor, seed: int, foreign: Stream) -> Problem:
    """1,000 examples to learn and 1,000 others to predict."""
    order = _order(len(labels), seed)
    first, rest = order[:1000], order[1000:2000]
    return Problem(Stream(images[first], labels[first]), Stream(images[rest], labels[rest]), foreign)


def _kmnist(seed: int) -> Problem:
    return _split(*kmnist(), seed, _letters())


def _notmnist(seed: int) -> Problem:
    return _split(*notmnist(), seed, Stream(*fashion_mnist()).first(MAX_FOREIGN))


def _letters() -> Stream:
    return Stream(*notmnist()).first(MAX_FOREIGN)


def _cifar(seed: int, size: int, labels: str) -> Problem:
    """``size`` training images drawn by the seed, and the first 1,000 test images."""
    train, test = archive_of("cifar10-jpeg/train_00000-24999"), archive_of("cifar10-jpeg/test")
    order = _order(len(train["y"]), seed)[:size].numpy()
    counts = torch.from_numpy(test["human_counts"][:1000]).double()
    return Problem(
        Stream(photographs(train, order), torch.from_numpy(train[labels][order]).long()),
        Stream(photographs(test, np.arange(1000)), torch.from_numpy(test["y"][:1000]).long()),
        _flowers(32),
        counts / counts.sum(1, keepdim=True),
    )


def _hymenoptera(seed: int) -> Problem:
    """The official split at 160 pixels, in a seed's order; other classes of ImageNet are out of distribution."""
    archive = archive_of("hymenoptera-160px/hymenoptera")
    is_test = archive["is_test"].astype(bool)
    train = np.flatnonzero(~is_test)[_order(int((~is_test).sum()), seed).numpy()]
    test = np.flatnonzero(is_test)
    labels = torch.from_numpy(archive["y"]).long()
    imagenet = archive_of("imagenet-1000-128px/images")
    insects = {309, 310}  # bee, ant
    others = np.array([i for i in range(0, 1000, 5) if i not in insects])
    pictures = F.interpolate(photographs(imagenet, others), size=(160, 160), mode="bilinear", align_corners=False)
    return Problem(
        Stream(photographs(archive, train), labels[train]),
        Stream(photographs(archive, test), labels[test]),
        Stream(pictures, torch.zeros(len(others), dtype=torch.long)),
    )


def _sst2(seed: int) -> Problem:
    return _text("sst2", "dev", seed, 1000)


def _cola(seed: int) -> Problem:
    return _text("cola", "dev", seed, 1000)


def _text(name: str, split: str, seed: int, size: int) -> Problem:
    """Labelled sentences; questions about banking are out of distribution."""
    rows = len(rows_of(name)["train"])
    order = _order(rows, seed)[:size]
    questions = [row[0] for row in rows_of("banking77")["test"][:MAX_FOREIGN]]
    return Problem(sentences(name, "train", order), sentences(name, split), _unlabelled(questions))


def _clinc150(seed: int) -> Problem:
    """Ten queries of each of 150 intents, and every third test query; out-of-scope queries are out of distribution."""
    rows = rows_of("clinc150")
    names = sorted({row[-1] for row in rows["train"]})
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[row[-1]] for row in rows["train"]])
    order = _order(len(labels), seed)
    chosen = torch.cat([order[labels[order] == c][:10] for c in range(len(names))])
    chosen = chosen[_order(len(chosen), seed + 1)]
    train = tokenized([rows["train"][i][0] for i in chosen.tolist()])
    test = rows["test"][::3]
    return Problem(
        Stream(train, labels[chosen]),
        Stream(tokenized([row[0] for row in test]), torch.tensor([number[row[-1]] for row in test])),
        _unlabelled([row[0] for row in rows["oos_test"][:MAX_FOREIGN]]),
    )


def _digits_model(new_classes: bool) -> Callable[[int, float], PeftModel]:
    """The digit transformer with LoRA of rank 4; its classifier is new if the classes are."""

    def make(seed: int, dropout: float) -> PeftModel:
        model = lora_digits_vit(rank=4, seed=seed)
        for module in model.modules():
            for name, layer in getattr(module, "lora_dropout", {}).items():
                module.lora_dropout[name] = torch.nn.Dropout(dropout) if dropout else layer
        if new_classes:
            draw_classifier(model, seed)
        return model

    return make


def _minilm_model(classes: int) -> Callable[[int, float], PeftModel]:
    return lambda seed, dropout: minilm(seed, 4, classes, dropout)


PROBLEMS: dict[str, Setting] = {
    "usps": Setting(
        "MNIST transformer → USPS: 1,000 digits; foreign: notMNIST's letters", _usps, _digits_model(False), 10
    ),
    "kmnist": Setting(
        "MNIST transformer → KMNIST, new head: 1,000 characters; foreign: notMNIST", _kmnist, _digits_model(True), 10
    ),
    "notmnist": Setting(
        "MNIST transformer → notMNIST, new head: 1,000 letters; foreign: Fashion-MNIST",
        _notmnist,
        _digits_model(True),
        10,
    ),
    "cifar-few": Setting(
        "CIFAR-10 transformer → JPEG copy, 500 images; foreign: flowers",
        lambda seed: _cifar(seed, 500, "y"),
        vit_cifar,
        10,
    ),
    "cifar-noisy": Setting(
        "ResNet-20 → JPEG copy, 1,000 images with one person's labels (17 % wrong); foreign: flowers",
        lambda seed: _cifar(seed, 1000, "y_random1"),
        resnet_cifar,
        10,
    ),
    "ants-bees": Setting(
        "MobileNetV2 → ants or bees, new head: 245 photographs; foreign: ImageNet", _hymenoptera, mobilenet, 2
    ),
    "sst2": Setting(
        "MiniLM → SST-2, new head: 1,000 sentences; foreign: BANKING77's questions", _sst2, _minilm_model(2), 2
    ),
    "cola": Setting("MiniLM → CoLA, new head: 1,000 sentences; foreign: BANKING77", _cola, _minilm_model(2), 2),
    "clinc150": Setting(
        "MiniLM → CLINC150, new head: 1,500 queries; foreign: its out-of-scope queries",
        _clinc150,
        _minilm_model(150),
        150,
    ),
}


def _order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _flowers(side: int) -> Stream:
    archive = archive_of("flowers5-32px/flowers")
    images = photographs(archive, np.flatnonzero(archive["is_test"])[:MAX_FOREIGN])
    assert images.shape[-1] == side, f"flowers are of {images.shape[-1]} pixels"
    return Stream(images, torch.zeros(len(images), dtype=torch.long))


def _unlabelled(texts: list[str]) -> Stream:
    return Stream(tokenized(texts), torch.zeros(len(texts), dtype=torch.long))
