"""Questions with options as prompts of a language model, and what enters its upper layers.

Two readings. Letters: the options are listed after A., B., C., D., and the letter is the answer. Texts: each option is
written after the question (Winogrande: the sentence with the option in its gap, scored from there on), and its tokens'
mean log-likelihood is its logit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common.data import data_folder
from benchmarks.common.learners import Stream
from benchmarks.common.smollm2 import smollm2
from benchmarks.language.language_model import TOP, Halves, Letters, Texts

TRAIN, TEST, OUTSIDE = 200, 400, 200  # questions
SETS = ("arc_easy", "arc_challenge", "openbookqa", "winogrande")
READINGS = ("letters", "texts")
LETTERS = "ABCD"
AT_ONCE = 8


class Question(NamedTuple):
    """A question, its options, and the number of the right one."""

    text: str
    options: list[str]
    answer: int


class Data(NamedTuple):
    """Streams of features: to learn, to test, and of questions that are not of this kind."""

    stream: Stream
    heldout: Stream
    outside: dict[str, Stream]


class LanguageProblem(NamedTuple):
    """A set of questions under a reading."""

    data: str
    reading: str
    targets: str = "qv"

    @property
    def options(self) -> int:
        """Options of a question."""
        return 2 if self.data == "winogrande" else 4

    def model(self, seed: int, dropout: float) -> Letters | Texts:
        """The upper layers with a new adapter, under this reading."""
        tokenizer, halves = _halves()
        upper = halves.upper(seed, dropout, self.targets)
        if self.reading == "texts":
            return Texts(upper, halves.head).eval()
        return Letters(upper, halves.head[letter_ids(tokenizer, self.options)]).eval()

    def load(self, seed: int) -> Data:
        """The streams of a seed; the test questions are the same for all."""
        train, test = splits(self.data)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:TRAIN].tolist()
        others = [name for name in SETS if name != self.data and _options(name) == self.options]
        outside = {name: self._stream(splits(name)[1][:OUTSIDE]) for name in others[:2]}
        return Data(
            self._stream([train[number] for number in order]),
            self._stream(test[:TEST]),
            outside | {"gibberish": self._stream([gibberish(question) for question in test[:OUTSIDE]])},
        )

    def _stream(self, questions: Sequence[Question]) -> Stream:
        make = _letters if self.reading == "letters" else _texts
        return Stream(make(questions), torch.tensor([question.answer for question in questions]))


@functools.cache
def splits(name: str) -> tuple[list[Question], list[Question]]:
    """The training and test questions of a set, those with the usual number of options, in a fixed order.

    Winogrande has test questions alone; the second half of them is tested.
    """
    with lzma.open(data_folder() / "text" / f"{name}.json.xz", "rt", encoding="utf-8") as file:
        content = json.load(file)
    parts = []
    for part in ("train", "test"):
        rows = [Question(text, options, answer) for text, options, answer in content.get(part, [])]
        rows = [row for row in rows if len(row.options) == _options(name)]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        parts.append([rows[number] for number in order])
    train, test = parts
    half = len(test) // 2
    return (train, test) if train else (test[:half], test[half:])


def gibberish(question: Question) -> Question:
    """The question with the words of question and options in another order, each within its text."""

    def shuffled(text: str) -> str:
        words = text.split()
        seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
        return " ".join(words[number][::-1] for number in order)

    gap = question.text.replace("_", " _ ") if "_" in question.text else question.text
    return Question(shuffled(gap), [shuffled(option) or option for option in question.options], question.answer)


def letter_prompt(question: Question) -> str:
    """The question with its options, up to the letter."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False))
    return f"Question: {question.text}\n{listed}\nAnswer:"


def text_parts(question: Question) -> list[tuple[str, str]]:
    """For each option what is given and what is scored."""
    if "_" in question.text:
        before, _, after = question.text.partition("_")
        return [(before + option, after) for option in question.options]
    return [(f"Question: {question.text}\nAnswer:", f" {option}") for option in question.options]


def letter_ids(tokenizer: Any, count: int) -> list[int]:
    """The tokens of the letters after "Answer:".

    Raises:
        ValueError: if a letter has several.
    """
    ids = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS[:count]]
    if any(len(own) != 1 for own in ids):
        raise ValueError(f"`tokenizer` must have a token for each letter, got {ids}.")
    return [own[0] for own in ids]


def _letters(questions: Sequence[Question]) -> dict[str, Tensor]:
    tokenizer, _ = _halves()
    rows = [tokenizer(letter_prompt(question))["input_ids"] for question in questions]
    ids, mask = _padded(rows)
    return {"inputs_embeds": _features("letters", ids, mask), "attention_mask": mask}


def _texts(questions: Sequence[Question]) -> dict[str, Tensor]:
    tokenizer, _ = _halves()
    rows, starts = [], []
    for question in questions:
        for before, after in text_parts(question):
            given = tokenizer(before)["input_ids"]
            rows.append(given + tokenizer(after, add_special_tokens=False)["input_ids"])
            starts.append(len(given))
    ids, mask = _padded(rows)
    place = torch.arange(ids.shape[1] - 1)
    scored = (place + 1 >= torch.tensor(starts).unsqueeze(1)) & mask[:, 1:].bool()
    following = torch.nn.functional.pad(ids[:, 1:].where(scored, -1), (0, 1), value=-1)
    features = _features("texts", ids, mask)

    def by_question(values: Tensor) -> Tensor:
        """(N, T, m, ...): tokens before options, as ``Stream.batches`` cuts them."""
        return values.unflatten(0, (len(questions), -1)).transpose(1, 2).contiguous()

    return {
        "inputs_embeds": by_question(features),
        "attention_mask": by_question(mask),
        "following": by_question(following),
    }


def _features(kind: str, ids: Tensor, mask: Tensor) -> Tensor:
    """What enters the upper layers, (N, T, D), kept in the folder of temporary files."""
    name = hashlib.sha256(ids.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "bayes_kf_language" / f"{kind}-{TOP}-{name}.safetensors"
    if not path.is_file():
        parts = []
        for some, which in zip(ids.split(AT_ONCE), mask.split(AT_ONCE), strict=True):
            longest = int(which.sum(1).max())
            hidden = _halves()[1].features(some[:, :longest], which[:, :longest])
            parts.append(torch.nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - longest)))
        path.parent.mkdir(exist_ok=True)
        save_file({"features": torch.cat(parts)}, path)
    return load_file(path)["features"]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return ids, (torch.arange(ids.shape[1]) < lengths).long()


def _options(name: str) -> int:
    return 2 if name == "winogrande" else 4


@functools.cache
def _halves() -> tuple[Any, Halves]:
    tokenizer, model = smollm2()
    return tokenizer, Halves(model)
