"""Texts that begin alike: the model reads their beginning once, and goes on from its cache of keys and values."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.language.logits import learns_prompt
from bayes_kf.models.peft_adapters.in_use import is_peft

CACHES = ("cache", "past_key_values")  # the argument of the cache, as transformers names it from 5.24 on, and before
LEAST_SHARED = 4  # tokens; fewer are not worth a pass of their own


def shared_columns(ids: Tensor, mask: Tensor, scored: Tensor) -> int:
    """How many columns of (B, m, T) tokens are equal for the m texts of each example and predict no scored token."""
    alike = (ids == ids[:, :1]).all(1) & mask.all(1)
    usable = alike.all(0) & ~scored.roll(-1, -1).any(0).any(0)
    return int(usable.long().cumprod(0).sum())


def can_share(model: nn.Module) -> bool:
    """Whether a model takes a cache from outside, and nothing needs gradients through it."""
    base: Any = model.get_base_model() if is_peft(model) else model
    parameters = inspect.signature(base.forward).parameters
    is_apt = "use_cache" in parameters and "logits_to_keep" in parameters and any(name in parameters for name in CACHES)
    return is_apt and not learns_prompt(model) and not torch.is_grad_enabled()


def logits_after_prefix(adapter: AdapterModel, ids: Tensor, mask: Tensor, columns: Tensor, shared: int) -> Tensor:
    """Logits of texts whose first columns are read once for each example, (B · m, K, V).

    Args:
        adapter: the reading of the model.
        ids: tokens, (B, m, T).
        mask: which of them are no padding, (B, m, T).
        columns: ascending indices (K,), from ``shared`` on, whose logits are returned.
        shared: how many first columns the m texts share.
    """
    ids, mask, columns = (values.to(adapter.device) for values in (ids, mask.long(), columns))
    with adapter.autocast():
        begun = adapter.model(input_ids=ids[:, 0, :shared], use_cache=True, logits_to_keep=1)
        name = next(name for name in CACHES if getattr(begun, name, None) is not None)
        cache = getattr(begun, name)
        cache.batch_repeat_interleave(ids.shape[1])
        rest = {"input_ids": ids[..., shared:].flatten(0, 1), "attention_mask": mask.flatten(0, 1), name: cache}
        logits: Tensor = adapter.model(**rest, use_cache=True, logits_to_keep=columns - shared).logits
    return logits
