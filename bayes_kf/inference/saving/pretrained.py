"""Posteriors on disk: a plain PEFT adapter (the mean) beside the settings and the belief; safetensors and JSON only.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, or ``model.safetensors``
with the trainable tensors of a module that is no PEFT model; ``kalman_config.json`` and ``kalman_state.safetensors``; a
model card, ``README.md``; and checksums, ``SHA256SUMS``. They are written as one: whenever the process is killed, the
folder opens as the old or the new posterior. Files that the package did not write stay as they are
(:mod:`bayes_kf.files.atomic_folder`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bayes_kf.files.atomic_folder import check_target, read_whole, recover, write_files
from bayes_kf.files.checksums import EDITABLE, SUMS_FILE, check_sums, digest, write_lines, write_sums
from bayes_kf.inference.config import CONFIG_FILE, KalmanConfig
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering import tempering
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.tempering import TemperatureState
from bayes_kf.inference.fitting.progress import of_seen_data
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.saving import base_fingerprint, model_card
from bayes_kf.inference.saving.base_fingerprint import fingerprint as fingerprint
from bayes_kf.inference.saving.file_names import (
    ADAPTER_FILES,
    CARD_FILE,
    DRAWS,
    MODEL_FILE,
    PLAIN,
    POSTERIOR,
    STATE_FILE,
)
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.adapter_tensors import CHANGING, active_adapter, check_name
from bayes_kf.models.peft_adapters.in_use import is_peft

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from bayes_kf.inference.posterior import Posterior

FORMAT = 1
NOTED = ("names", "shapes", "base_fingerprint", "adapter", "step", "examples", "scaled", "scored", "noise_step")


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
        (target / CARD_FILE).write_text(model_card.text(posterior, name, scores), encoding="utf-8")
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
        text = model_card.text(posterior, folder.resolve().name)  # in the place of PEFT's, a form that nobody filled in
        (target / CARD_FILE).write_text(text, encoding="utf-8")
        (target / CONFIG_FILE).write_text(posterior.config._as_json(), encoding="utf-8")
        save_file(_tensors(posterior), target / STATE_FILE, metadata=_metadata(posterior, target))
        weights = [name for name in ADAPTER_FILES[1:] if (target / name).is_file()]
        write_sums(target, (CONFIG_FILE, *weights, STATE_FILE))

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
    before = base_fingerprint.Before(base_model)

    def read(source: Path) -> Posterior:
        try:
            return _load(source, base_model, before)
        except BaseException:
            before.restore()
            raise

    return read_whole(folder, read, lambda found: before.restore())


def _load(folder: Path, base_model: nn.Module, before: base_fingerprint.Before) -> Posterior:
    from bayes_kf.inference.posterior import Posterior

    config = KalmanConfig.from_pretrained(folder)
    tensors, metadata = _read(folder / STATE_FILE)
    check_sums(folder)
    adapter = _adapter(folder, base_model, metadata, tensors, before)
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
        belief=kf.config.structure(**_fields(tensors, "belief.")),
        prior=DiagonalGaussian(**_fields(tensors, "prior.")),
        noise=NoiseState(step=metadata["noise_step"], **_fields(tensors, "noise.")),
        temperature_scores=_scores(metadata["scored"], _fields(tensors, "scores.")),
        prior_is_scaled=metadata["scaled"],
        step=metadata["step"],
        examples=metadata["examples"],
    )
    empty = torch.empty(kf.adapter.num_parameters, dtype=kf.adapter.dtype, device="meta")
    start = DiagonalGaussian(empty, empty)
    alike = {"belief": (state.belief._asdict(), kf._prior_belief(start)._asdict())}
    alike |= {"prior": (state.prior._asdict(), start._asdict())}
    alike |= {"scores": (state.temperature_scores._asdict(), tempering.init(torch.device("cpu"))._asdict())}
    for part, (found, expected) in alike.items():
        for name, own in found.items():
            like = expected[name]
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
    counts = (state.step, state.examples, state.noise.step, state.temperature_scores.updates)
    if not all(type(count) is int and count >= 0 for count in counts) or type(state.prior_is_scaled) is not bool:
        raise ValueError(f"its counts are {counts}, its prior scaled: {state.prior_is_scaled!r}")
    if not bool((state.belief.scales() > 0).all()) or not bool((state.prior.variance > 0).all()):
        raise ValueError("its variances are not positive")
    return state


def _scores(updates: int, fields: dict[str, Tensor]) -> TemperatureState:
    """The scores; folders that know nothing of differences keep the temperature that they were saved with."""
    unknown = tempering.init(next(iter(fields.values())).device if fields else torch.device("cpu"))
    return TemperatureState(updates, **{"differences": unknown.differences} | fields)


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


def _tensors(posterior: Posterior) -> dict[str, Tensor]:
    """Every tensor of the state and the history under dotted names."""
    state = posterior.state
    parts: dict[str, Any] = {f"belief.{k}": v for k, v in state.belief._asdict().items()}
    parts |= {f"prior.{k}": v for k, v in state.prior._asdict().items()}
    parts |= {f"noise.{k}": v for k, v in state.noise._asdict().items()}
    parts |= {f"scores.{k}": v for k, v in state.temperature_scores._asdict().items()}
    parts |= {f"history.{k}": v for k, v in posterior.history.items()}
    parts |= base_fingerprint.samples(posterior.adapter)
    return {k: v.detach().cpu().clone().contiguous() for k, v in parts.items() if isinstance(v, Tensor)}


def _metadata(posterior: Posterior, folder: Path) -> dict[str, str]:
    """What the state's file says beside its tensors; of files in ``folder`` that people may edit, how they were."""
    state, adapter = posterior.state, posterior.adapter
    values = {
        "format": FORMAT,
        "names": list(adapter.names),
        "shapes": [list(shape) for shape in adapter.shapes],
        **base_fingerprint.noted(adapter),
        "adapter": active_adapter(adapter.model),
        "adapter_settings": _adapter_settings(adapter.model),
        "step": state.step,
        "examples": state.examples,
        "scaled": state.prior_is_scaled,
        "scored": state.temperature_scores.updates,
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


def _adapter(
    folder: Path,
    base_model: nn.Module,
    metadata: dict[str, Any],
    tensors: Mapping[str, Tensor],
    before: base_fingerprint.Before,
) -> AdapterModel:
    """The model to attach to, after its frozen tensors have been recognized."""
    complete = {name for name, p in base_model.named_parameters() if p.requires_grad} == set(metadata["names"])
    known = base_fingerprint.recognized(base_model, metadata, complete)
    missing = sorted(set(metadata["names"]) - {name for name, _ in base_model.named_parameters()})
    if known is False and missing and not metadata["adapter"]:  # no adapter that PEFT could add
        raise ValueError(
            f"`base_model` must have the trainable tensors that {folder} was fitted on, got one without {missing[0]}; "
            "adapters of a PeftMixedModel must be attached first."
        )
    if known is False:
        raise ValueError(
            f"`base_model` must be the model that {folder} was fitted on, got one with other frozen weights."
        )
    if complete:
        _check_settings(_adapter_settings(base_model), "`base_model` must have an adapter", metadata)
        adapter = AdapterModel(base_model)
        base_fingerprint.check(base_model, metadata, tensors)
        return adapter
    if is_peft(base_model):
        raise ValueError("`base_model` must be without adapters or have the posterior's own trainable, got others.")
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        raise ValueError(f"`folder` must hold {' and '.join(ADAPTER_FILES)} to add the adapter, got {folder} without.")
    check_name(metadata["adapter"], "`folder` must hold an adapter")
    _check_adapter_file(folder / ADAPTER_FILES[1])
    if known is None:
        before.hold(metadata["initialized"])
    return _attached(folder, base_model, metadata, tensors, initialized=known is True)


def _attached(
    folder: Path, base_model: nn.Module, metadata: dict[str, Any], tensors: Mapping[str, Tensor], initialized: bool
) -> AdapterModel:
    """The base with the adapter that PEFT adds to it.

    Args:
        folder: holds both.
        base_model: without adapters.
        metadata: of the belief.
        tensors: of the belief.
        initialized: whether LoRA's initialization has changed the base already, where it does so.
    """
    config, name = _peft_config(folder), metadata["adapter"]
    _check_settings(_as_json(config), f"`folder` must hold an {ADAPTER_FILES[0]}", metadata)
    try:
        model = _with_adapter(folder, base_model, config, name, again=not initialized)
    except ValueError as error:  # PEFT finds no module of the names that the adapter is for
        raise ValueError(f"`base_model` must take the adapter in {folder}, got: {error}") from error
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in metadata["names"])
    adapter = AdapterModel(model)
    if list(adapter.names) != metadata["names"] or [list(shape) for shape in adapter.shapes] != metadata["shapes"]:
        raise ValueError(f"`folder` must hold the adapter that its belief is about, got another in {folder}.")
    base_fingerprint.check(model, metadata, tensors)
    mean = tensors["belief.mean"]
    if mean.shape == (adapter.num_parameters,):  # else the belief is refused with its reason
        adapter.assign(mean.to(adapter.device))
    return adapter


