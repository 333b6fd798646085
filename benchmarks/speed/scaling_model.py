"""A model of a step's time on many GPUs: the formulas of `docs/distributed.md` and their constants."""

from __future__ import annotations

import math
from typing import NamedTuple

WORLDS = (8, 64, 512)
FLOPS = 400e12  # a GPU reaches in bf16 passes: 40 % of an H100's 989 dense (its data sheet)
MEMORY = 2e12  # bytes a second read or written: 60 % of an H100's 3.35e12
INSIDE, ACROSS = 300e9, 40e9  # bytes a second and GPU: NVLink within 8, 400 Gbit/s across, both at 2/3 to 4/5
LATENCY = 20e-6  # of a collective
EACH = 8  # examples a GPU
BOX = 8


class Place(NamedTuple):
    """A base model and an adapter.

    Attributes:
        name: for the table.
        base: its parameters.
        adapter: n.
        tokens: of an example.
        directions: c rows of an example.
        rank: L of the belief.
        fsdp: whether the base's weights are gathered for every pass, at 2 bytes each.
    """

    name: str
    base: float
    adapter: float
    tokens: int
    directions: int
    rank: int = 20
    fsdp: bool = False


PLACES = (
    Place("ViT-L/16, LoRA 16 on q, v, 10 classes", 0.304e9, 1.6e6, 197, 9),
    Place("7B, LoRA 16 on q, v, sampled", 6.7e9, 8.4e6, 512, 2),
    Place("70B under FSDP, LoRA 16 on q, v, sampled", 69e9, 16.4e6 * 2, 512, 2, fsdp=True),
)


class Step(NamedTuple):
    """Seconds by part, bytes sent, and bytes in memory beside the model."""

    parts: dict[str, float]
    sent: float
    held: float

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.parts.values())


def step_model(place: Place, size: int) -> Step:
    """A step of the sharded form, without overlap of computation and communication."""
    batch, n, c, wide = EACH * size, place.adapter, place.directions, INSIDE if size <= BOX else ACROSS
    rows = batch * c
    passes = 2 * place.base * EACH * place.tokens * (1 + 2 * c)  # forward, and c backward through the activations
    gathered = 2 * place.base * (1 + c) if place.fsdp else 0.0
    mean, exchanged = 4 * n, 4 * EACH * c * n * (size - 1) / size
    part = min(rows, 192)
    gram = math.ceil(rows / part) * 2 * (8 * part * (part + place.rank))
    arithmetic = 2 * rows * (min(rows, 192) + 2 * place.rank) * n / size
    parts = {
        "passes": passes / FLOPS,
        "gathering the base": gathered / wide,
        "rows to columns": exchanged / wide,
        "mean": mean / wide,
        "sums of Gram matrices": gram / wide,
        "waiting": LATENCY * (12 * math.ceil(rows / part) + 8) * math.log2(size),
        "conditioning": max(arithmetic / (FLOPS / 16), 4 * rows * n / size * 4 / MEMORY),
    }
    held = 4 * n / size * (4 + place.rank) + 4 * EACH * c * n * 2
    return Step(parts, gathered + mean + exchanged + gram, held)
