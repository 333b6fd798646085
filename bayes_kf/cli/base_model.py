"""Base models from Hugging Face folders, or the Hub: safetensors, no remote code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from bayes_kf.data import encode_labels
from bayes_kf.data.text import TEXT_SUFFIXES
from bayes_kf.files.hub import local_folder
from bayes_kf.models.zoo import DIGITS_VIT

BUNDLED = {"digits-vit": DIGITS_VIT}
MAPPINGS = {"text": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "image": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}
AUTO = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}
POOLER = "pooler"  # text models may lack it; then it is trained with the head


@dataclass(frozen=True)
class BaseModel:
    """A classifier and the new tensors of its head, which the model folder does not hold."""

    model: PreTrainedModel
    new_head: dict[str, Tensor]

    @property
    def new_modules(self) -> list[str]:
        """Names of the modules that hold the new tensors."""
        prefix = f"{self.model.base_model_prefix}."
        return sorted({name.removeprefix(prefix).partition(".")[0] for name in self.new_head})

    @property
    def head_modules(self) -> list[str]:
        """Names of the modules outside the backbone that have weights."""
        children = self.model.named_children()
        return [n for n, m in children if n != self.model.base_model_prefix and any(True for _ in m.parameters())]


def model_folder(model: str) -> Path:
    """The folder of ``--model``.

    Raises:
        ValueError: if the folder holds no model.
    """
    folder = BUNDLED.get(model) or local_folder(model, argument="--model")
    if not (folder / "config.json").is_file():
        names = " or ".join(BUNDLED)
        raise ValueError(
            f"`--model` must be {names}, or a folder or repository with config.json and safetensors, got {model}."
        )
    return folder


def kind_of(data: Path) -> str:
    """Whether a path holds text or images."""
    return "text" if data.suffix in TEXT_SUFFIXES else "image"


def read_config(folder: Path, kind: str) -> PreTrainedConfig:
    """The configuration of the model.

    Raises:
        ValueError: if the architecture cannot classify this kind of data.
    """
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if type(config) not in MAPPINGS[kind]:
        raise ValueError(f"`--model` must be able to classify {kind} data, got a {config.model_type} in {folder}.")
    return config


def load_base(folder: Path, kind: str, num_outputs: int | None, seed: int, dtype: str = "auto") -> BaseModel:
    """The classifier with this many outputs (None: as saved). ``seed`` draws a head that the folder lacks.

    Raises:
        ValueError: if weights outside the head are missing.
        OSError: if there are no safetensors weights.
    """
    read_config(folder, kind)
    options = {} if num_outputs is None else {"num_labels": num_outputs}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, info = AUTO[kind].from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=dtype,
            **options,
        )
    new = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    state = model.state_dict()
    base = BaseModel(model.eval(), {name: state[name].clone() for name in new})
    for module in base.new_modules:
        if module not in (*base.head_modules, POOLER):
            raise ValueError(f"`--model` must hold its backbone's weights, got none for {module} in {folder}.")
    return base


def restore_head(base: BaseModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Restore the initial weights of a new head from the fit of the posterior.

    Raises:
        ValueError: if the tensors belong to another model.
    """
    state = base.model.state_dict()
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(f"`--model` must be the model that {folder} was fitted on, got one without its {name}.")
        state[name].copy_(tensor)


def choose_names(data_names: Sequence[str], config: PreTrainedConfig) -> tuple[str, ...]:
    """Class names by index: those of the model if they include all names of the data, otherwise those of the data.

    Example:
        >>> from transformers import BertConfig
        >>> choose_names(["bad", "good"], BertConfig(id2label={0: "good", 1: "fair", 2: "bad"}))
        ('good', 'fair', 'bad')
        >>> choose_names(["cat", "dog"], BertConfig(num_labels=5))
        ('cat', 'dog')
    """
    model_names = model_class_names(config)
    try:
        encode_labels(data_names, model_names)
    except ValueError:
        return tuple(data_names)
    return model_names


def model_class_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """The class names of the model by index; numbers if the names are LABEL_0, LABEL_1, ..."""
    labels: Any = config.id2label
    names = [str(labels[i]) for i in sorted(labels)]
    generic = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return tuple(str(i) for i in range(len(names))) if generic else tuple(names)
