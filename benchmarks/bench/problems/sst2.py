"""SST-2's sentences and phrases with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

from benchmarks.bench.reading import texts
from benchmarks.bench.registry.problems import Sizes

TITLE = "SST-2 / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 67_349, 872
SIZES = {"online": Sizes(500, 300, 200, 400)}
PRIORITY = 40
train, test = texts("sst2", "dev")
