"""TREC's questions of six types with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

from benchmarks.bench.quality_streams import drawn_texts
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.text import minilm, rows_of


def quality(seed: int) -> QualityData:
    """400 questions drawn by the seed, and the 500 test questions; CLINC150's out-of-scope queries are OOD."""
    rows = rows_of("trec6")
    return drawn_texts(rows["train"], rows["test"], seed)


QUALITY = QualityProblem(
    "trec6",
    "MiniLM → TREC's six types of questions, new head: 400 texts; out of distribution: CLINC150's out-of-scope queries",
    quality,
    lambda seed, dropout: minilm(seed, 4, 6, dropout),
    classes=6,
    priority=200,
    is_one_of_nine=False,
)
