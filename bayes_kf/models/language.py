"""Causal language models as classifiers: over the next token, over option tokens, over option texts.

Each class is an :class:`AdapterModel` of the language model itself. So ``bkf.fit``, ``KalmanFilter`` and
``Posterior.predict`` accept it like any model, and the saved adapter is an ordinary PEFT adapter of the language model.
After loading, ``posterior.with_adapter(OptionTokens(model, options))`` uses it as a classifier again. These classes
are our own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.peft_adapters.in_use import is_peft

IGNORED = -100  # label of a token that is not a target, as in transformers


class NextToken(AdapterModel):
    """The next token after one position of each sequence; every token of the vocabulary is a class.

    Inputs are a mapping with ``input_ids`` (B, T), ``place`` (B,), the index of the last token of the context, and
    ``attention_mask`` (B, T) if there is padding. Targets are token ids (B,). For large vocabularies use
    ``KalmanConfig(curvature="sampled")``. :func:`next_token_examples` makes such batches from sequences.

    Args:
        model: a causal language model, called with ``input_ids`` and ``attention_mask``, that returns ``logits``
            (B, T, V).

    Raises:
        ValueError: if no tensor is trainable.
    """

    def run(self, inputs: Inputs) -> Tensor:
        """Logits of the next token, (B, V)."""
        given = _mapping(inputs, "input_ids", "place")
        place = given["place"].to(self.device)
        return _at(_logits(self, given), place)


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
        given = _mapping(inputs, "input_ids")
        logits = _logits(self, given)
        if max(self.options) >= logits.shape[-1]:
            raise ValueError(f"`options` must be below the vocabulary's {logits.shape[-1]}, got {max(self.options)}.")
        return _at(logits, _last(given))[:, list(self.options)]


class OptionTexts(AdapterModel):
    """A choice among texts; each is a class, and its logit is the log-likelihood of its tokens after the prompt.

    Inputs are a mapping with ``input_ids`` (B, m, T): the prompt with each option; ``scored`` (B, m, T), true for the
    option's own tokens; and ``attention_mask`` (B, m, T). :func:`option_examples` makes such inputs. Targets are
    indices of options (B,). Its Jacobian takes a backward pass for each example and option.

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
        given = _mapping(inputs, "input_ids", "scored")
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
        log_prob = _logits(self, flat)[:, :-1].log_softmax(-1).gather(-1, flat["input_ids"][:, 1:, None]).squeeze(-1)
        own = scored[:, 1:]
        total = (log_prob * own).sum(-1)
        return (total / own.sum(-1).clamp_min(1) if self.per_token else total).view(shape[:2])


class Examples(NamedTuple):
    """A batch for one of the classes above."""

    inputs: dict[str, Tensor]
    targets: Tensor


def next_token_examples(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Iterator[Examples]:
    """One batch for each sequence: the sequence is repeated for each of its tokens that has a label.

    A sequence is cut after the last token that its labels need, so no padding follows it.

    Args:
        input_ids: (B, T).
        labels: (B, T): the tokens to learn, and -100 for prompts and padding.
        attention_mask: (B, T), for padding on the left; None if there is no padding.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> [batch] = next_token_examples(ids, torch.tensor([[-100, -100, 7, 8]]))
        >>> batch.inputs["place"].tolist(), batch.targets.tolist(), batch.inputs["input_ids"].tolist()
        ([1, 2], [7, 8], [[5, 6, 7], [5, 6, 7]])
    """
    if labels.shape != input_ids.shape or input_ids.ndim != 2:
        raise ValueError(
            "`input_ids` and `labels` must be of one shape (sequences, tokens), got "
            f"{tuple(input_ids.shape)} and {tuple(labels.shape)}."
        )
    for number, (tokens, wanted) in enumerate(zip(input_ids, labels, strict=True)):
        place = (wanted[1:] != IGNORED).nonzero().squeeze(-1)
        if not len(place):
            continue
        cut = int(place.max()) + 1
        inputs = {"input_ids": tokens[:cut].expand(len(place), cut).clone(), "place": place}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask[number, :cut].expand(len(place), cut).clone()
        yield Examples(inputs, wanted[place + 1])


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


def _mapping(inputs: Inputs, *names: str) -> dict[str, Tensor]:
    missing = [name for name in names if not isinstance(inputs, Mapping) or name not in inputs]
    if missing:
        got = ", ".join(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"`inputs` must be a mapping with {', '.join(names)}, got {got}.")
    return dict(inputs)


def _logits(adapter: AdapterModel, given: Mapping[str, Tensor]) -> Tensor:
    """Logits of the language model at all positions, (B, T, V)."""
    own = {name: given[name] for name in ("input_ids", "attention_mask", "position_ids") if name in given}
    source: Tensor | None = None
    if learns_prompt(adapter.model):  # PEFT ignores `position_ids` then, with a warning
        own.pop("position_ids", None)
        source = _source_columns(own.get("attention_mask"))
        if source is not None:
            own = {name: value.gather(1, source.to(value.device)) for name, value in own.items()}
    elif "position_ids" not in own and _counts_padding(adapter.model, own.get("attention_mask")):
        own["position_ids"] = (own["attention_mask"].long().cumsum(1) - 1).clamp_min(0)
    moved = {name: value.to(adapter.device) for name, value in own.items()}
    with adapter.autocast():
        outputs = adapter.model(**moved)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ValueError("`model` must return logits of shape (sequences, tokens, vocabulary).")
    virtual = logits.shape[1] - own["input_ids"].shape[1]  # learned prompts precede the tokens
    if virtual < 0:
        raise ValueError(
            f"`model` must return logits of all {own['input_ids'].shape[1]} tokens, got those of {logits.shape[1]}."
        )
    logits = logits[:, virtual:]
    if source is None:
        return logits
    back = source.argsort(1).to(logits.device).unsqueeze(-1)
    return logits.gather(1, back.expand_as(logits))


def learns_prompt(model: nn.Module) -> bool:
    """Whether the active adapter of a model has virtual tokens (prompt tuning, p-tuning, prefix tuning, CPT)."""
    return is_peft(model) and bool(getattr(model.active_peft_config, "is_prompt_learning", False))


def _source_columns(mask: Tensor | None) -> Tensor | None:
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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "position_ids" in inspect.signature(base.forward).parameters


def _last(given: Mapping[str, Tensor]) -> Tensor:
    """Index of the last token that is not masked, (B,)."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is None:
        return torch.full((len(ids),), ids.shape[1] - 1)
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)


def _at(logits: Tensor, place: Tensor) -> Tensor:
    return logits[torch.arange(len(logits), device=logits.device), place.to(logits.device)]
