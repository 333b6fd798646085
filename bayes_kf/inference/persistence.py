"""Posteriors on disk: a plain PEFT adapter (the mean) beside the settings and the belief; safetensors and JSON only.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, or ``model.safetensors``
with the trainable tensors of a module that is no PEFT model; ``kalman_config.json`` and ``kalman_state.safetensors``; a
model card, ``README.md``; and checksums, ``SHA256SUMS``. It is written beside its final place and renamed, so a folder
is whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_kf.inference import card, diagonal, noise, tempering
from bayes_kf.inference.config import CONFIG_FILE, KalmanConfig
from bayes_kf.inference.filter import KalmanFilter
from bayes_kf.inference.folders import replace_folder
from bayes_kf.inference.state import FilterState
from bayes_kf.inference.sums import SUMS_FILE, check_sums, write_sums
from bayes_kf.models.adapter import AdapterModel, is_peft

if TYPE_CHECKING:
    from peft import PeftConfig

    from bayes_kf.inference.posterior import Posterior

FORMAT = 1
STATE_FILE = "kalman_state.safetensors"
CARD_FILE = "README.md"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NOTED = ("names", "shapes", "base_fingerprint", "adapter", "step", "examples", "scaled", "scored", "noise_step")
PLAIN = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version")  # change no output
SAMPLED = 4096  # elements of a tensor that its fingerprint reads


def save(posterior: Posterior, folder: Path, scores: Mapping[str, float] | None = None) -> None:
    """Write a posterior into ``folder``, replacing one that is there; see the module's docstring."""

    def write(target: Path) -> None:
        _write_adapter(posterior.adapter, posterior.mean_vector, target)
        posterior.config.save_pretrained(target)
        save_file(_tensors(posterior), target / STATE_FILE, metadata=_metadata(posterior))
        (target / CARD_FILE).write_text(card.text(posterior, folder.name, scores), encoding="utf-8")
        write_sums(target)

    _atomically(folder, write)


def save_beside(posterior: Posterior, folder: Path) -> None:
    """Write settings and belief into a folder that somebody else saved the adapter to, at the mean, each whole or not.

    The belief comes last, so that a folder that was not finished has none.
    """
    (folder / STATE_FILE).unlink(missing_ok=True)
    (folder / SUMS_FILE).unlink(missing_ok=True)
    posterior.config.save_pretrained(folder)
    temporary = folder / f".{STATE_FILE}"
    save_file(_tensors(posterior), temporary, metadata=_metadata(posterior))
    temporary.chmod(0o644)
    os.replace(temporary, folder / STATE_FILE)
    write_sums(folder, (STATE_FILE, CONFIG_FILE))


def load(folder: Path, base_model: nn.Module) -> Posterior:
    """Read a posterior; ``base_model`` is with or without its adapter. Everything is checked before it is touched."""
    from bayes_kf.inference.posterior import Posterior

    config = KalmanConfig.from_pretrained(folder)
    tensors, metadata = _read(folder / STATE_FILE)
    check_sums(folder)
    adapter = _adapter(folder, base_model, metadata)
    if list(adapter.names) != metadata["names"] or [list(s) for s in adapter.shapes] != metadata["shapes"]:
        raise ValueError(f"`base_model` must have the trainable tensors of {folder}, got others.")
    tensors = {name: t.to(adapter.device) if not name.startswith("history.") else t for name, t in tensors.items()}
    history = {name.removeprefix("history."): t for name, t in tensors.items() if name.startswith("history.")}
    kf = KalmanFilter(adapter, config)
    try:
        state = _state(kf, tensors, metadata)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`folder` must hold a belief that fits its settings, got {folder / STATE_FILE}: {error}."
        ) from error
    return Posterior(kf, state, history)


