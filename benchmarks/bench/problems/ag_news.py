"""AG News's four topics with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

from benchmarks.bench.quality_streams import drawn_texts
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.text import minilm, rows_of


def quality(seed: int) -> QualityData:
    """400 news items drawn by the seed, and 600 of the test part; CLINC150's out-of-scope queries are OOD."""
    rows = rows_of("ag_news")
    return drawn_texts(rows["train"], rows["test"], seed)


QUALITY = QualityProblem(
    "ag-news",
    "MiniLM → AG News's four topics, new head: 400 items; out of distribution: CLINC150's out-of-scope queries",
    quality,
    lambda seed, dropout: minilm(seed, 4, 4, dropout),
    classes=4,
    priority=202,
    sealed=True,
    is_one_of_nine=False,
)
