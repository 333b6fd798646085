"""The adapter of a posterior: written as PEFT writes it, and attached to a base model again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_kf.inference.saving import base_fingerprint
from bayes_kf.inference.saving.base_fingerprint import BaseSnapshot
from bayes_kf.inference.saving.file_names import ADAPTER_FILES, CARD_FILE, IGNORED_SETTINGS, MODEL_FILE
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.adapter_tensors import CHANGING, active_adapter, check_name
from bayes_kf.models.peft_adapters.in_use import is_peft

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def write_adapter(adapter: AdapterModel, vector: Tensor, folder: Path) -> None:
    """Write the adapter with parameters ``vector`` (n,) as PEFT saves it; the model itself is not changed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().clone() for name, t in adapter.tensors(vector).items()}
    if not is_peft(adapter.model):
        save_file({k: t.cpu() for k, t in tensors.items()}, folder / MODEL_FILE)
        return
    name = active_adapter(adapter.model)
    with adapter.substituted(tensors):  # PEFT computes the files of a prompt from the model itself
        adapter.model.save_pretrained(
            str(folder),
            selected_adapters=[name],
            state_dict=adapter.model.state_dict(),
            safe_serialization=True,
            save_embedding_layers=False,
        )
    (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's empty model card
    nested = folder / name  # PEFT writes an adapter that is not called "default" here
    for file in list(nested.glob("*")) if nested.is_dir() else ():
        file.rename(folder / file.name)
    if nested.is_dir():
        shutil.rmtree(folder / name.split("/")[0])


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """The settings of the active adapter that determine its outputs, as JSON; none without PEFT."""
    return _as_json(model.peft_config[active_adapter(model)]) if is_peft(model) else {}


def find_or_attach(
    folder: Path,
    base_model: nn.Module,
    metadata: dict[str, Any],
    tensors: Mapping[str, Tensor],
    snapshot: BaseSnapshot,
) -> AdapterModel:
    """The adapter of a posterior: the one that is on ``base_model``, or one that PEFT adds from ``folder``.

    Args:
        folder: the posterior's.
        base_model: the model, with or without its adapter.
        metadata: of the state file.
        tensors: of the state file.
        snapshot: of ``base_model``; it copies the weights that PEFT will change.

    Raises:
        ValueError: if ``base_model`` has other frozen weights or another adapter, or the adapter's files are damaged.
    """
    has_adapter = {name for name, p in base_model.named_parameters() if p.requires_grad} == set(metadata["names"])
    recognized = base_fingerprint.recognize(base_model, metadata, has_adapter)
    if recognized is False:
        _refuse_base(folder, base_model, metadata)
    if has_adapter:
        _check_settings(adapter_settings(base_model), "`base_model` must have an adapter", metadata)
        adapter = AdapterModel(base_model)
        base_fingerprint.check_frozen_tensors(base_model, metadata, tensors)
        return adapter
    if is_peft(base_model):
        raise ValueError("`base_model` must have no adapter, or the posterior's as the only trainable one, got others.")
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        raise ValueError(
            f"`folder` must hold {' and '.join(ADAPTER_FILES)} to add the adapter, got {folder} without them."
        )
    check_name(metadata["adapter"], "`folder` must hold an adapter")
    _check_adapter_file(folder / ADAPTER_FILES[1])
    if recognized is None:
        snapshot.copy_weights(metadata["initialized"])
    return _attach(folder, base_model, metadata, tensors, initialized=recognized is True)


def _refuse_base(folder: Path, base_model: nn.Module, metadata: dict[str, Any]) -> None:
    missing = sorted(set(metadata["names"]) - {name for name, _ in base_model.named_parameters()})
    if missing and not metadata["adapter"]:  # there is no adapter that PEFT could add
        raise ValueError(
            f"`base_model` must have the trainable tensors that {folder} was fitted on, got one without {missing[0]}; "
            "adapters of a PeftMixedModel must be attached first."
        )
    raise ValueError(f"`base_model` must be the model that {folder} was fitted on, got one with other frozen weights.")


def _attach(
    folder: Path, base_model: nn.Module, metadata: dict[str, Any], tensors: Mapping[str, Tensor], initialized: bool
) -> AdapterModel:
    """The base with the adapter that PEFT adds to it, at the posterior mean.

    Args:
        folder: holds the adapter's files.
        base_model: without adapters.
        metadata: of the state file.
        tensors: of the state file.
        initialized: whether LoRA's initialization has changed the base already, if it is one that changes it.
    """
    config, name = _peft_config(folder), metadata["adapter"]
    _check_settings(_as_json(config), f"`folder` must hold an {ADAPTER_FILES[0]}", metadata)
    try:
        model = _add_adapter(folder, base_model, config, name, initialize=not initialized)
    except ValueError as error:  # PEFT finds no module of the names that the adapter is for
        raise ValueError(f"`base_model` must take the adapter in {folder}, got: {error}") from error
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in metadata["names"])
    adapter = AdapterModel(model)
    if list(adapter.names) != metadata["names"] or [list(shape) for shape in adapter.shapes] != metadata["shapes"]:
        raise ValueError(f"`folder` must hold the adapter of its posterior, got another in {folder}.")
    base_fingerprint.check_frozen_tensors(model, metadata, tensors)
    mean = tensors["belief.mean"]
    if mean.shape == (adapter.num_parameters,):  # else `make_state` refuses it and says why
        adapter.assign(mean.to(adapter.device))
    return adapter


def _add_adapter(folder: Path, base_model: nn.Module, config: Any, name: str, initialize: bool) -> PeftModel:
    """The base with an adapter of these settings and the folder's values.

    For a prompt, PEFT saves the output of its encoder and not the encoder, whose values are in the state file alone.

    Args:
        folder: holds the values.
        base_model: without adapters.
        config: the settings.
        name: of the adapter.
        initialize: whether LoRA's initialization may change the base.
    """
    from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

    if config.is_prompt_learning:
        config.inference_mode = False
        model: PeftModel = get_peft_model(base_model, config, name)
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), name)
        return model
    given = getattr(config, "init_lora_weights", None)
    if given is not None and not initialize and str(given).lower().startswith(CHANGING):
        config.init_lora_weights = True
    model = PeftModel.from_pretrained(base_model, str(folder), name, is_trainable=True, config=config)
    if given is not None:
        setattr(model.peft_config[name], "init_lora_weights", given)  # noqa: B010 (not of every type)
    return model


def _peft_config(folder: Path) -> PeftConfig:
    """The settings in a folder's ``adapter_config.json``."""
    from peft import PeftConfig

    path = folder / ADAPTER_FILES[0]
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises many types for a damaged file
        raise ValueError(f"`folder` must hold a readable {path.name}, got {path}: {error}.") from error


def _as_json(config: PeftConfig) -> dict[str, Any]:
    settings = {name: value for name, value in config.to_dict().items() if name not in IGNORED_SETTINGS}
    sets = {name: sorted(value) for name, value in settings.items() if isinstance(value, set)}
    return dict(json.loads(json.dumps(settings | sets, default=str)))


def _check_settings(settings: dict[str, Any], subject: str, metadata: dict[str, Any]) -> None:
    """Raise ValueError if an adapter has other settings than in the fit: its tensors would mean something else.

    Settings that only one of the two versions of PEFT knows are skipped.
    """
    for name, value in metadata.get("adapter_settings", {}).items():
        if name in settings and settings[name] != value:
            raise ValueError(f"{subject} with {name} {value} as it was fitted, got {settings[name]}.")


def _check_adapter_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise ValueError("no tensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"`folder` must hold a readable {path.name}, got {path}: {error}.") from error
