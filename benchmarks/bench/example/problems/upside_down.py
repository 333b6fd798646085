"""UCI's digits, upside down, with the transformer that was trained on MNIST."""

from bayes_kf.data import uci_digits_split
from benchmarks.bench.registry.problems import Sizes

TITLE = "UCI digits upside down / MNIST transformer"
NETWORK, CLASSES, FRESH_HEAD = "digits-vit", 10, False
TRAIN, TEST = 1_197, 600
SIZES = {"online": Sizes(stream=600, tuning=300, validation=200, heldout=600)}


def train(which):
    """Images in [0, 1] and labels."""
    images, labels = uci_digits_split(TRAIN)[0]
    return (images[which].rot90(2, (2, 3)) + 1) / 2, labels[which]


def test(which):
    """Other images and their labels."""
    images, labels = uci_digits_split(TRAIN)[1]
    return (images[which].rot90(2, (2, 3)) + 1) / 2, labels[which]
