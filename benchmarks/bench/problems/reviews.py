"""Sentiment of reviews and sentences about films with MiniLM: LoRA on queries and values, a new classifier.

Customer reviews (Hu and Liu), Rotten Tomatoes (half of its sentences are SST-2's), and reviews of books, films,
electronics, kitchenware and airlines, of which MiniLM reads the first 64 tokens.
"""

from __future__ import annotations

import functools

from benchmarks.bench.quality_streams import drawn_texts
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.text import minilm, rows_of


def quality(file: str, seed: int) -> QualityData:
    """400 training texts drawn by the seed and 600 for the test; CLINC150's out-of-scope queries are OOD."""
    rows = rows_of(file)
    return drawn_texts(rows["all"], None, seed) if "all" in rows else drawn_texts(rows["train"], rows["test"], seed)


def _problem(file: str, what: str, priority: int, sealed: bool = False) -> QualityProblem:
    return QualityProblem(
        file.replace("_", "-"),
        f"MiniLM → {what}, new head: 400 texts; out of distribution: CLINC150's out-of-scope queries",
        functools.partial(quality, file),
        lambda seed, dropout: minilm(seed, 4, 2, dropout),
        classes=2,
        priority=priority,
        sealed=sealed,
        is_one_of_nine=False,
    )


QUALITY = (
    _problem("customer_reviews", "customer reviews", 210),
    _problem("rotten_tomatoes", "Rotten Tomatoes", 211),
    _problem("reviews_airline", "reviews of airlines", 212, sealed=True),
    _problem("reviews_books", "reviews of books", 213, sealed=True),
    _problem("reviews_dvd", "reviews of films", 214, sealed=True),
    _problem("reviews_electronics", "reviews of electronics", 215, sealed=True),
    _problem("reviews_kitchen", "reviews of kitchenware", 216, sealed=True),
)
