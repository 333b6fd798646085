"""Reward models: the preference between two texts, and the reward of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs
from bayes_kf.models.forward import as_column
from bayes_kf.models.language.logits import PREPENDING, learns_prompt, padding_last
from bayes_kf.models.peft_adapters.in_use import is_peft
from bayes_kf.models.preference_batch import CHOSEN, MARGIN, REJECTED, named_pairs, one_text, read_pairs


class PreferencePairs(AdapterModel):
    """Which of two texts is preferred (Bradley and Terry 1952), by the difference of their rewards.

    P(the first text is chosen) = σ(r(first) − r(second) − margin), under the likelihood "bernoulli". The target of a
    pair is 1, unless ``labels`` (B,) say otherwise: 0 for a pair in the other order, or the share of people who chose
    the first text. Only differences of rewards are informed by data; a constant that is added to all of them is not,
    and keeps its prior.

    Batches are those of TRL's ``RewardTrainer``: ``input_ids`` (2B, T) and ``attention_mask`` (2B, T), the chosen
    texts first, and ``margin`` (B,) if wanted; or, as earlier versions made them, ``input_ids_chosen`` (B, T),
    ``attention_mask_chosen``, ``input_ids_rejected`` (B, T') and ``attention_mask_rejected``. A model that is called
    with other names gets them in the same ways.

    Args:
        model: returns one reward for a text, (B,) or (B, 1), for example AutoModelForSequenceClassification with
            ``num_labels=1``. Padding on either side is moved behind the text, and filled with the model's padding
            token.

    Raises:
        ValueError: if the model is known to have more outputs or learns virtual tokens, or no tensor is trainable.

    Example:
        >>> class Length(nn.Module):  # rewards each token that is not padding
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.each = nn.Parameter(torch.tensor(0.5))
        ...     def forward(self, input_ids, attention_mask):
        ...         return self.each * attention_mask.sum(1)
        >>> pairs = PreferencePairs(Length())
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> pairs.run(pairs.read({"input_ids": torch.ones_like(mask), "attention_mask": mask})).tolist()
        [[1.0]]
    """

    as_matrix = staticmethod(as_column)

    def __init__(self, model: nn.Module) -> None:
        check_one_output(model)
        super().__init__(model)

    def read(self, batch: Any) -> Any:
        """The batch with names for the texts of each pair, and labels True if it has none (``preference_batch``)."""
        return read_pairs(batch)

    def run(self, inputs: Inputs) -> Tensor:
        """r(chosen) − r(rejected) − margin, (B, 1)."""
        if not isinstance(inputs, Mapping):
            raise ValueError(f"`inputs` must be a mapping with chosen and rejected texts, got {type(inputs).__name__}.")
        pairs = named_pairs(inputs)
        chosen, rejected = (text_rewards(self, one_text(pairs, end)) for end in (CHOSEN, REJECTED))
        margin = pairs.get(MARGIN)
        difference = chosen - rejected  # two passes of B rows each, so that hooks see one row an example
        return difference if margin is None else difference - margin.to(difference).view(-1, 1)


class Reward(AdapterModel):
    """The reward of each text, for a posterior that was fitted by :class:`PreferencePairs`.

    Inputs are those of the model: ``input_ids`` (B, T), and ``attention_mask`` (B, T) if there is padding.

    Args:
        model: as for :class:`PreferencePairs`.

    Raises:
        ValueError: as for :class:`PreferencePairs`.
    """

    as_matrix = staticmethod(as_column)

    def __init__(self, model: nn.Module) -> None:
        check_one_output(model)
        super().__init__(model)

    def run(self, inputs: Inputs) -> Tensor:
        """r, (B, 1)."""
        return text_rewards(self, inputs)


def check_one_output(model: nn.Module) -> None:
    """Raise ValueError for a model of transformers or PEFT that cannot be a reward model."""
    outputs = getattr(getattr(_base(model), "config", None), "num_labels", 1)
    if outputs != 1 and type(_base(model)).__name__.endswith("ForSequenceClassification"):
        raise ValueError(f"`model` must have one output, `num_labels=1`, got `num_labels={outputs}`.")
    if learns_prompt(model):
        kind: Any = model.active_peft_config
        if kind.peft_type in PREPENDING:
            raise ValueError(f"`model` must not learn virtual tokens for rewards, got PEFT's {kind.peft_type.value}.")


def text_rewards(adapter: AdapterModel, inputs: Inputs) -> Tensor:
    """The reward of each text, (B, 1).

    Raises:
        ValueError: if the model returns other shapes, or a text has no token.
    """
    if isinstance(inputs, Mapping):
        inputs = padded_behind(inputs, _padding_token(adapter.model))
    rewards = AdapterModel.run(adapter, inputs)
    if rewards.shape[1:] != (1,):
        raise ValueError(
            f"`model` must return one reward for each text, of shape (B,) or (B, 1), got {tuple(rewards.shape)}."
        )
    return rewards


def padded_behind(inputs: Mapping[str, Any], padding_token: int | None) -> dict[str, Any]:
    """Texts with their padding behind them, without columns that are padding in all of them.

    Args:
        inputs: ``input_ids`` (B, T) and others; unchanged without an ``attention_mask`` of that shape.
        padding_token: what masked tokens become; None: they stay.
    """
    given, ids, mask = dict(inputs), inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape or ids.ndim != 2:
        return given
    if not bool(mask.any(1).all()):
        raise ValueError("`attention_mask` must leave a token in every text, got one that is all padding.")
    alike = [name for name, value in given.items() if isinstance(value, Tensor) and value.shape == ids.shape]
    source = padding_last(mask)
    if source is not None:
        given |= {name: given[name].gather(1, source.to(given[name].device)) for name in alike}
    width = int(given["attention_mask"].any(0).nonzero().max()) + 1
    given |= {name: given[name][:, :width] for name in alike}
    if padding_token is not None:
        masked = given["attention_mask"].to(given["input_ids"].device) == 0
        given["input_ids"] = given["input_ids"].masked_fill(masked, padding_token)
    return given


def preference_examples(
    tokenizer: Any, chosen: Sequence[str], rejected: Sequence[str], max_length: int | None = None
) -> dict[str, Tensor]:
    """Inputs of :class:`PreferencePairs` from texts: ``input_ids`` and ``attention_mask`` (2B, T), as TRL makes them.

    Args:
        tokenizer: of transformers; masked positions hold its padding token, or 0 if it has none.
        chosen: B texts, prompt and answer.
        rejected: the other text of each pair.
        max_length: T at most; the ends of longer texts are cut off. None: as long as the longest.

    Raises:
        ValueError: if there are not as many rejected texts as chosen ones, or a text has no token.
    """
    if len(chosen) != len(rejected):
        raise ValueError(f"`rejected` must be as many texts as `chosen`, {len(chosen)}, got {len(rejected)}.")
    rows = []
    for text in [*chosen, *rejected]:
        rows.append(torch.tensor(tokenizer(text)["input_ids"][:max_length], dtype=torch.long))
        if not len(rows[-1]):
            raise ValueError(f"`chosen` and `rejected` must hold texts with tokens, got {text!r}.")
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": pad(rows, batch_first=True, padding_value=fill), "attention_mask": mask}


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if is_peft(model) else model


def _padding_token(model: nn.Module) -> int | None:
    """The padding token by which a model of transformers finds the end of a text; None if it has none."""
    config = getattr(_base(model), "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) else None
