"""One lock for each model: while its tensors or modes are replaced, other threads wait."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_creating = threading.Lock()


def model_lock(model: nn.Module) -> threading.RLock:
    """The lock of a model, the same for all that use it."""
    with _creating:
        return _locks.setdefault(model, threading.RLock())
