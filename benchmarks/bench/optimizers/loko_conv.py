"""LoKO with LoRA on convolutions, as its paper adapts CNNs (section 5.1)."""

from __future__ import annotations

from benchmarks.bench.optimizers.loko_lora import BENCHES, GRID, config, make

__all__ = ["BENCHES", "GRID", "config", "make"]

TITLE = "LoKO/conv"
ADAPTERS = ("conv",)
PRIORITY = 12