def _with_adapter(folder: Path, base_model: nn.Module, config: Any, name: str, again: bool) -> PeftModel:
    """The base with an adapter of these settings and the folder's values.

    Of a prompt PEFT saves what its encoder says, not the encoder, whose values are in the belief alone.

    Args:
        folder: holds the values.
        base_model: without adapters.
        config: the settings.
        name: of the adapter.
        again: whether LoRA's initialization may change the base.
    """
    from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

    if config.is_prompt_learning:
        config.inference_mode = False
        model: PeftModel = get_peft_model(base_model, config, name)
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), name)
        return model
    given = getattr(config, "init_lora_weights", None)
    if given is not None and not again and str(given).lower().startswith(CHANGING):
        config.init_lora_weights = True
    model = PeftModel.from_pretrained(base_model, str(folder), name, is_trainable=True, config=config)
    if given is not None:
        setattr(model.peft_config[name], "init_lora_weights", given)  # noqa: B010 (not of every type)
    return model


def _check_adapter_file(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise ValueError("no tensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"`folder` must hold a readable {path.name}, got {path}: {error}.") from error


def _adapter_settings(model: nn.Module) -> dict[str, Any]:
    """What an adapter's tensors mean, beside their names and shapes: PEFT's settings, as JSON."""
    return _as_json(model.peft_config[active_adapter(model)]) if is_peft(model) else {}


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
    tensors = {name: t.detach().clone() for name, t in adapter.tensors(vector).items()}
    if is_peft(adapter.model):
        name = active_adapter(adapter.model)
        with adapter.substituted(tensors):  # what PEFT saves of a prompt it computes from the model itself
            adapter.model.save_pretrained(
                str(folder),
                selected_adapters=[name],
                state_dict=adapter.model.state_dict(),
                safe_serialization=True,
                save_embedding_layers=False,
            )
        (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's empty model card
        nested = folder / name  # where PEFT puts an adapter that is not called "default"
        for file in list(nested.glob("*")) if nested.is_dir() else ():
            file.rename(folder / file.name)
        if nested.is_dir():
            shutil.rmtree(folder / name.split("/")[0])
    else:
        save_file({k: t.cpu() for k, t in tensors.items()}, folder / MODEL_FILE)
