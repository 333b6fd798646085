"""The last steps of a fit: the size of each covariance and the sharpness of predictions, set by held-out data.

The size comes first, from the joint likelihood (:mod:`.covariance_size`); then the sharpness, at that size, from single
examples (:mod:`.sharpness`). Each asks its own question, so that neither makes up for the other: a covariance that is
too wide is not hidden by sharp logits, nor a mean that is too sure by a wide covariance.

An estimated σ² of a Gaussian likelihood is chosen together with the size (:mod:`.noise_and_size`); under dynamics it is
estimated again from the held-out residuals, before and after the size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayes_kf.inference.heldout import noise_and_size
from bayes_kf.inference.heldout.choice import Choice
from bayes_kf.inference.heldout.covariance_size import STANDARD_ERRORS, choose_common_size, is_static, with_size
from bayes_kf.inference.heldout.heldout_examples import JOINT_CLASSES, heldout_outputs, thinned
from bayes_kf.inference.heldout.residual_noise import with_heldout_noise
from bayes_kf.inference.heldout.sharpness import choose_sharpness
from bayes_kf.inference.heldout.text_size import choose_text_size
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Inputs
from bayes_kf.processes.launched import working_together
from bayes_kf.processes.whole_loader import whole_loader

SIZE_EXAMPLES = 512  # the most that choose a size
SIZE_BYTES = 2**31  # of their Jacobians, which are all in memory

P = TypeVar("P", bound=GaussianPosterior)


def calibrate(
    members: Sequence[P],
    weights: Sequence[float],
    loader: Iterable[Any],
    *,
    standard_errors: float = STANDARD_ERRORS,
    stacklevel: int = 3,
) -> list[P]:
    """The members with the sizes and the one sharpness that held-out data choose; see :meth:`Posterior.calibrate`.

    Args:
        members: posteriors of one model and one likelihood.
        weights: of the members, which add up to 1.
        loader: batches with targets that the members were not fitted on.
        standard_errors: as for :func:`.covariance_size.choose_size`; not used where σ² is chosen with the size.
        stacklevel: of warnings about values at an end of what was tried.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    with working_together("calibrate"):
        return _calibrated(members, weights, loader, standard_errors, stacklevel + 1)


def _calibrated(
    members: Sequence[P], weights: Sequence[float], loader: Iterable[Any], standard_errors: float, stacklevel: int
) -> list[P]:
    """:func:`calibrate` of processes that share the work."""
    batches = reiterable(loader)
    few = thinned(members[0], batches, _most_examples(members[0]))
    sized, notes = list[P](), list[str | None]()
    for member in members:
        posterior, size = _with_chosen_size(member, few, batches, standard_errors)
        sized.append(posterior)
        notes.append(edge_of_size(size, is_static(member.config.dynamics_settings)))
    if members[0].config.likelihood == "categorical":
        sized, sharpness = _with_chosen_sharpness(sized, weights, batches)
        notes.append(edge_of_sharpness(sharpness))
    warn(notes, stacklevel + 1)
    return sized


def calibrate_sharpness(members: Sequence[P], weights: Sequence[float], loader: Iterable[Any]) -> list[P]:
    """The members with the one sharpness of held-out data at their present covariances; arguments as for ``calibrate``.

    Raises:
        ValueError: if the likelihood has no softmax, the loader yields nothing, or a batch has no targets or does not
            fit.
    """
    if members[0].config.likelihood != "categorical":
        raise ValueError(f"`calibrate_softmax` needs `likelihood` 'categorical', got {members[0].config.likelihood!r}.")
    with working_together("calibrate_softmax"):
        sharp, sharpness = _with_chosen_sharpness(members, weights, reiterable(loader))
    warn([edge_of_sharpness(sharpness)], 4)
    return sharp


def edge_of_size(size: Choice, static: bool = True) -> str | None:
    """The warning about a size at the end of what was tried; None for another.

    Args:
        size: the choice.
        static: whether it is a factor on the precision of the prior, not the temperature 1/s.
    """
    if not size.at_edge:
        return None
    if size.value < 1.0:  # only where σ² is chosen with it
        return (
            f"the size chosen is {size.value:g}, the smallest that was tried: the covariance is too small for the "
            "errors of the held-out examples. Fit with a wider prior (`initial_logit_sd`)."
        )
    value = f"size chosen is {size.value:g}, the largest"
    if not static:
        value = f"temperature chosen is {1.0 / size.value:g}, the smallest"
    return (
        f"the {value} that was tried: predictions are close to those of the mean alone. Fit with a narrower prior "
        "(`initial_logit_sd`), or give more held-out examples."
    )


