"""Text to be learned, from CSV or JSON lines: prompts with completions, conversations, or plain text.

A row is one of

- ``prompt`` and ``completion``: two texts, or two lists of messages ``{"role": ..., "content": ...}``; what is learned
  is the completion;
- ``messages``: a conversation; what the assistant says is learned;
- ``text``: all of it is learned but the first token.

These are the formats of TRL's data sets. The end token follows a completion or a text, so that its end is learned.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bayes_kf.data.labels import LabelledData, make_loader
from bayes_kf.data.text import naming_unreadable, read_rows

IGNORED = -100  # the label of a token that is not learned
COLUMNS = (("prompt", "completion"), ("messages",), ("text",))
Example = tuple[list[int], list[int]]  # tokens, labels


def supervised_text(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    batch_size: int = 1,
    shuffle: bool = False,
    seed: int = 0,
) -> LabelledData:
    """Batches of ``input_ids``, ``attention_mask`` and ``labels``, (B, T) each, as causal language models learn them.

    Args:
        path: a `.csv`, `.tsv` or `.jsonl` file in UTF-8, whose rows are as above.
        tokenizer: a tokenizer, or a Hugging Face model folder with one. Messages need one with a chat template.
        max_length: most tokens of a row; longer ones end there.
        batch_size: rows per batch, padded on the right to the longest.
        shuffle: whether every pass has a new random order.
        seed: seed of the order.

    Returns:
        The loader; there are no class names.

    Raises:
        ValueError: if the file or the tokenizer cannot be read, or a row has other columns or no token to learn. The
            message gives the line.
    """
    file, own = Path(path), causal_tokenizer(tokenizer)
    examples = []
    with naming_unreadable(file):
        for line, row in read_rows(file):
            try:
                examples.append(encode(own, row, max_length))
            except ValueError as error:
                raise ValueError(f"{str(error).removesuffix('.')}, in line {line} of {file}.") from error
    if not examples:
        raise ValueError(f"`path` must hold at least one row, got none in {file}.")
    return LabelledData(make_loader(examples, batch_size, shuffle, seed, collate(own)), ())  # type: ignore[arg-type]


def holds_supervised_text(path: str | os.PathLike[str], label_column: str = "label") -> bool:
    """Whether the first row of a file is text to be learned, and no text with a label."""
    file = Path(path)
    try:
        _, row = next(read_rows(file))
    except (StopIteration, OSError, ValueError, csv.Error):
        return False  # its reader will say why
    return label_column not in row and any(row.keys() >= set(names) for names in COLUMNS)


def causal_tokenizer(source: str | os.PathLike[str] | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer: ``source``, or the one in that folder. It needs no padding token."""
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"`tokenizer` must be a Hugging Face model folder with a tokenizer, got {source}: {error}."
        ) from error
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_length: int) -> Example:
    """Tokens and labels of a row, at most ``max_length``.

    Raises:
        ValueError: if the row is in none of the formats, or has no token to learn.
    """
    names = next((names for names in COLUMNS if row.keys() >= set(names)), None)
    if names is None:
        columns = ", ".join(map(str, row))
        raise ValueError(f"`path` must have the columns prompt and completion, messages, or text, got {columns}.")
    given = [row[name] for name in names]
    if names == ("messages",):
        tokens, labels = _conversation(tokenizer, _messages(given[0]))
    elif names == ("text",):
        tokens = [*tokenizer(_text("text", given[0]))["input_ids"], *_end(tokenizer)]
        labels = [IGNORED, *tokens[1:]]
    elif isinstance(given[0], str):
        before = tokenizer(given[0])["input_ids"]
        after = tokenizer(_text("completion", given[1]), add_special_tokens=False)["input_ids"] + _end(tokenizer)
        tokens, labels = [*before, *after], [IGNORED] * len(before) + after
    else:
        tokens, labels = _conversation(tokenizer, _messages(given[0]), _messages(given[1]))
    tokens, labels = tokens[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels[1:]):
        raise ValueError(
            f"`path` must have a token to learn among the first {max_length} tokens of each row, got none."
        )
    return tokens, labels


def collate(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A function from examples to a batch that is padded on the right."""
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def batch(examples: Sequence[Example]) -> dict[str, Tensor]:
        tokens, labels = ([torch.tensor(part) for part in parts] for parts in zip(*examples, strict=True))
        lengths = torch.tensor([len(part) for part in tokens]).unsqueeze(-1)
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=fill)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths).long(),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }

    return batch


def _conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], completion: list[dict[str, str]] | None = None
) -> Example:
    """Tokens of a conversation; labels of what the assistant says, or of the completion."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("`tokenizer` must have a chat template to read messages, got one without.")
    messages = [*prompt, *(completion or [])]
    tokens = _rendered(tokenizer, messages)
    labels = [IGNORED] * len(tokens)
    for number in range(len(prompt) if completion else 0, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        start = len(_rendered(tokenizer, messages[:number], add_generation_prompt=True))
        upto = _rendered(tokenizer, messages[: number + 1])
        if tokens[: len(upto)] != upto or start >= len(upto):
            raise ValueError("`tokenizer` must have a chat template that only adds to what it wrote, got another.")
        labels[start : len(upto)] = upto[start:]
    return tokens, labels


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """The tokens of messages in the chat template."""
    tokens: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return list(tokens)


def _messages(given: Any) -> list[dict[str, str]]:
    if not isinstance(given, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in given
    ):
        raise ValueError(f"`path` must hold messages with role and content, got {given!r:.60}.")
    return given


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"`path` must hold text in column {name!r}, got {given!r:.60}.")
    return given


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def batches_of_lines(
    lines: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of one row each from JSON lines, as they come; blank lines are passed over.

    Raises:
        ValueError: at a line that is no row; the message gives its number.
    """
    make = collate(tokenizer)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"`path` must hold one JSON object per line, got {type(row).__name__}.")
            example = encode(tokenizer, row, max_length)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(error).removesuffix('.')}, in line {number}.") from error
        yield make([example])
