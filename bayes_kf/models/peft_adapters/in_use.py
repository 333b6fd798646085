"""Whether a model is PEFT's, asked without importing PEFT."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def peft_in_use() -> bool:
    """Whether this process has imported PEFT. Else no model is of it, and nothing here imports it to ask.

    That would take longer than importing everything else together.
    """
    return "peft" in sys.modules


def is_peft(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model is PEFT's own."""
    if not peft_in_use():
        return False
    from peft import PeftModel  # waits, where another thread is still importing it

    return isinstance(model, PeftModel)
