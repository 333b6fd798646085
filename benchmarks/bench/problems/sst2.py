"""SST-2's sentences and phrases with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

import functools

from benchmarks.bench.quality_streams import labelled_sentences
from benchmarks.bench.reading import texts
from benchmarks.bench.registry.problems import QualityProblem, Sizes
from benchmarks.common.text import minilm

TITLE = "SST-2 / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 67_349, 872
SIZES = {"online": Sizes(500, 300, 200, 400)}
PRIORITY = 40
train, test = texts("sst2", "dev")
QUALITY = QualityProblem(
    "sst2",
    "MiniLM → SST-2, new head: 1,000 sentences; out of distribution: BANKING77's questions",
    functools.partial(labelled_sentences, "sst2"),
    lambda seed, dropout: minilm(seed, 4, 2, dropout),
    classes=2,
    priority=70,
)
