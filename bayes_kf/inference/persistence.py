"""Posteriors on disk: a plain PEFT adapter (the mean) beside the settings and the belief; safetensors and JSON only.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, or ``model.safetensors``
with the trainable tensors of a module that is no PEFT model; ``kalman_config.json`` and ``kalman_state.safetensors``; a
model card, ``README.md``; and checksums, ``SHA256SUMS``. They are written as one: whenever the process is killed, the
folder opens as the old or the new posterior. Files that the package did not write stay as they are
(:mod:`bayes_kf.inference.folders`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_kf.inference import card, diagonal, noise, tempering
from bayes_kf.inference.config import CONFIG_FILE, KalmanConfig
from bayes_kf.inference.filter import KalmanFilter
from bayes_kf.inference.folders import check_target, read_whole, recover, write_files
from bayes_kf.inference.progress import of_seen_data
from bayes_kf.inference.saved_files import (
    ADAPTER_FILES,
    CARD_FILE,
    DRAWS,
    MODEL_FILE,
    PLAIN,
    POSTERIOR,
    STATE_FILE,
)
from bayes_kf.inference.state import FilterState
from bayes_kf.inference.sums import EDITABLE, SUMS_FILE, check_sums, digest, write_lines, write_sums
from bayes_kf.models.adapter import AdapterModel, is_peft

if TYPE_CHECKING:
    from peft import PeftConfig

    from bayes_kf.inference.posterior import Posterior

FORMAT = 1
NOTED = ("names", "shapes", "base_fingerprint", "adapter", "step", "examples", "scaled", "scored", "noise_step")
SAMPLED = 4096  # elements of a tensor that its fingerprint reads


def save(
    posterior: Posterior,
    folder: Path,
    scores: Mapping[str, float] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a posterior into ``folder``, in the place of one that is there; ``extra`` writes further files of it."""

    def write(target: Path) -> None:
        name = folder.resolve().name
        _write_adapter(posterior.adapter, posterior.mean_vector, target)
        (target / CONFIG_FILE).write_text(posterior.config._as_json(), encoding="utf-8")
        (target / CARD_FILE).write_text(card.text(posterior, name, scores), encoding="utf-8")
        save_file(_tensors(posterior), target / STATE_FILE, metadata=_metadata(posterior, target))
        if extra is not None:
            extra(target)
        write_sums(target)

    write_files(folder, write, POSTERIOR)


def save_with(posterior: Posterior, folder: Path, write_others: Callable[[Path], None]) -> None:
    """Write settings and belief together with what ``write_others`` does: the adapter, at the mean, and other files.

    Those are another library's, and replace files of their names whoever wrote them, as that library does; but a
    ``README.md`` that somebody wrote stays.
    """

    def write(target: Path) -> None:
        write_others(target)
        text = card.text(posterior, folder.resolve().name)  # in the place of PEFT's, a form that nobody filled in
        (target / CARD_FILE).write_text(text, encoding="utf-8")
        (target / CONFIG_FILE).write_text(posterior.config._as_json(), encoding="utf-8")
        save_file(_tensors(posterior), target / STATE_FILE, metadata=_metadata(posterior, target))
        weights = [name for name in ADAPTER_FILES[1:] if (target / name).is_file()]
        write_sums(target, (STATE_FILE, CONFIG_FILE, *weights))

    own = (STATE_FILE, CONFIG_FILE, SUMS_FILE, CARD_FILE)
    write_files(folder, write, replace(POSTERIOR, overwrites=lambda name: name not in own))


def check_folder(folder: Path, *, of_peft: bool, names: Sequence[str] = ()) -> None:
    """Raise ValueError where a posterior, with further files of these names, could not be saved into ``folder``.

    What a save into it that was killed left is completed, or cleared away, first.
    """
    recover(folder)
    weights = ADAPTER_FILES[1] if of_peft else MODEL_FILE
    check_target(folder, (STATE_FILE, CONFIG_FILE, weights, *names), POSTERIOR)


def load(folder: Path, base_model: nn.Module) -> Posterior:
    """Read a posterior; ``base_model`` is with or without its adapter. Everything is checked before it is touched."""
    if not isinstance(base_model, nn.Module):
        found = repr(base_model) if isinstance(base_model, str) else type(base_model).__name__
        raise ValueError(f"`base_model` must be the model itself, a torch module that you loaded, got {found}.")
    return read_whole(folder, lambda source: _load(source, base_model), lambda found: _detach(found, base_model))


def _detach(found: Posterior, base_model: nn.Module) -> None:
    """Take the adapter off again that loading added to the base."""
    if found.adapter.model is not base_model and is_peft(found.adapter.model):
        found.adapter.model.unload()


def _load(folder: Path, base_model: nn.Module) -> Posterior:
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
    if state.examples and torch.equal(state.belief.mean, state.prior.mean):  # a trained adapter's mean, held
        history = of_seen_data(history)  # an earlier version wrote these series under a stream's names
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
        names = []
        for index, draw in enumerate(draws):
            _write_adapter(posterior.adapter, draw, target / f"draw_{index}")
            names += [f"draw_{index}/{name}" for name in ADAPTER_FILES]
        write_lines(target / DRAWS.sums, {name: digest(target / name) for name in names})

    write_files(folder, write, DRAWS)
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


def _metadata(posterior: Posterior, folder: Path) -> dict[str, str]:
    """What the state's file says beside its tensors; of files in ``folder`` that people may edit, how they were."""
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
        "editable": {name: digest(folder / name) for name in EDITABLE if (folder / name).is_file()},
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
        save_file(tensors, folder / MODEL_FILE)