def _state(kf: KalmanFilter, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> FilterState:
    """The state, after a look at what belief, prior and scores should be like."""
    state = FilterState(
        belief=kf.config.structure.State(**_fields(tensors, "belief.")),
        prior=diagonal.State(**_fields(tensors, "prior.")),
        noise=noise.State(step=metadata["noise_step"], **_fields(tensors, "noise.")),
        scores=tempering.State(metadata["scored"], **_fields(tensors, "scores.")),
        scaled=metadata["scaled"],
        step=metadata["step"],
        examples=metadata["examples"],
    )
    empty = torch.empty(kf.adapter.num_parameters, dtype=kf.adapter.dtype, device="meta")
    start = diagonal.init(empty, empty)
    alike = {"belief": (state.belief, kf._belief(start)), "prior": (state.prior, start)}
    alike |= {"scores": (state.scores, tempering.init(torch.device("cpu")))}
    for part, (found, expected) in alike.items():
        for name, own, like in zip(found._fields, found, expected, strict=True):
            if isinstance(like, Tensor) and (own.shape, own.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{part}.{name} is {own.dtype} {tuple(own.shape)}, not {like.dtype} {tuple(like.shape)}"
                )
            if (
                isinstance(like, Tensor)
                and not like.is_meta
                and not like.is_floating_point()
                and not own.cpu().equal(like)
            ):
                raise ValueError(f"{part}.{name} is {own.tolist()}, not {like.tolist()}")
    counts = (state.step, state.examples, state.noise.step, state.scores.updates)
    if not all(type(count) is int and count >= 0 for count in counts) or type(state.scaled) is not bool:
        raise ValueError(f"its counts are {counts}, its prior scaled: {state.scaled!r}")
    if not bool((kf.config.structure.scales(state.belief) > 0).all()) or not bool((state.prior.variance > 0).all()):
        raise ValueError("its variances are not positive")
    return state


def export(posterior: Posterior, folder: Path, draws: Tensor) -> list[Path]:
    """Write each draw (S, n) as a PEFT adapter of its own, ``draw_0``, ``draw_1``, ..."""
    if not is_peft(posterior.adapter.model):
        raise ValueError("`export_adapters` needs a posterior over a PEFT model, got another module.")

    def write(target: Path) -> None:
        for index, draw in enumerate(draws):
            _write_adapter(posterior.adapter, draw, target / f"draw_{index}")

    _atomically(folder, write)
    return [folder / f"draw_{index}" for index in range(len(draws))]


def fingerprint(model: nn.Module, skip: set[str]) -> str:
    """SHA-256 over shapes and up to 4,096 evenly spaced elements of every tensor but those in ``skip``.

    Names are left out: PEFT renames the base's tensors when it adds an adapter to it.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name in skip:
            continue
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, -(-len(flat) // SAMPLED))].cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes() if len(picked) else b"")
    return digest.hexdigest()


def _tensors(posterior: Posterior) -> dict[str, Tensor]:
    """Every tensor of the state and the history under dotted names."""
    state = posterior.state
    parts: dict[str, Any] = {f"belief.{k}": v for k, v in state.belief._asdict().items()}
    parts |= {f"prior.{k}": v for k, v in state.prior._asdict().items()}
    parts |= {f"noise.{k}": v for k, v in state.noise._asdict().items()}
    parts |= {f"scores.{k}": v for k, v in state.scores._asdict().items()}
    parts |= {f"history.{k}": v for k, v in posterior.history.items()}
    return {k: v.detach().cpu().clone().contiguous() for k, v in parts.items() if isinstance(v, Tensor)}


def _metadata(posterior: Posterior) -> dict[str, str]:
    state, adapter = posterior.state, posterior.adapter
    values = {
        "format": FORMAT,
        "names": list(adapter.names),
        "shapes": [list(shape) for shape in adapter.shapes],
        "base_fingerprint": fingerprint(adapter.model, set(adapter.names)),
        "adapter": _adapter_name(adapter.model),
        "adapter_settings": _adapter_settings(adapter.model),
        "step": state.step,
        "examples": state.examples,
        "scaled": state.scaled,
        "scored": state.scores.updates,
        "noise_step": state.noise.step,
    }
    return {"bayes_kf": json.dumps(values)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a state file, checked for finiteness."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(json.loads((file.metadata() or {})["bayes_kf"]))
            # clones lie where torch puts tensors: products depend on that, in the last bit
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a readable {STATE_FILE}, got {path}: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"`folder` must be of format {FORMAT}, got {metadata.get('format')}; a newer bayes_kf wrote it?"
        )
    missing = [name for name in NOTED if name not in metadata]
    if missing:
        raise ValueError(f"`folder` must hold a {STATE_FILE} with {', '.join(missing)}, got none in {path}.")
    for name, tensor in tensors.items():
        if name.startswith(("belief.", "prior.")) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`folder` must hold a finite belief, got NaN or infinity in {name} of {path}.")
    return tensors, metadata


def _adapter(folder: Path, base_model: nn.Module, metadata: dict[str, Any]) -> AdapterModel:
    """The model to attach to, after its frozen tensors have been recognized; the base is as it was after an error."""
    names, expected = metadata["names"], metadata["base_fingerprint"]
    complete = {name for name, p in base_model.named_parameters() if p.requires_grad} == set(names)
    skip = set(names) if complete else {_base_name(name) for name in names}
    if fingerprint(base_model, skip) != expected:
        raise ValueError(
            f"`base_model` must be the model that {folder} was fitted on, got one with other frozen weights."
        )
    if complete:
        _check_settings(_adapter_settings(base_model), "`base_model` must have an adapter", metadata)
        return AdapterModel(base_model)
    if is_peft(base_model):
        raise ValueError("`base_model` must be without adapters or have the posterior's own trainable, got others.")
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        raise ValueError(f"`folder` must hold {' and '.join(ADAPTER_FILES)} to add the adapter, got {folder} without.")
    name = metadata["adapter"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"`folder` must hold an adapter with a plain name, got {name!r} in {folder}.")
    _check_adapter_file(folder / ADAPTER_FILES[1])
    return _attached(folder, base_model, metadata)


def _attached(folder: Path, base_model: nn.Module, metadata: dict[str, Any]) -> AdapterModel:
    """The base with the adapter that PEFT adds to it, taken off again if it is not the posterior's."""
    _check_settings(_as_json(_peft_config(folder)), f"`folder` must hold an {ADAPTER_FILES[0]}", metadata)
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model, str(folder), metadata["adapter"], is_trainable=True)
    adapter = AdapterModel(model)
    if list(adapter.names) != metadata["names"] or [list(shape) for shape in adapter.shapes] != metadata["shapes"]:
        model.unload()
        raise ValueError(f"`folder` must hold the adapter that its belief is about, got another in {folder}.")
    return adapter


