"""A posterior as a folder: a plain PEFT adapter (the mean), the settings and the filter's state.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, or ``model.safetensors``
with the trainable tensors if the module is no PEFT model; ``kalman_config.json`` and ``kalman_state.safetensors``; a
model card, ``README.md``; and checksums, ``SHA256SUMS``. All files are JSON, text or safetensors. They are written as
one: if the process is killed, the folder opens as the old or the new posterior. Files that the package did not write
stay as they are (:mod:`bayes_kf.files.atomic_folder`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.files.atomic_folder import check_target, read_consistently, recover, write_files
from bayes_kf.files.checksums import (
    CHECKSUMS_FILE,
    digest,
    is_listed,
    verify_checksums,
    write_checksums,
    write_digests,
)
from bayes_kf.inference.config import CONFIG_FILE, KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior, as_training_series
from bayes_kf.inference.saving import model_card
from bayes_kf.inference.saving.adapter_files import find_or_attach, write_adapter
from bayes_kf.inference.saving.base_fingerprint import BaseSnapshot
from bayes_kf.inference.saving.file_names import (
    ADAPTER_FILES,
    CARD_FILE,
    DRAWS,
    DRAWS_FILE,
    MIXTURE_FILE,
    MODEL_FILE,
    POSTERIOR,
    STATE_FILE,
    member_folder,
    mixture_files,
)
from bayes_kf.inference.saving.state_file import make_state, read_state, with_prefix, write_state
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.peft_adapters.in_use import is_peft

MIXTURE_FORMAT = 1
DRAWS_FORMAT = 1
Loaded = tuple[KalmanFilter, FilterState, dict[str, Tensor]]  # the fields of a GaussianPosterior


def save(
    posterior: GaussianPosterior,
    folder: Path,
    scores: Mapping[str, float] | None = None,
    write_more: Callable[[Path], None] | None = None,
    num_members: int = 1,
) -> None:
    """Write a posterior into ``folder`` and replace the posterior that is there; see :meth:`Posterior.save_pretrained`.

    Args:
        posterior: the posterior.
        folder: made if missing.
        scores: of an evaluation, for the model card.
        write_more: writes further files of the posterior into a folder.
        num_members: of the mixture whose best member the posterior is.
    """

    def write(target: Path) -> None:
        write_adapter(posterior.adapter, posterior.mean_vector, target)
        _write_posterior(posterior, target, folder.resolve().name, scores, num_members)
        if write_more is not None:
            write_more(target)
        write_checksums(target)

    write_files(folder, write, POSTERIOR)


def save_with(
    posterior: GaussianPosterior,
    folder: Path,
    write_others: Callable[[Path], None],
    write_more: Callable[[Path], None] | None = None,
    num_members: int = 1,
) -> None:
    """Write settings, state and model card together with the files of another library.

    Those files replace any files of their names, as that library does; but an edited ``README.md`` stays.

    Args:
        posterior: the posterior.
        folder: made if missing.
        write_others: writes the adapter, at the posterior mean, and other files into a folder.
        write_more: as for :func:`save`.
        num_members: as for :func:`save`.
    """

    def write(target: Path) -> None:
        write_others(target)
        _write_posterior(posterior, target, folder.resolve().name, num_members=num_members)  # over PEFT's empty card
        if write_more is not None:
            write_more(target)
        weights = [name for name in ADAPTER_FILES[1:] if (target / name).is_file()]
        write_checksums(target, (CONFIG_FILE, *weights, *mixture_files(target, num_members), STATE_FILE))

    own = (STATE_FILE, CONFIG_FILE, CHECKSUMS_FILE, CARD_FILE, MIXTURE_FILE)
    write_files(folder, write, replace(POSTERIOR, overwrites=lambda name: name not in own and "/" not in name))


def save_mixture(
    members: Sequence[GaussianPosterior],
    weights: Sequence[float],
    folder: Path,
    scores: Mapping[str, float] | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write the members of a mixture: the first as :func:`save` does, the others in folders of their own.

    Args:
        members: K posteriors of one model.
        weights: K numbers.
        folder: made if missing.
        scores: of an evaluation, for the model card.
        write_more: writes further files of the mixture into a folder.
    """
    write_members = _members_writer(members, weights)

    def write_others(target: Path) -> None:
        write_members(target)
        if write_more is not None:
            write_more(target)

    save(members[0], folder, scores, write_others, len(members))


