"""Texts as inputs of a language model: with its own tokenizer, all under one chat template or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer

from bayes_kf.models.language import option_examples
from bayes_kf.models.peft_adapters.in_use import is_peft


def tokenizer_of(model: nn.Module, given: Any = None) -> Any:
    """The given tokenizer, or the one that lies beside the model's weights.

    Raises:
        ValueError: if none is given and none lies there.
    """
    if given is not None:
        return given
    base: Any = model.get_base_model() if is_peft(model) else model
    place = getattr(base, "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # of any class, after what lies there
        raise ValueError(f"`tokenizer` must be given: none was found at {place!r}, where the model is from.") from error


def completions(tokenizer: Any, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Inputs of ``OptionTexts``, for each of B prompts the m texts after it; see ``option_examples``.

    Raises:
        ValueError: if one prompt was made by a chat template and another was not, and as there.
    """
    if isinstance(prompts, str):
        raise ValueError("`prompts` must be a list of texts, got one text.")
    marks = [mark for mark in getattr(tokenizer, "all_special_tokens", []) if mark]
    marked = [any(mark in prompt for mark in marks) for prompt in prompts]
    if any(marked) and not all(marked):
        raise ValueError(
            "`prompts` must be made by a chat template all or none, got special tokens in number "
            f"{marked.index(True)} and none in number {marked.index(False)}."
        )
    return option_examples(tokenizer, prompts, texts)
