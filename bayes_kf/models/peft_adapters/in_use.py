"""Whether a model is a PEFT model, without importing PEFT."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def peft_in_use() -> bool:
    """Whether this process has imported PEFT; else no model can be a PEFT model.

    Importing PEFT takes longer than all other imports together.
    """
    return "peft" in sys.modules


def is_peft(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model is a PEFT model."""
    if not peft_in_use():
        return False
    from peft import PeftModel  # waits if another thread is still importing it

    return isinstance(model, PeftModel)
