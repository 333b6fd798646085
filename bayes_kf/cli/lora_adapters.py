"""The adapter of ``fit``: a new adapter, or a trained one from a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bayes_kf.cli.base_model import BaseModel
from bayes_kf.validation import did_you_mean

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
QUERIES_AND_VALUES = (["query", "value"], ["q_proj", "v_proj"], ["q_lin", "v_lin"])
"""Names of the query and value projections in different architectures."""


def add_adapter(base: BaseModel, args: argparse.Namespace, seed: int) -> PeftModel:
    """The model with the adapter of ``--adapter``, ``--lora`` or ``--rank``; only the adapter is trainable.

    Raises:
        ValueError: if PEFT cannot read the adapter or add it to the model.
    """
    if args.target_modules and (args.lora or args.adapter):
        raise ValueError("`--target-modules` must be left out with --lora or --adapter, got both.")
    if args.adapter is not None:
        return _load_adapter(base, args.adapter)
    config = _read_config(args.lora) if args.lora is not None else _lora(base, args.rank, args.target_modules)
    config.inference_mode = False
    if base.new_modules:
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *base.new_modules})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        option = "--target-modules" if args.lora is None else "--lora"  # _lora checks the rank
        return _apply_peft(option, lambda: get_peft_model(base.model, config))


def _lora(base: BaseModel, rank: int, targets: list[str] | None) -> LoraConfig:
    """The config of a LoRA with scale 1 on queries and values, and of the trained head."""
    if rank < 1:
        raise ValueError(f"`--rank` must be at least 1, got {rank}.")
    names = {name.rpartition(".")[2] for name, _ in base.model.named_modules()}
    default_targets = next((pair for pair in QUERIES_AND_VALUES if names.issuperset(pair)), None)
    if not (targets or default_targets):
        raise ValueError(f"`--target-modules` must be given for this model, got none; {_linear_layers(base.model)}.")
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name, _ in base.model.named_modules()):
            nearest = did_you_mean(target, names) or f"; {_linear_layers(base.model)}."
            raise ValueError(f"`--target-modules` must name modules of the model, got {target!r}{nearest}")
    chosen, heads = targets or default_targets or [], base.head_modules or None
    transposed = any(name.endswith(tuple(chosen)) and isinstance(m, Conv1D) for name, m in base.model.named_modules())
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen, modules_to_save=heads, fan_in_fan_out=transposed)


def _linear_layers(model: nn.Module) -> str:
    """The names of a model's linear layers, in words."""
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return f"its linear layers are {', '.join(sorted(named))}"


def _read_config(path: Path) -> LoraConfig:
    """The PEFT config in a JSON file, or in its folder."""
    file = path / ADAPTER_FILES[0] if path.is_dir() else path
    try:
        fields: dict[str, Any] = {"peft_type": "LORA"} | json.loads(file.read_text(encoding="utf-8"))
        config = PeftConfig.from_peft_type(**fields)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"`--lora` must be a PEFT config, got {file}: {error}.") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`--lora` must be a PEFT config of type LORA, got {config.peft_type.value} in {file}.")
    return config


def _load_adapter(base: BaseModel, folder: Path) -> PeftModel:
    """The model with the trained adapter in a folder."""
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ValueError(f"`--adapter` must be a folder with {name}, got none in {folder}.")
    model = _apply_peft("--adapter", lambda: PeftModel.from_pretrained(base.model, str(folder), is_trainable=True))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for module in base.new_modules:
        if not any(f".{module}." in name for name in trainable):
            raise ValueError(f"`--adapter` must hold the {module} that the model lacks, got none in {folder}.")
    return model


def _apply_peft(option: str, apply: Callable[[], nn.Module]) -> PeftModel:
    """The PEFT model in evaluation mode. Errors of PEFT name the option."""
    try:
        model = apply()
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"`{option}` must fit the model, got: {error}") from error
    assert isinstance(model, PeftModel)  # PEFT returns other classes only with mixed=True
    return model.eval()
