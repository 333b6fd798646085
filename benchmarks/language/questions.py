"""Questions with options as prompts of a language model, and what enters its upper layers.

Two readings. Letters: the options are listed after A., B., C., D., and the letter is the answer. Texts: each option is
written after the question (Winogrande: the sentence with the option in its gap, scored from there on), and its tokens'
mean log-likelihood is its logit.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
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
from benchmarks.language.language_model import TOP, Halves, Letters, Texts, tree_mask

TRAIN, TEST, OUTSIDE = 200, 300, 100  # questions
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
            return Texts(upper, halves.head, self.options).eval()
        return Letters(upper, halves.head[letter_ids(tokenizer, self.options)]).eval()

    def load(self, seed: int) -> Data:
        """The streams of a seed; the test questions are the same for all."""
        train, test = splits(self.data)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:TRAIN].tolist()
        others = [name for name in SETS if name != self.data and _options(name) == self.options]
        asked = {name: splits(name)[1][:OUTSIDE] for name in others[:2]}
        asked["gibberish"] = [gibberish(question) for question in test[:OUTSIDE]]
        return Data(
            self._stream([train[number] for number in order]),
            by_length(self._stream(test[:TEST])),
            {name: by_length(self._stream(questions)) for name, questions in asked.items()},
        )

    def _stream(self, questions: Sequence[Question]) -> Stream:
        make = _letters if self.reading == "letters" else _texts
        return Stream(make(questions), torch.tensor([question.answer for question in questions]))


def by_length(stream: Stream) -> Stream:
    """The stream with the shortest questions first, so that batches have little padding."""
    assert isinstance(stream.inputs, dict)
    return stream.at(stream.inputs["attention_mask"].sum(1).argsort(stable=True))


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
    trees = [_tree(tokenizer, question) for question in questions]
    padded = {name: _padded([tree[name] for tree in trees]) for name in trees[0]}
    inputs = {name: values for name, (values, _) in padded.items()}
    ids, mask = inputs.pop("ids"), padded["ids"][1]
    features = _features("texts", ids, mask, inputs["branch"], inputs["position"])
    return {"inputs_embeds": features, "attention_mask": mask, **inputs}


def _tree(tokenizer: Any, question: Question) -> dict[str, list[int]]:
    """The tokens of a question's options after those that they share, as ``Texts`` takes them."""
    parts = [
        (tokenizer(before)["input_ids"], tokenizer(after, add_special_tokens=False)["input_ids"])
        for before, after in text_parts(question)
    ]
    columns = zip(*(given for given, _ in parts), strict=False)
    shared = len(list(itertools.takewhile(lambda same: len(set(same)) == 1, columns)))
    tree: dict[str, list[int]] = {
        "ids": parts[0][0][:shared],
        "branch": [0] * shared,
        "position": list(range(shared)),
        "token": [],
        "token_branch": [],
        "source": [],
    }
    for number, (given, scored) in enumerate(parts, start=1):
        own, begin = [*given[shared:], *scored], len(tree["ids"])
        tree["ids"] = tree["ids"] + own
        tree["branch"] = tree["branch"] + [number] * len(own)
        tree["position"] = tree["position"] + list(range(shared, shared + len(own)))
        first = len(given) - shared  # of the scored tokens, in the branch
        tree["token"] += scored
        tree["token_branch"] += [number] * len(scored)
        tree["source"] += [begin + place - 1 if place else shared - 1 for place in range(first, len(own))]
    return tree


def _features(kind: str, ids: Tensor, mask: Tensor, branch: Tensor | None = None, position: Any = None) -> Tensor:
    """What enters the upper layers, (N, T, D), kept in the folder of temporary files."""
    path = cache_folder() / f"{kind}-{TOP}-{name_of(ids, mask)}.safetensors"
    if not path.is_file():
        parts = []
        for start in range(0, len(ids), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            longest = int(mask[rows].sum(1).max())
            some, seen, places = ids[rows, :longest], mask[rows, :longest], None
            if branch is not None:
                seen, places = tree_mask(seen, branch[rows, :longest], torch.float32), position[rows, :longest]
            hidden = _halves()[1].features(some, seen, places)
            parts.append(torch.nn.functional.pad(hidden, (0, 0, 0, ids.shape[1] - longest)))
        save_file({"features": torch.cat(parts)}, path)
    return load_file(path)["features"]


def cache_folder() -> Path:
    """Where features and AdamW's runs are kept."""
    path = Path(tempfile.gettempdir()) / "bayes_kf_language"
    path.mkdir(exist_ok=True)
    return path


def name_of(*contents: Tensor | str) -> str:
    """A name for the contents of tensors and texts."""
    parts = [part.encode() if isinstance(part, str) else part.numpy().tobytes() for part in contents]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


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