def save_mixture_with(
    members: Sequence[GaussianPosterior],
    weights: Sequence[float],
    folder: Path,
    write_others: Callable[[Path], None],
) -> None:
    """As :func:`save_with`, for a mixture; the adapter that ``write_others`` writes is at the first member's mean."""
    save_with(members[0], folder, write_others, _members_writer(members, weights), len(members))


def _members_writer(members: Sequence[GaussianPosterior], weights: Sequence[float]) -> Callable[[Path], None]:
    """A function that writes all members but the first, and the weights, into a folder."""

    def write_members(target: Path) -> None:
        for number, member in enumerate(members[1:], 1):
            part = target / member_folder(number)
            write_adapter(member.adapter, member.mean_vector, part)
            (part / CONFIG_FILE).write_text(member.config._as_json(), encoding="utf-8")
            write_state(member, part)
        content = {"format": MIXTURE_FORMAT, "weights": list(weights)}
        (target / MIXTURE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    return write_members


def export_draws(posterior: GaussianPosterior, folder: Path, draws: Tensor, width: float = 1.0) -> list[Path]:
    """Write each draw (S, n) as a PEFT adapter ``draw_0``, ``draw_1``, ... and return their folders.

    ``draws.json`` lists them, with the width that they were drawn with and the softmax temperature.
    """
    if not is_peft(posterior.adapter.model):
        raise ValueError("`export_adapters` needs a posterior over a PEFT model, got another module.")

    def write(target: Path) -> None:
        names, folders = [DRAWS_FILE], [f"draw_{index}" for index in range(len(draws))]
        manifest = {
            "format": DRAWS_FORMAT,
            "adapters": folders,
            "width": width,
            "softmax_temperature": posterior.softmax_temperature,
            "base_model": str(getattr(posterior.adapter.model.get_base_model(), "name_or_path", "")),  # type: ignore[operator]
        }
        (target / DRAWS_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for index, draw in enumerate(draws):
            write_adapter(posterior.adapter, draw, target / f"draw_{index}")
            names += [f"draw_{index}/{name}" for name in ADAPTER_FILES]
        write_digests(target / DRAWS.checksums, {name: digest(target / name) for name in names})

    write_files(folder, write, DRAWS)
    return [folder / f"draw_{index}" for index in range(len(draws))]


def check_folder(folder: Path, *, of_peft: bool, names: Sequence[str] = ()) -> None:
    """Complete or remove a save into ``folder`` that was killed, and check that a posterior can be saved there.

    Args:
        folder: it may be missing.
        of_peft: whether the model is a PEFT model.
        names: further files of the posterior.

    Raises:
        ValueError: if a file is in the way that the package did not write.
    """
    recover(folder)
    weights = ADAPTER_FILES[1] if of_peft else MODEL_FILE
    check_target(folder, (STATE_FILE, CONFIG_FILE, weights, *names), POSTERIOR)


class LoadedPosterior(NamedTuple):
    """The members of a saved posterior, and their weights.

    Attributes:
        members: one unless it is a mixture.
        weights: of the members of a mixture; None for any other posterior.
    """

    members: list[Loaded]
    weights: list[float] | None


def load(folder: Path, base_model: nn.Module) -> LoadedPosterior:
    """Filter, state and history of every member of a saved posterior; see :meth:`Posterior.from_pretrained`.

    Args:
        folder: the posterior's.
        base_model: with or without its adapter; it is changed only after everything has been checked.
    """
    if not isinstance(base_model, nn.Module):
        got = repr(base_model) if isinstance(base_model, str) else type(base_model).__name__
        raise ValueError(f"`base_model` must be the model itself, a torch module that you loaded, got {got}.")
    snapshot = BaseSnapshot(base_model)

    def read(source: Path) -> LoadedPosterior:
        try:
            weights = _read_weights(source)
            first = _load(source, base_model, snapshot)
            others = [
                _load_member(source / member_folder(k), first[0].adapter) for k in range(1, len(weights or [1.0]))
            ]
        except BaseException:
            snapshot.restore()
            raise
        return LoadedPosterior([first, *others], weights)

    return read_consistently(folder, read, lambda loaded: snapshot.restore())


def _read_weights(folder: Path) -> list[float] | None:
    """The weights of a mixture's members; None for a posterior that is no mixture.

    Raises:
        ValueError: if the file is damaged or of another version.
    """
    if not is_listed(folder, MIXTURE_FILE):
        return None
    path = folder / MIXTURE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, weights = content["format"], content["weights"]
        valid = isinstance(weights, list) and len(weights) > 0 and all(type(w) is float and w > 0.0 for w in weights)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"`folder` must hold a readable {MIXTURE_FILE}, got {path}: {error}.") from error
    if version != MIXTURE_FORMAT:
        raise ValueError(
            f"`folder` must hold a mixture of format {MIXTURE_FORMAT}, got {version}; did a newer bayes_kf write it?"
        )
    if not valid or abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"`folder` must hold positive weights that add up to 1 in {path}, got {weights}.")
    return weights


