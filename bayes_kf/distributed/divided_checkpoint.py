"""Checkpoints of a belief that processes divide: each writes and reads its own rows, so no process needs the whole.

A folder holds ``divided.json`` (counts, settings, the model's fingerprints) and one folder of safetensors files, which
``torch.distributed.checkpoint`` writes and reads, also on another number of processes. A new checkpoint gets a folder
of its own; ``divided.json`` names it once it is complete, and then the older one is removed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata

from bayes_kf.distributed.parameter_shards import ParameterShards
from bayes_kf.files.staging import staging
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.prequential_temperature import TemperatureState
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.inference.saving import base_fingerprint
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.processes.process_group import Group

FORMAT = 1
INDEX, PART, AGAIN = "divided.json", "divided-{step}", "-again"  # the last: a second state of the same step
SHARDS = "shard-*.safetensors"  # the files that torch writes into a part
COUNTS = ("step", "examples", "scaled", "scored", "noise_step")
DTYPES = {"float32": torch.float32, "float64": torch.float64}  # of estimated noise
ADDED_UP = ("gram",)  # a tensor of the belief that is the same on all processes


class Divided(Protocol):
    """What a filter whose belief is divided has."""

    group: Group
    config: KalmanConfig
    kf: KalmanFilter
    adapter: AdapterModel
    parameter_shards: ParameterShards


def save(kf: Divided, state: FilterState, folder: str | Path) -> None:
    """Save the state whose shards the processes hold; all of them call this.

    Args:
        kf: the filter.
        state: this process's shard.
        folder: new, or with an earlier checkpoint, which is replaced; other files in it are not changed. All processes
            must see it.

    Raises:
        ValueError: on the first process, if other files are in the way.
        OSError: if a file cannot be written; the earlier checkpoint stays.
        OtherProcessError: on the other processes, in these cases.
    """
    folder, index = Path(folder), _index(kf, state)
    part, is_first = PART.format(step=state.step), kf.group.rank == 0
    before: list[str] = []

    def find() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            before.append(_read_index(folder)["part"])

    def prepare() -> None:
        _remove(folder / part)  # of a save that was killed
        (folder / part).mkdir()  # an error if something else has that name

    _together(kf, find if is_first else None)
    if kf.group.numbers_of_first([int(before == [part])])[0]:
        part += AGAIN  # the one that is there stays until this one is complete
    _together(kf, prepare if is_first else None)
    tensors = _tensors(kf, state)
    writer = dcp.HuggingFaceStorageWriter(str(folder / part), save_distributed=True)
    _together(kf, lambda: _quietly(lambda: dcp.save(tensors, storage_writer=writer, process_group=kf.group.group)))

    def publish() -> None:
        with staging(folder) as stage:
            (stage / INDEX).write_text(json.dumps(index | {"part": part}, indent=2) + "\n", encoding="utf-8")
            (stage / INDEX).replace(folder / INDEX)
        for old in before:
            _remove(folder / old)

    _together(kf, publish if is_first else None)


def _remove(part: Path) -> None:
    """Remove the files of a checkpoint, and its folder if nothing else is in it."""
    if part.is_dir() and not part.is_symlink():
        for file in part.glob(SHARDS):
            file.unlink()
        with suppress(OSError):
            part.rmdir()


def load(kf: Divided, folder: str | Path) -> FilterState:
    """This process's shard of a saved state, of any number of processes; all of them call this.

    Args:
        kf: the filter, with the model and settings of the checkpoint.
        folder: as :func:`save` wrote it.

    Raises:
        ValueError: if the folder has no complete checkpoint, or one of another model or other settings.
        OtherProcessError: if only another process finds that.
    """
    folder, indices = Path(folder), list[dict[str, Any]]()
    _together(kf, lambda: indices.append(_checked_index(kf, folder)))
    index = indices[0]
    kf.group.check_equal("the checkpoint in `folder`", index)
    state = _empty(kf, index)
    tensors = _tensors(kf, state)
    reader = dcp.HuggingFaceStorageReader(str(folder / index["part"]))
    _together(kf, lambda: _quietly(lambda: dcp.load(tensors, storage_reader=reader, process_group=kf.group.group)))
    return state


def exists(folder: str | Path) -> bool:
    """Whether a folder holds a complete checkpoint."""
    return (Path(folder) / INDEX).is_file()


def _index(kf: Divided, state: FilterState) -> dict[str, Any]:
    """What ``divided.json`` says, but for the folder's name."""
    counts = state.step, state.examples, state.prior_is_scaled, state.temperature_scores.updates, state.noise.step
    return {
        "format": FORMAT,
        **dict(zip(COUNTS, counts, strict=True)),
        "noise": {name: _kind(value) for name, value in state.noise._asdict().items() if isinstance(value, Tensor)},
        **_identity(kf),
    }


