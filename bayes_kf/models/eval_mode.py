"""Torch's fused attention layers, kept from reading the weights below an adapter."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

_lock = threading.Lock()
_inside, _before = 0, True


def has_fused(modules: Iterable[nn.Module]) -> bool:
    """Whether a model has layers that may take torch's fused path."""
    return any(isinstance(module, FUSED) for module in modules)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Torch's own encoder layers run as their parts do, adapters included; for all threads.

    In eval mode they hand the weights of their Linear layers to one fused kernel, which knows nothing of the low-rank
    branches that PEFT puts beside them. The switch is global, so it is back as it was when the last one leaves.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.backends.mha.set_fastpath_enabled(_before)
