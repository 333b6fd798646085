"""Logits of a causal language model, at all places or at some, whatever the padding and the virtual tokens."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.peft_adapters.in_use import is_peft

PREPENDING = (
    "PROMPT_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "CPT",
)  # PEFT types with columns of virtual tokens


def mapping(inputs: Inputs, *names: str) -> dict[str, Tensor]:
    """The inputs as a dictionary that has these names.

    Raises:
        ValueError: if a name is missing.
    """
    missing = [name for name in names if not isinstance(inputs, Mapping) or name not in inputs]
    if missing:
        got = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"`inputs` must be a mapping with {', '.join(names)}, got {got}.")
    return dict(inputs)


def token_logits(adapter: AdapterModel, given: Mapping[str, Tensor], columns: Tensor | None = None) -> Tensor:
    """Logits of the language model at some columns of ``input_ids``, (B, K, V).

    A model that takes ``logits_to_keep`` applies its head there alone, so that memory is proportional to K.

    Args:
        adapter: the reading of the model.
        given: ``input_ids`` (B, T), and ``attention_mask`` and ``position_ids`` where they are given.
        columns: ascending indices (K,); None for all T.

    Raises:
        ValueError: if the model returns no logits of tokens.
    """
    own = {name: given[name] for name in ("input_ids", "attention_mask", "position_ids") if name in given}
    width, source = own["input_ids"].shape[1], None
    check_context(adapter.model, width)
    if learns_prompt(adapter.model):  # PEFT ignores `position_ids` then, with a warning
        own.pop("position_ids", None)
        source = padding_last(own.get("attention_mask"))
        if source is not None:
            own = {name: value.gather(1, source.to(value.device)) for name, value in own.items()}
    elif "position_ids" not in own and _counts_padding(adapter.model, own.get("attention_mask")):
        own["position_ids"] = (own["attention_mask"].long().cumsum(1) - 1).clamp_min(0)
    moved = {name: value.to(adapter.device) for name, value in own.items()}
    kept = None if columns is None or source is not None else columns.to(adapter.device)
    keep = {}
    before = _virtual_columns(adapter.model)
    if kept is not None and before is not None and "logits_to_keep" in forward_parameters(adapter.model):
        keep["logits_to_keep"] = kept + before
    with adapter.autocast():
        outputs = adapter.model(**moved, **keep)
    logits = logits_in(outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ValueError("`model` must return logits of shape (sequences, tokens, vocabulary).")
    if keep and logits.shape[1] == len(keep["logits_to_keep"]):
        return logits
    virtual = logits.shape[1] - width  # learned prompts precede the tokens
    if virtual < 0:
        raise ValueError(f"`model` must return logits of all {width} tokens, got those of {logits.shape[1]}.")
    logits = logits[:, virtual:]
    if source is not None:
        back = source.argsort(1).to(logits.device).unsqueeze(-1)
        logits = logits.gather(1, back.expand_as(logits))
    return logits if columns is None else logits[:, columns.to(logits.device)]


def logits_in(outputs: Any) -> Any:
    """The ``logits`` of what a model returned, or that itself."""
    return outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)


def check_context(model: nn.Module, width: int) -> None:
    """Raise ValueError if texts of ``width`` columns, with virtual tokens before them, are longer than the context."""
    base: Any = model.get_base_model() if is_peft(model) else model
    longest = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    before = _virtual_columns(model) or 0
    if isinstance(longest, int) and width + before > longest:
        virtual = f" and {before} virtual ones" if before else ""
        raise ValueError(f"`input_ids` must fit the context of {longest} tokens, got {width}{virtual}.")


def logits_at(adapter: AdapterModel, given: Mapping[str, Tensor], place: Tensor) -> Tensor:
    """Logits of the language model at one place of each sequence, (B, V); ``place`` are columns (B,)."""
    columns, which = place.to(adapter.device).unique(return_inverse=True)
    logits = token_logits(adapter, given, columns)
    return logits[torch.arange(len(logits), device=logits.device), which]


def learns_prompt(model: nn.Module) -> bool:
    """Whether the active adapter of a model has virtual tokens (prompt tuning, p-tuning, prefix tuning, CPT)."""
    return is_peft(model) and bool(getattr(model.active_peft_config, "is_prompt_learning", False))


def padding_last(mask: Tensor | None) -> Tensor | None:
    """The order of columns, (B, T), that moves padding on the left behind the tokens; None if there is none.

    Virtual tokens then directly precede a text, however it is padded.
    """
    if mask is None or bool(mask[:, 0].all()):
        return None
    padding = mask.bool().to(torch.int8).argmax(1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places + padding) % mask.shape[1]


def _counts_padding(model: nn.Module, mask: Tensor | None) -> bool:
    """Whether a text begins with padding, which a model without ``position_ids`` counts as positions."""
    if mask is None or bool(mask[:, 0].all()):
        return False
    return "position_ids" in forward_parameters(model)


def forward_parameters(model: nn.Module) -> Collection[str]:
    """The names of the arguments of the language model's forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inspect.signature(base.forward).parameters


def _virtual_columns(model: nn.Module) -> int | None:
    """How many learned columns the model puts before those of ``input_ids``; None if that is not known."""
    if not learns_prompt(model):
        return 0
    config: Any = model.active_peft_config
    return int(config.num_virtual_tokens) if config.peft_type in PREPENDING else None


def last_place(given: Mapping[str, Tensor]) -> Tensor:
    """Index of the last token that is not masked, (B,)."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is None:
        return torch.full((len(ids),), ids.shape[1] - 1)
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
