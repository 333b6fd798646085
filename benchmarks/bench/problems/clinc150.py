"""CLINC150's queries of 150 intents with MiniLM: LoRA on queries and values, a new classifier."""

from __future__ import annotations

import torch

from benchmarks.bench.quality_streams import MAX_OOD, seeded_order, unlabelled
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.learners import Stream
from benchmarks.common.text import minilm, rows_of, tokenized


def quality(seed: int) -> QualityData:
    """Ten queries of each of 150 intents, and every third test query; out-of-scope queries are out of distribution."""
    rows = rows_of("clinc150")
    names = sorted({row[-1] for row in rows["train"]})
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[row[-1]] for row in rows["train"]])
    order = seeded_order(len(labels), seed)
    chosen = torch.cat([order[labels[order] == c][:10] for c in range(len(names))])
    chosen = chosen[seeded_order(len(chosen), seed + 1)]
    train = tokenized([rows["train"][i][0] for i in chosen.tolist()])
    test = rows["test"][::3]
    return QualityData(
        Stream(train, labels[chosen]),
        Stream(tokenized([row[0] for row in test]), torch.tensor([number[row[-1]] for row in test])),
        unlabelled([row[0] for row in rows["oos_test"][:MAX_OOD]]),
    )


QUALITY = QualityProblem(
    "clinc150",
    "MiniLM → CLINC150, new head: 1,500 queries; out of distribution: its out-of-scope queries",
    quality,
    lambda seed, dropout: minilm(seed, 4, 150, dropout),
    classes=150,
    priority=90,
)