def _check_adapter_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise ValueError("no tensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"`folder` must hold a readable {path.name}, got {path}: {error}.") from error


def _base_name(name: str) -> str:
    """A tensor's name in the model before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _adapter_name(model: nn.Module) -> str:
    return model.active_adapters[0] if is_peft(model) else ""


def _adapter_settings(model: nn.Module) -> dict[str, Any]:
    """What an adapter's tensors mean, beside their names and shapes: PEFT's settings, as JSON."""
    return _as_json(model.peft_config[_adapter_name(model)]) if is_peft(model) else {}


def _as_json(config: PeftConfig) -> dict[str, Any]:
    settings = {name: value for name, value in config.to_dict().items() if name not in PLAIN}
    sets = {name: sorted(value) for name, value in settings.items() if isinstance(value, set)}
    return dict(json.loads(json.dumps(settings | sets, default=str)))


def _check_settings(found: dict[str, Any], what: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError where an adapter's tensors mean something else than when they were learned.

    Settings that only this version of PEFT knows, or only the one that wrote the folder, are passed over.
    """
    for name, value in metadata.get("adapter_settings", {}).items():
        if name in found and found[name] != value:
            raise ValueError(f"{what} with {name} {value} as it was fitted, got {found[name]}.")


def _peft_config(folder: Path) -> PeftConfig:
    """The settings in a folder's ``adapter_config.json``."""
    from peft import PeftConfig

    path = folder / ADAPTER_FILES[0]
    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT meets in a damaged file
        raise ValueError(f"`folder` must hold a readable {path.name}, got {path}: {error}.") from error


def _fields(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write_adapter(adapter: AdapterModel, vector: Tensor, folder: Path) -> None:
    """The adapter with its tensors replaced by ``vector``, as PEFT saves it; the model itself is not changed."""
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = dict(zip(adapter.names, adapter.dtypes, strict=True))
    tensors = {k: v.detach().to(dtypes[k]).cpu().clone() for k, v in adapter.unflatten(vector).items()}
    if is_peft(adapter.model):
        state_dict = adapter.model.state_dict() | tensors
        name = _adapter_name(adapter.model)
        adapter.model.save_pretrained(
            str(folder),
            selected_adapters=[name],
            state_dict=state_dict,
            safe_serialization=True,
            save_embedding_layers=False,
        )
        (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's empty model card
        nested = folder / name  # where PEFT puts an adapter that is not called "default"
        for file in nested.glob("*") if nested.is_dir() else ():
            file.rename(folder / file.name)
        nested.rmdir() if nested.is_dir() else None
    else:
        save_file(tensors, folder / "model.safetensors")


def _atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, then put it in ``folder``'s place; on any error the old one stays."""
    folder = folder.resolve()  # a link to a folder stays one
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder or new, got the file {folder}.")
    if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
        raise ValueError(f"`folder` must be new, empty or hold a posterior or draws, got {folder} with other files.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        try:
            write(temporary)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(f"{folder} could not be written: {error}") from error
        for file in temporary.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a posterior, or nothing but exported draws."""
    if (folder / STATE_FILE).is_file():
        return True
    return all(re.fullmatch(r"draw_\d+", f.name) and (f / ADAPTER_FILES[0]).is_file() for f in folder.iterdir())