def edge_of_sharpness(sharpness: Choice) -> str | None:
    """The warning about a sharpness at an end of what was tried; None for another."""
    if not sharpness.at_edge:
        return None
    if sharpness.value < 1.0:
        end, advice = "smallest", "The mean is far less sure than held-out examples justify: fit it for more passes."
    else:
        end, advice = "largest", "The mean hardly predicts the held-out examples: check their labels."
    return f"the softmax temperature chosen is {sharpness.value:g}, the {end} that was tried. {advice}"


def warn(notes: Iterable[str | None], stacklevel: int) -> None:
    """Warn of each note that is not None."""
    for note in notes:
        if note is not None:
            warnings.warn(note, stacklevel=stacklevel)


def with_given_size(posterior: P, size: float) -> P:
    """The posterior with a size that no data chose: ``history["size"]`` holds it without an interval."""
    added = {"size": torch.tensor([size], dtype=torch.float64)}
    return replace(with_size(posterior, size), history=posterior.history | added)


def at_size_1(posterior: P) -> P:
    """The posterior without the size that ``history["size"]`` says it has, so that a new choice does not add to it."""
    static = is_static(posterior.config.dynamics_settings)
    present = float(posterior.history["size"][0]) if static and "size" in posterior.history else 1.0
    return with_size(posterior, 1.0 / present)


def _with_chosen_size(
    posterior: P, few: Sequence[tuple[Inputs, Tensor]], batches: Iterable[Any], standard_errors: float
) -> tuple[P, Choice]:
    """The posterior with the size that a few held-out examples choose, and the σ² of all where it is estimated."""
    estimated = posterior.config.noise_variance == "estimated" and posterior.config.likelihood == "gaussian"
    present = posterior.state.noise.variance
    start = at_size_1(posterior)
    if noise_and_size.chooses_noise(start):
        chosen = noise_and_size.choose_noise_and_size(start, few)
        sized, size = noise_and_size.with_noise_and_size(start, chosen), chosen.size
    else:  # under dynamics, σ² does not say how large the data's share of the precision is
        if estimated:
            start = with_heldout_noise(start, batches, present)
        size = common_size([(start, few)], standard_errors)
        sized = with_size(start, size.value)
        if estimated:
            sized = with_heldout_noise(sized, batches, present)
    return replace(sized, history=posterior.history | {"size": size.as_tensor()}), size


def common_size(
    pairs: Sequence[tuple[GaussianPosterior, Sequence[tuple[Inputs, Tensor]]]], standard_errors: float = STANDARD_ERRORS
) -> Choice:
    """One size for posteriors under the same settings, by the joint likelihood of held-out examples or of text.

    Args:
        pairs: a posterior at the size 1, and batches that it was not fitted on.
        standard_errors: as for :func:`.covariance_size.choose_size`; not used for text.
    """
    if pairs[0][0].config.likelihood == "tokens":
        return choose_text_size(pairs)
    return choose_common_size(pairs, standard_errors)


def _with_chosen_sharpness(
    members: Sequence[P], weights: Sequence[float], batches: Iterable[Any]
) -> tuple[list[P], Choice]:
    """The members with the sharpness that held-out data choose for their mixture, and the choice."""
    chosen = choose_sharpness([heldout_outputs(member, batches) for member in members], weights=weights)
    added = {"sharpness": chosen.as_tensor()}
    sharp = [member.with_settings(softmax_temperature=chosen.value) for member in members]
    return [replace(member, history=member.history | added) for member in sharp], chosen


def reiterable(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, or its batches in a list if it can be iterated only once."""
    loader = whole_loader(loader)
    return list(loader) if isinstance(loader, Iterator) else loader


def _most_examples(posterior: GaussianPosterior) -> int:
    """The most examples that choose a size: ``SIZE_EXAMPLES``, or fewer of a large adapter."""
    each = (JOINT_CLASSES + 2) * posterior.adapter.num_parameters * posterior.adapter.dtype.itemsize
    return max(1, min(SIZE_EXAMPLES, SIZE_BYTES // each))
