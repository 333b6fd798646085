"""A choice among single tokens or among texts after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.language.logits import check_context, last_place, logits_at, mapping, token_logits
from bayes_kf.models.language.prefix_cache import LEAST_SHARED, can_share, logits_after_prefix, shared_columns


class OptionTokens(AdapterModel):
    """A choice among single tokens (A, B, C, D; yes, no) after a prompt; each is a class.

    Inputs are a mapping with ``input_ids`` (B, T) and, if prompts are padded on either side, ``attention_mask``.
    Targets are indices into ``options`` (B,). The logits of other tokens are ignored.

    Args:
        model: as for :class:`NextToken`.
        options: the tokens' ids, at least two.

    Raises:
        ValueError: for fewer than two options or repeated ones, or if no tensor is trainable.

    Example:
        >>> class Last(nn.Module):  # a language model over 5 tokens that looks at the last one
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(5, 5)
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return {"logits": self.table(input_ids)}
        >>> read = OptionTokens(Last(), options=[1, 4])
        >>> read.run({"input_ids": torch.tensor([[0, 2], [3, 3]])}).shape
        torch.Size([2, 2])
    """

    def __init__(self, model: nn.Module, options: Sequence[int]) -> None:
        if len(options) < 2 or len(set(options)) < len(options) or not all(isinstance(o, int) for o in options):
            raise ValueError(f"`options` must be at least two different token ids, got {list(options)!r}.")
        super().__init__(model)
        self.options = tuple(options)

    def run(self, inputs: Inputs) -> Tensor:
        """Logits of the options, (B, m)."""
        given = mapping(inputs, "input_ids")
        logits = logits_at(self, given, last_place(given))
        if max(self.options) >= logits.shape[-1]:
            raise ValueError(f"`options` must be below the vocabulary's {logits.shape[-1]}, got {max(self.options)}.")
        return logits[:, list(self.options)]


class OptionTexts(AdapterModel):
    """A choice among texts; each is a class, and its logit is the log-likelihood of its tokens after the prompt.

    Inputs are a mapping with ``input_ids`` (B, m, T): the prompt with each option; ``scored`` (B, m, T), true for the
    option's own tokens; and ``attention_mask`` (B, m, T). :func:`option_examples` makes such inputs. Targets are
    indices of options (B,). Its Jacobian takes a backward pass for each example and option. Without gradients, the
    beginning that all options of a prompt share is read once.

    Args:
        model: as for :class:`NextToken`.
        per_token: whether a log-likelihood is divided by the option's number of tokens, so that long
            options can win.

    Raises:
        ValueError: if no tensor is trainable.
    """

    def __init__(self, model: nn.Module, per_token: bool = False) -> None:
        super().__init__(model)
        self.per_token = per_token

    def run(self, inputs: Inputs) -> Tensor:
        """Log-likelihoods of the options, (B, m)."""
        given = mapping(inputs, "input_ids", "scored")
        shape = given["input_ids"].shape
        if len(shape) != 3 or given["scored"].shape != shape:
            raise ValueError(
                "`inputs` must have `input_ids` and `scored` of one shape (examples, options, tokens), "
                f"got {tuple(shape)} and {tuple(given['scored'].shape)}."
            )
        flat = {name: values.to(self.device).flatten(0, 1) for name, values in given.items()}
        scored = flat.pop("scored").bool()
        follows = flat.get("attention_mask", torch.ones_like(scored)).bool().roll(1, 1)
        follows[:, 0] = False
        if bool((scored & ~follows).any()):
            raise ValueError("`inputs` must have a token before every one that is `scored`, got one that begins.")
        own = scored[:, 1:]
        columns = own.any(0).nonzero().squeeze(-1)
        own, following = own[:, columns], flat["input_ids"][:, columns + 1].unsqueeze(-1)
        log_prob = self._logits(given, flat, columns).log_softmax(-1).gather(-1, following).squeeze(-1)
        total = (log_prob * own).sum(-1)
        return (total / own.sum(-1).clamp_min(1) if self.per_token else total).view(shape[:2])

    def _logits(self, given: Mapping[str, Tensor], flat: Mapping[str, Tensor], columns: Tensor) -> Tensor:
        """Logits at some columns of all texts, (B · m, K, V)."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        shared = shared_columns(ids, mask.bool(), given["scored"].bool())
        if shared < LEAST_SHARED or "position_ids" in given or not can_share(self.model):
            return token_logits(self, flat, columns)
        check_context(self.model, ids.shape[2])
        return logits_after_prefix(self, ids, mask, columns, shared)


def option_examples(tokenizer: Any, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Inputs of :class:`OptionTexts` from texts.

    Args:
        tokenizer: of transformers; masked positions hold its padding token, or 0 if it has none.
        prompts: B texts.
        options: for each prompt the m texts that may follow, with their leading space if they have one.

    Raises:
        ValueError: if the numbers of prompts and options differ, or a text has no token.
    """
    counts = {len(some) for some in options}
    if len(prompts) != len(options) or len(counts) != 1:
        raise ValueError(
            f"`options` must hold the same number of texts for each of {len(prompts)} prompts, got {sorted(counts)} "
            f"for {len(options)}."
        )
    rows, starts = [], []
    for prompt, some in zip(prompts, options, strict=True):
        before = tokenizer(prompt)["input_ids"]
        if not before:
            raise ValueError(f"`prompts` must hold texts with tokens, got {prompt!r}.")
        for text in some:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not own:
                raise ValueError(f"`options` must hold texts with tokens, got {text!r}.")
            rows.append([*before, *own])
            starts.append(len(before))
    longest = max(map(len, rows))
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    shape = (len(prompts), counts.pop(), longest)
    place, lengths = torch.arange(longest), torch.tensor([len(row) for row in rows]).unsqueeze(-1)
    return {
        "input_ids": torch.tensor([row + [fill] * (longest - len(row)) for row in rows]).view(shape),
        "attention_mask": (place < lengths).long().view(shape),
        "scored": ((place >= torch.tensor(starts).unsqueeze(-1)) & (place < lengths)).view(shape),
    }