def _identity(kf: Divided) -> dict[str, Any]:
    """What a checkpoint has in common with the filter that loads it."""
    names, shapes = list(kf.adapter.names), [list(shape) for shape in kf.adapter.shapes]
    base = base_fingerprint.fingerprint(kf.adapter.model, set(kf.adapter.names))
    return {"names": names, "shapes": shapes, "base_fingerprint": base, "config": json.loads(kf.config._as_json())}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        good = index["format"] == FORMAT and index["part"].removesuffix(AGAIN) == PART.format(step=int(index["step"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a readable {INDEX}, got {folder}: {error}.") from error
    if not good:
        raise ValueError(f"`folder` must hold a {INDEX} of format {FORMAT}, got another in {folder}.")
    return index


def _checked_index(kf: Divided, folder: Path) -> dict[str, Any]:
    index = _read_index(folder)
    for name, wanted in _identity(kf).items():
        if index.get(name) != wanted:
            what = "config" if name == "config" else "model"
            raise ValueError(f"`folder` must hold a checkpoint of this {what}, got another {name} in {folder}.")
    counted = [name for name in COUNTS if name != "scaled"]
    good = all(type(index.get(name)) is int and index[name] >= 0 for name in counted)
    if not good or type(index.get("scaled")) is not bool or not isinstance(index.get("noise"), dict):
        raise ValueError(f"`folder` must hold a {INDEX} with counts, got {folder} without.")
    if not (folder / index["part"]).is_dir():
        raise ValueError(f"`folder` must hold {index['part']}, which its {INDEX} names, got none in {folder}.")
    return index


def _empty(kf: Divided, index: dict[str, Any]) -> FilterState:
    """A shard of the right shapes, whose tensors are to be filled."""
    own = torch.ones(kf.parameter_shards.num_own, dtype=kf.adapter.dtype, device=kf.adapter.device)
    prior = DiagonalGaussian(own, own.clone())
    belief = kf.kf._prior_belief(DiagonalGaussian(own.clone(), own.clone()))
    scores = prequential_temperature.init(own.device)
    noise = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in index["noise"].items()}
    noise_state = NoiseState(step=index["noise_step"], **noise)
    scored = TemperatureState(index["scored"], **{k: v for k, v in scores._asdict().items() if k != "updates"})
    return FilterState(belief, prior, noise_state, scored, index["scaled"], index["step"], index["examples"])


def _kind(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _tensors(kf: Divided, state: FilterState) -> dict[str, Any]:
    """All tensors of a state by name; divided ones tensor by tensor of the model, as this process's rows of each."""
    tensors: dict[str, Any] = {}
    parts = {"belief": state.belief._asdict(), "prior": state.prior._asdict()}
    for part, fields in parts.items():
        for name, value in fields.items():
            if name in ADDED_UP:
                tensors[f"{part}.{name}"] = value
            elif isinstance(value, Tensor):
                tensors |= dict(_rows(kf, f"{part}.{name}", value))
    others = {"noise": state.noise._asdict(), "scores": state.temperature_scores._asdict()}
    for part, fields in others.items():
        tensors |= {f"{part}.{name}": value for name, value in fields.items() if isinstance(value, Tensor)}
    return tensors


def _rows(kf: Divided, field: str, shard: Tensor) -> Iterator[tuple[str, ShardedTensor]]:
    """This process's rows of every tensor of the model, as views of its shard (own, ...)."""
    own, first = kf.parameter_shards.slices[kf.group.rank], 0
    place = f"rank:{kf.group.rank}/{shard.device}"
    places = zip(kf.adapter.names, kf.adapter.shapes, kf.adapter.slices().values(), own, strict=True)
    for name, shape, where, piece in places:
        rows = shape[0] if len(shape) else 1
        width = (where.stop - where.start) // max(rows, 1)
        number, numbers = (piece.stop - piece.start) // max(width, 1), shard[:1].numel() * width
        local = shard[first : first + piece.stop - piece.start].view(number, numbers)
        first += piece.stop - piece.start
        offset = (piece.start - where.start) // max(width, 1)
        metadata = ShardMetadata(shard_offsets=[offset, 0], shard_sizes=[number, numbers], placement=place)
        shards = [Shard(local, metadata)] if number else []
        yield f"{field}/{name}", _quietly(partial(ShardedTensor._init_from_local_shards, shards, rows, numbers))


def _together(kf: Divided, call: Callable[[], Any] | None) -> None:
    """Make a call, or none, in this process; all raise an error if one does."""
    failure: Exception | None = None
    try:
        if call is not None:
            call()
    except dcp.api.CheckpointException as raised:  # of all processes; its base class is BaseException
        reasons = [wrapped[0] for wrapped in raised.failures.values()]
        kind = OSError if any(isinstance(reason, OSError) for reason in reasons) else ValueError
        failure = kind(f"the checkpoint could not be written or read: {reasons[0]}")
    except Exception as raised:  # of any kind, or the other processes would wait for this one
        failure = raised
    kf.group.raise_together(failure)


def _quietly(call: Callable[[], Any]) -> Any:
    """The result of a call, without torch's warnings about its own classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()
