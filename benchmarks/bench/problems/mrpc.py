"""MRPC's pairs of sentences, paraphrases or not, with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

from benchmarks.bench.reading import texts
from benchmarks.bench.registry.problems import Sizes

TITLE = "MRPC / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 4_076, 1_725
SIZES = {"online": Sizes(400, 300, 200, 400)}
PRIORITY = 60
train, test = texts("mrpc", "test", pairs=True)
