"""LoKO with DoRA in the place of LoRA (its Tables 1 and 2, DoRA/Kalman)."""

from __future__ import annotations

from benchmarks.bench.optimizers.loko_lora import BENCHES, GRID, config, make

__all__ = ["BENCHES", "GRID", "config", "make"]

TITLE = "LoKO/DoRA"
ADAPTERS = ("dora",)
PRIORITY = 13
