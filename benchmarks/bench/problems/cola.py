"""CoLA's sentences, acceptable or not, with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

from benchmarks.bench.reading import texts
from benchmarks.bench.registry.problems import Sizes

TITLE = "CoLA / MiniLM, new head"
NETWORK, CLASSES, FRESH_HEAD = "minilm", 2, True
TRAIN, TEST = 8_551, 527
SIZES = {"online": Sizes(500, 300, 200, 400)}
PRIORITY = 50
train, test = texts("cola", "dev")