def _write_posterior(
    posterior: GaussianPosterior,
    folder: Path,
    name: str,
    scores: Mapping[str, float] | None = None,
    num_members: int = 1,
) -> None:
    """Settings, model card and state; the card calls the folder ``name``."""
    (folder / CONFIG_FILE).write_text(posterior.config._as_json(), encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card.text(posterior, name, scores, num_members), encoding="utf-8")
    write_state(posterior, folder)


def _load(folder: Path, base_model: nn.Module, snapshot: BaseSnapshot) -> Loaded:
    config = KalmanConfig.from_pretrained(folder)
    tensors, metadata = read_state(folder / STATE_FILE)
    verify_checksums(folder)
    adapter = find_or_attach(folder, base_model, metadata, tensors, snapshot)
    if list(adapter.names) != metadata["names"] or [list(s) for s in adapter.shapes] != metadata["shapes"]:
        raise ValueError(f"`base_model` must have the trainable tensors of {folder}, got others.")
    return _loaded(folder, adapter, config, tensors, metadata)


def _load_member(folder: Path, adapter: AdapterModel) -> Loaded:
    """A further member of a mixture, over the adapter of the first; its checksums have been verified."""
    config = KalmanConfig.from_pretrained(folder)
    tensors, metadata = read_state(folder / STATE_FILE)
    if list(adapter.names) != metadata["names"] or [list(s) for s in adapter.shapes] != metadata["shapes"]:
        raise ValueError(f"`folder` must hold members over the same tensors, got others in {folder}.")
    return _loaded(folder, adapter, config, tensors, metadata)


def _loaded(
    folder: Path, adapter: AdapterModel, config: KalmanConfig, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> Loaded:
    """Filter, state and history of the files that were read from ``folder``."""
    tensors = {name: t.to(adapter.device) if not name.startswith("history.") else t for name, t in tensors.items()}
    history = with_prefix(tensors, "history.")
    kf = KalmanFilter(adapter, config)
    try:
        state = make_state(kf, tensors, metadata)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`folder` must hold a state that fits its settings, got {folder / STATE_FILE}: {error}."
        ) from error
    if state.examples and torch.equal(state.belief.mean, state.prior.mean):  # fitted with `start` "trained"
        history = as_training_series(history)  # an earlier version saved these series under the names of a stream
    return kf, state, history
