"""Photographs of ants and bees with MobileNetV2 trained on ImageNet: LoRA on convolutions, a new classifier."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.bench.quality_streams import seeded_order
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common.backbones import mobilenet
from benchmarks.common.data import archive_of, photographs
from benchmarks.common.learners import Stream


def quality(seed: int) -> QualityData:
    """The official split at 160 pixels, in a seed's order; other classes of ImageNet are out of distribution."""
    archive = archive_of("hymenoptera-160px/hymenoptera")
    is_test = archive["is_test"].astype(bool)
    train = np.flatnonzero(~is_test)[seeded_order(int((~is_test).sum()), seed).numpy()]
    test = np.flatnonzero(is_test)
    labels = torch.from_numpy(archive["y"]).long()
    imagenet = archive_of("imagenet-1000-128px/images")
    insects = {309, 310}  # bee, ant
    others = np.array([i for i in range(0, 1000, 5) if i not in insects])
    pictures = F.interpolate(photographs(imagenet, others), size=(160, 160), mode="bilinear", align_corners=False)
    return QualityData(
        Stream(photographs(archive, train), labels[train]),
        Stream(photographs(archive, test), labels[test]),
        Stream(pictures, torch.zeros(len(others), dtype=torch.long)),
    )


QUALITY = QualityProblem(
    "ants-bees",
    "MobileNetV2 → ants or bees, new head: 245 photographs; out of distribution: ImageNet",
    quality,
    mobilenet,
    classes=2,
    priority=60,
)
