"""When memory runs out in a pass."""

from __future__ import annotations

import re

import torch

REFUSED = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)  # torch's allocators


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory, on a CPU or an accelerator."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and REFUSED.search(str(error)) is not None)


def give_back() -> None:
    """Let accelerators have back what a failed pass had taken."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
