"""``kalman_state.safetensors``: the filter's state and the history of a fit, with the fingerprints of its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayes_kf.files.checksums import EDITABLE, digest
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.saving import base_fingerprint
from bayes_kf.inference.saving.adapter_files import adapter_settings
from bayes_kf.inference.saving.file_names import STATE_FILE
from bayes_kf.models.peft_adapters.adapter_tensors import active_adapter

FORMAT = 1
REQUIRED = ("names", "shapes", "base_fingerprint", "adapter", "step", "examples", "scaled", "scored", "noise_step")


def write_state(posterior: GaussianPosterior, folder: Path) -> None:
    """Write the state file of a posterior into ``folder``; the files that people may edit are there already."""
    save_file(_tensors(posterior), folder / STATE_FILE, metadata=_metadata(posterior, folder))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a state file.

    Raises:
        ValueError: if the file is damaged or of another format, or its posterior is not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(json.loads((file.metadata() or {})["bayes_kf"]))
            # a clone has torch's own memory alignment, on which the last bit of a product depends
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a readable {STATE_FILE}, got {path}: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"`folder` must be of format {FORMAT}, got {metadata.get('format')}; did a newer bayes_kf write it?"
        )
    missing = [name for name in REQUIRED if name not in metadata]
    if missing:
        raise ValueError(f"`folder` must hold a {STATE_FILE} with {', '.join(missing)}, got none in {path}.")
    for name, tensor in tensors.items():
        if name.startswith(("belief.", "prior.")) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`folder` must hold finite tensors, got NaN or infinity in {name} of {path}.")
    return tensors, metadata


def make_state(kf: KalmanFilter, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> FilterState:
    """The filter state of a file's tensors and metadata.

    Raises:
        TypeError, ValueError, AttributeError: if they do not fit the filter's settings.
    """
    state = FilterState(
        belief=kf.config.structure(**with_prefix(tensors, "belief.")),
        prior=DiagonalGaussian(**with_prefix(tensors, "prior.")),
        noise=NoiseState(step=metadata["noise_step"], **with_prefix(tensors, "noise.")),
        temperature_scores=_temperature_scores(metadata["scored"], with_prefix(tensors, "scores.")),
        prior_is_scaled=metadata["scaled"],
        step=metadata["step"],
        examples=metadata["examples"],
    )
    _check_tensors(kf, state)
    counts = (state.step, state.examples, state.noise.step, state.temperature_scores.updates)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"its counts are {counts}, not whole numbers >= 0")
    if type(state.prior_is_scaled) is not bool:
        raise ValueError(f"`scaled` is {state.prior_is_scaled!r}, not true or false")
    if not bool((state.belief.scales() > 0).all()) or not bool((state.prior.variance > 0).all()):
        raise ValueError("its variances are not positive")
    return state


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_tensors(kf: KalmanFilter, state: FilterState) -> None:
    """Raise ValueError if a tensor has another shape or type than in a state of this filter, or other constants."""
    empty = torch.empty(kf.adapter.num_parameters, dtype=kf.adapter.dtype, device="meta")
    start = DiagonalGaussian(empty, empty)
    parts = {"belief": (state.belief._asdict(), kf._prior_belief(start)._asdict())}
    parts |= {"prior": (state.prior._asdict(), start._asdict())}
    parts |= {
        "scores": (state.temperature_scores._asdict(), prequential_temperature.init(torch.device("cpu"))._asdict())
    }
    for part, (own, expected) in parts.items():
        for name, value in own.items():
            like = expected[name]
            if not isinstance(like, Tensor):
                continue
            if (value.shape, value.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{part}.{name} is {value.dtype} {tuple(value.shape)}, not {like.dtype} {tuple(like.shape)}"
                )
            is_constant = not like.is_meta and not like.is_floating_point()  # sizes of blocks, say
            if is_constant and not value.cpu().equal(like):
                raise ValueError(f"{part}.{name} is {value.tolist()}, not {like.tolist()}")


def _temperature_scores(updates: int, fields: dict[str, Tensor]) -> TemperatureState:
    """The log losses by temperature; folders without ``differences`` keep the temperature they were saved with."""
    empty = prequential_temperature.init(next(iter(fields.values())).device if fields else torch.device("cpu"))
    return TemperatureState(updates, **{"differences": empty.differences} | fields)


def _tensors(posterior: GaussianPosterior) -> dict[str, Tensor]:
    """All tensors of the state and the history, and samples of initialized weights, under dotted names."""
    state = posterior.state
    parts: dict[str, Any] = {f"belief.{k}": v for k, v in state.belief._asdict().items()}
    parts |= {f"prior.{k}": v for k, v in state.prior._asdict().items()}
    parts |= {f"noise.{k}": v for k, v in state.noise._asdict().items()}
    parts |= {f"scores.{k}": v for k, v in state.temperature_scores._asdict().items()}
    parts |= {f"history.{k}": v for k, v in posterior.history.items()}
    parts |= base_fingerprint.initialized_samples(posterior.adapter)
    return {k: v.detach().cpu().clone().contiguous() for k, v in parts.items() if isinstance(v, Tensor)}


def _metadata(posterior: GaussianPosterior, folder: Path) -> dict[str, str]:
    """Counts, the model's fingerprints, and digests of the files in ``folder`` that people may edit."""
    state, adapter = posterior.state, posterior.adapter
    values = {
        "format": FORMAT,
        "names": list(adapter.names),
        "shapes": [list(shape) for shape in adapter.shapes],
        **base_fingerprint.fingerprints(adapter),
        "adapter": active_adapter(adapter.model),
        "adapter_settings": adapter_settings(adapter.model),
        "step": state.step,
        "examples": state.examples,
        "scaled": state.prior_is_scaled,
        "scored": state.temperature_scores.updates,
        "noise_step": state.noise.step,
        "editable": {name: digest(folder / name) for name in EDITABLE if (folder / name).is_file()},
    }
    return {"bayes_kf": json.dumps(values)}
