"""Images with class names: the data sets of the small CLIP's training and tests.

All are grey, (N, 1, 28, 28), float32 in [-1, 1], read from ../shared/data or $BAYES_KF_DATA.
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bayes_kf.data import uci_digits as uci
from benchmarks.common.data import data_folder, fashion_mnist, kmnist, mnist, notmnist, usps

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
CLOTHES = (
    "t-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
)
KATAKANA = (
    "a i u e o ka ki ku ko sa shi su se so ta chi tsu te to na ni nu ne no ha hi fu he ho ma mi mu me mo ya yu yo "
    "ra ri ru re ro wa wi we wo n"
)
DRAWERS = 20  # of every Omniglot character
KEPT_DRAWERS = 16  # in the training set; the others are in the test set
STROKE = 5  # width of thin lines, in pixels of 105


class Named(NamedTuple):
    """Images (N, 1, 28, 28), labels (N,), and the name of every class in a prompt."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def at(self, which: Tensor | slice) -> Named:
        """Some of its images."""
        return Named(self.images[which], self.labels[which], self.names)


def mnist_digits(split: str) -> Named:
    """MNIST."""
    data = mnist("train" if split == "train" else "test")
    return Named(data.images, data.labels, tuple(f"digit {name}" for name in DIGITS))


def usps_digits(split: str) -> Named:
    """USPS, without a frame."""
    data = usps("train" if split == "train" else "test")
    return Named(data.images, data.labels, tuple(f"digit {name}" for name in DIGITS))


def uci_digits() -> Named:
    """UCI's digits, 1,797 of 8x8 pixels."""
    data = uci()
    return Named(data.images, data.labels, tuple(f"digit {name}" for name in DIGITS))


def font_letters() -> Named:
    """NotMNIST: letters A to J in many fonts."""
    data = notmnist()
    return Named(data.images, data.labels, tuple(f"letter {name}" for name in "abcdefghij"))


def kana() -> Named:
    """Kuzushiji-MNIST's test images: ten cursive syllables."""
    data = kmnist()
    return Named(data.images, data.labels, tuple(f"japanese {name}" for name in KANA))


def clothes() -> Named:
    """900 images of Fashion-MNIST."""
    data = fashion_mnist()
    return Named(data.images, data.labels, CLOTHES)


def photographs(split: str) -> Named:
    """CIFAR-10 after JPEG, in grey."""
    archive = np.load(
        data_folder() / "cifar10-jpeg" / ("test.npz" if split == "test" else "train_00000-24999.npz"),
        allow_pickle=False,
    )
    head, body, ends = archive["head"].tobytes(), archive["body"].tobytes(), archive["off"]
    grey = [
        np.asarray(Image.open(io.BytesIO(head + body[i:j])).convert("L").resize((28, 28), Image.Resampling.BILINEAR))
        for i, j in itertools.pairwise(ends)
    ]
    images = torch.from_numpy(np.stack(grey)).unsqueeze(1).float() / 127.5 - 1
    return Named(images, torch.from_numpy(archive["y"]).long(), CIFAR)


def characters(split: str) -> Named:
    """Omniglot's characters of both small parts, white on black; the last drawers are the test set."""
    images, labels, names = [], [], []
    for part, skipped in ((1, ()), (2, ("Greek", "Latin"))):  # these two are in both parts
        folder = data_folder() / "omniglot-small"
        pixels = np.unpackbits(_array(folder / f"small{part}_x_bits.npy.xz"), axis=1, count=105 * 105)
        which = _array(folder / f"small{part}_char.npy.xz").astype(np.int64)
        listed = json.loads((folder / f"small{part}_names.json").read_text(encoding="utf-8"))["characters"]
        for number, path in enumerate(listed):
            _, alphabet, character = path.split("/")
            if alphabet in skipped:
                continue
            rows = np.flatnonzero(which == number)
            rows = rows[:KEPT_DRAWERS] if split == "train" else rows[KEPT_DRAWERS:]
            images.append(_shrunk(pixels[rows].reshape(-1, 1, 105, 105)))
            labels += [len(names)] * len(rows)
            names.append(character_name(alphabet, int(character.removeprefix("character"))))
    return Named(torch.cat(images), torch.tensor(labels), tuple(names))


def handwritten_letters() -> Named:
    """Omniglot's Latin a to j, in all hands."""
    parts = [characters("train"), characters("test")]
    first = parts[0].names.index("letter a")
    images = torch.cat([part.images for part in parts])
    labels = torch.cat([part.labels for part in parts]) - first
    latin = (labels >= 0) & (labels < 10)
    return Named(images[latin], labels[latin], tuple(f"letter {name}" for name in "abcdefghij"))


def character_name(alphabet: str, number: int) -> str:
    """The name of an Omniglot character, or its number if its alphabet is not listed here."""
    if alphabet == "Latin":
        return f"letter {chr(ord('a') + number - 1)}"
    if alphabet == "Greek":
        return f"greek {GREEK.split()[number - 1]}"
    if alphabet == "Japanese_(katakana)":
        return f"japanese {KATAKANA.split()[number - 1]}"
    return f"{alphabet.replace('_', ' ').lower()} sign {number}"


def _shrunk(ink: np.ndarray) -> Tensor:
    """Drawings of 105x105 resized to 28x28; thin lines are widened first."""
    wide = F.max_pool2d(torch.from_numpy(ink).float(), STROKE, stride=1, padding=STROKE // 2)
    return F.interpolate(wide, size=(28, 28), mode="area") * 2 - 1


def _array(path: object) -> np.ndarray:
    with lzma.open(str(path)) as file:
        return np.load(file, allow_pickle=False)
