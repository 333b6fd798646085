"""CoLA's sentences, acceptable or not, with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

import functools

from benchmarks.bench.quality_streams import labelled_sentences
from benchmarks.bench.reading import texts
from benchmarks.bench.registry.problems import QualityProblem, Sizes
from benchmarks.common.text import minilm

TITLE = "CoLA / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 8_551, 527
SIZES = {"online": Sizes(500, 300, 200, 400)}
PRIORITY = 50
train, test = texts("cola", "dev")
QUALITY = QualityProblem(
    "cola",
    "MiniLM → CoLA, new head: 1,000 sentences; out of distribution: BANKING77",
    functools.partial(labelled_sentences, "cola"),
    lambda seed, dropout: minilm(seed, 4, 2, dropout),
    classes=2,
    priority=80,
)
