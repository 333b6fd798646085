"""Test inputs under shift: corrupted images and texts at three severities.

Images: :func:`bayes_kf.data.corrupt` at severity 1, 3 and 5; each image has one of the five kinds of corruption, and
all kinds are equally frequent. Photographs, which have pixels in [0, 1], are corrupted in [-1, 1] and brought back.

Texts: half of them have typing errors, the other half lose words. A letter has an error with a probability of 5, 10 or
20 %: it is left out, doubled, replaced by another letter, or swapped with the next one, each equally likely. A word is
lost with a probability of 10, 20 or 40 %; one word always stays. Texts are read back from their tokens, in lower case,
so that all problems are corrupted in one way.
"""

from __future__ import annotations

import functools
import string
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bayes_kf.data.corruption import CORRUPTIONS, corrupt
from benchmarks.common.learners import Inputs, Stream
from benchmarks.common.text import encoder_folder, tokenized

SEVERITIES = (1, 2, 3)
IMAGE_SEVERITY = {1: 1, 2: 3, 3: 5}  # of ``corrupt``
TYPO_RATE = {1: 0.05, 2: 0.1, 3: 0.2}
LOSS_RATE = {1: 0.1, 2: 0.2, 3: 0.4}


def shifted(stream: Stream, severity: int, seed: int = 0) -> Stream:
    """The stream with corrupted inputs, in the same order, with the same labels.

    Args:
        stream: images (N, C, H, W), one channel in [-1, 1] or three in [0, 1]; or MiniLM's tokens.
        severity: 1, 2 or 3.
        seed: of the kinds and of the corruptions.

    Raises:
        ValueError: for another severity.
    """
    if severity not in SEVERITIES:
        raise ValueError(f"`severity` must be 1, 2 or 3, got {severity}.")
    inputs: Inputs
    if isinstance(stream.inputs, Tensor):
        inputs = shifted_images(stream.inputs, severity, seed)
    else:
        inputs = tokenized(shifted_texts(texts_of(stream.inputs), severity, seed))
    return Stream(inputs, stream.labels)


def shifted_images(images: Tensor, severity: int, seed: int) -> Tensor:
    """Corrupted images (N, C, H, W)."""
    is_photograph = images.shape[1] == 3
    result = 2 * images - 1 if is_photograph else images.clone()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for place, kind in enumerate(CORRUPTIONS):
        which = order[place :: len(CORRUPTIONS)]
        result[which] = corrupt(result[which], kind, IMAGE_SEVERITY[severity], seed)
    return (result + 1) / 2 if is_photograph else result


def shifted_texts(texts: list[str], severity: int, seed: int) -> list[str]:
    """Texts with typing errors or without some words, half of them each."""
    generator = torch.Generator().manual_seed(seed)
    has_typos = torch.zeros(len(texts), dtype=torch.bool)
    has_typos[torch.randperm(len(texts), generator=generator)[: len(texts) // 2]] = True
    edits = {True: (with_typos, TYPO_RATE[severity]), False: (without_words, LOSS_RATE[severity])}
    plans = [(text, *edits[typos]) for text, typos in zip(texts, has_typos.tolist(), strict=True)]
    return [edit(text, rate, generator) for text, edit, rate in plans]


def with_typos(text: str, rate: float, generator: torch.Generator) -> str:
    """The text with an error in each letter with probability ``rate``."""
    wrong = (torch.rand(len(text), generator=generator) < rate).tolist()
    kinds = torch.randint(4, (len(text),), generator=generator).tolist()
    letters = torch.randint(26, (len(text),), generator=generator).tolist()
    result, place = "", 0
    while place < len(text):
        here, rest = text[place], text[place + 1 : place + 2]
        if wrong[place] and here.isalpha():
            edits = ("", 2 * here, string.ascii_lowercase[letters[place]], rest + here)
            result += edits[kinds[place]]
            place += 1 + (kinds[place] == 3 and len(rest))  # a swap takes the next letter along
        else:
            result += here
            place += 1
    return result


def without_words(text: str, rate: float, generator: torch.Generator) -> str:
    """The text without each word with probability ``rate``; one word stays."""
    words = text.split()
    draws = torch.rand(len(words), generator=generator)
    kept = [word for word, draw in zip(words, draws.tolist(), strict=True) if draw >= rate]
    return " ".join(kept or words[int(draws.argmax()) :][:1]) if words else text


def texts_of(inputs: dict[str, Tensor]) -> list[str]:
    """The texts of MiniLM's tokens, in lower case."""
    tokens = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    return [_tokenizer().decode(ids, skip_special_tokens=True) for ids in tokens]


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
