"""BANKING77's questions of 77 intents with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

from benchmarks.bench.quality_streams import drawn_texts, seeded_order
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.text import minilm, rows_of

INTENTS, SHOTS = 77, 6


def quality(seed: int) -> QualityData:
    """Six questions of each intent drawn by the seed, and 600 of the test; CLINC150's out-of-scope queries are OOD."""
    rows = rows_of("banking77")
    drawn: dict[str, list[list[str]]] = {}
    for i in seeded_order(len(rows["train"]), seed).tolist():
        drawn.setdefault(rows["train"][i][-1], []).append(rows["train"][i])
    chosen = [row for name in sorted(drawn) for row in drawn[name][:SHOTS]]
    return drawn_texts(chosen, rows["test"], seed, len(chosen))


QUALITY = QualityProblem(
    "banking77",
    "MiniLM → BANKING77's 77 intents, new head: 462 questions; out of distribution: CLINC150's out-of-scope queries",
    quality,
    lambda seed, dropout: minilm(seed, 4, INTENTS, dropout),
    classes=INTENTS,
    priority=201,
    is_one_of_nine=False,
)
