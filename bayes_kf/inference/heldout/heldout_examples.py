"""Held-out examples, linearized at a posterior's mean: jointly, in blocks, and each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.inference.covariance.gaussian_sampling import semidefinite
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.measurement_model import predictive_density
from bayes_kf.inference.measurement_model.output_directions import MASKED_LOGIT, project_outputs
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.linearized_prediction import (
    output_deviations,
    parameter_draws_are_cheaper,
    required_targets,
)
from bayes_kf.models.batch import Batch, Inputs, split_batch
from bayes_kf.models.likelihood import Likelihood
from bayes_kf.processes import shared_work

NUM_DRAWS = 64  # parameter draws that stand for the covariance of more outputs than that
BLOCK_EXAMPLES = 64  # of a block; below about 50 a joint likelihood says little about the size of a covariance
BLOCK_BYTES = 2**29  # of a block's Jacobian; blocks of large adapters have fewer examples
JOINT_CLASSES = 5  # the most probable classes that a block keeps apart; the others are one class


class HeldoutBlock(NamedTuple):
    """Examples whose outputs are correlated through the parameters.

    Attributes:
        family: likelihood of the targets given the outputs.
        outputs: N examples of c outputs at the posterior mean, (N, c).
        targets: as the likelihood's ``check`` returns them.
        jacobian: of these outputs.
    """

    family: Likelihood
    outputs: Tensor
    targets: Tensor
    jacobian: Jacobian


@dataclass(frozen=True)
class HeldoutOutputs:
    """The outputs η ~ N(f, C) of each held-out example by itself.

    Attributes:
        family: the likelihood.
        outputs: f, (N, m).
        covariance: C, (N, m, m); None if ``root`` stands for it.
        root: RᵀR = C with R (N, r, m); None if ``covariance`` is there.
        targets: as the likelihood's ``check`` returns them.
    """

    family: Likelihood
    outputs: Tensor
    covariance: Tensor | None
    root: Tensor | None
    targets: Tensor

    def log_loss(self, divisor: float = 1.0) -> Tensor:
        """−log E p(y | η / divisor) of each example, (N,) in nats, float64, on the CPU."""
        outputs, root = self.outputs / divisor, self._root if self.root is None else self.root
        if root is not None:
            losses = predictive_density.root_log_loss(self.family, outputs, root / divisor, self.targets, [1.0])
        else:
            assert self.covariance is not None
            covariance = self.covariance / divisor**2
            losses = predictive_density.log_loss(self.family, outputs, covariance, self.targets, [1.0])
        return losses[0].double().cpu()

    @cached_property
    def _root(self) -> Tensor | None:
        """A root of the covariance where draws are taken, once for all divisors."""
        if self.covariance is None or not predictive_density.is_sampled(self.family, self.outputs.shape[1]):
            return None
        return predictive_density.square_root(self.covariance).to(self.outputs)

    @classmethod
    def joined(cls, parts: Sequence[HeldoutOutputs]) -> HeldoutOutputs:
        """The examples of several, whose outputs have one size and one kind of covariance."""
        first = parts[0]
        has_covariance, has_root = first.covariance is not None, first.root is not None
        return cls(
            first.family,
            torch.cat([part.outputs for part in parts]),
            torch.cat([part.covariance for part in parts if part.covariance is not None]) if has_covariance else None,
            torch.cat([part.root for part in parts if part.root is not None]) if has_root else None,
            torch.cat([part.targets for part in parts]),
        )


def heldout_batches(posterior: GaussianPosterior, loader: Iterable[Any]) -> Iterator[Batch]:
    """Every batch, with targets, on the model's device.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    index = -1
    for index, batch in enumerate(shared_work.same_batches(loader)):
        inputs, targets = split_batch(posterior.adapter.read(batch))
        if targets is None:
            raise ValueError(f"`loader` must yield targets with every batch, got none in batch {index}.")
        if not isinstance(targets, Tensor):
            raise ValueError(f"`loader` must yield targets as tensors, got {type(targets).__name__}.")
        yield Batch.checked(inputs, targets, posterior.adapter.device)
    if index < 0:
        raise ValueError("`loader` must yield at least one batch, got none.")


def thinned(posterior: GaussianPosterior, loader: Iterable[Any], most: int) -> list[tuple[Inputs, Tensor]]:
    """Every k-th example of the batches, with the least k that leaves at most ``most``.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    step = -(-sum(batch.size for batch in heldout_batches(posterior, loader)) // most)
    kept, before = list[tuple[Inputs, Tensor]](), 0
    for batch in heldout_batches(posterior, loader):
        which = torch.arange(batch.size, device=batch.device)[-before % step :: step]
        before += batch.size
        if len(which):
            some = batch if step == 1 else batch[which]
            kept.append((some.inputs, some.required_targets))
    return kept


def heldout_outputs(posterior: GaussianPosterior, loader: Iterable[Any]) -> HeldoutOutputs:
    """The outputs of every held-out example, with the posterior's temperature but without its softmax temperature."""
    return heldout_outputs_of([posterior], loader)[0]


def heldout_outputs_of(posteriors: Sequence[GaussianPosterior], loader: Iterable[Any]) -> list[HeldoutOutputs]:
    """:func:`heldout_outputs` of posteriors with one mean and different covariances; Jacobians are taken once."""
    first, family = posteriors[0], posteriors[0].likelihood
    outputs, targets = list[Tensor](), list[Tensor]()
    spreads: list[list[Tensor]] = [[] for _ in posteriors]  # covariances, or roots of them
    by_draws: bool | None = None
    with first.adapter.full_precision():
        for batch in heldout_batches(first, loader):
            if by_draws is None:
                by_draws = parameter_draws_are_cheaper(first, batch, NUM_DRAWS * len(posteriors))
            for chunk, at_mean, spread in _by_draws(posteriors, batch) if by_draws else _covariances(posteriors, batch):
                outputs.append(at_mean)
                targets.append(chunk.required_targets)
                for parts, part in zip(spreads, spread, strict=True):
                    parts.append(part)
    joined = torch.cat(outputs)
    checked = family.check(joined, torch.cat(targets))
    spread = [torch.cat(parts) for parts in spreads]
    if by_draws:
        return [
            HeldoutOutputs(p.likelihood, joined, None, root, checked)
            for p, root in zip(posteriors, spread, strict=True)
        ]
    return [
        HeldoutOutputs(p.likelihood, joined, semidefinite(covariance), None, checked)
        for p, covariance in zip(posteriors, spread, strict=True)
    ]


def _covariances(posteriors: Sequence[GaussianPosterior], batch: Batch) -> Iterator[tuple[Batch, Tensor, list[Tensor]]]:
    """Examples, their outputs (b, m), and T·J P Jᵀ (b, m, m) of each posterior, a chunk at a time."""
    linearize, mean = posteriors[0].kf.linearize, posteriors[0].mean_vector
    for _, chunk in linearize.chunks(mean, batch):
        linearized = linearize(mean, chunk)
        jacobian = linearized.jacobian()
        yield (
            chunk,
            linearized.outputs,
            [p.temperature * p.state.belief.output_covariance(jacobian) for p in posteriors],
        )


def _by_draws(posteriors: Sequence[GaussianPosterior], batch: Batch) -> Iterator[tuple[Batch, Tensor, list[Tensor]]]:
    """A batch, its outputs (B, m), and a root (B, S, m) of the covariance of each posterior from S parameter draws."""
    roots = []
    for posterior in posteriors:
        deviations = output_deviations(posterior, batch, NUM_DRAWS, posterior.generator(), posterior.temperature)
        roots.append((deviations / NUM_DRAWS**0.5).transpose(0, 1))
    yield batch, posteriors[0].adapter.outputs(posteriors[0].mean_vector, batch.inputs), roots


def heldout_blocks(posterior: GaussianPosterior, loader: Iterable[Any]) -> Iterator[HeldoutBlock]:
    """The held-out examples in blocks of about ``BLOCK_EXAMPLES``, as far as ``BLOCK_BYTES`` allow.

    Of more than ``JOINT_CLASSES`` + 1 classes a block uses the most probable ones of each example and its label; the
    others are one class, whose logit is the logsumexp of theirs.
    """
    pieces, size = list[HeldoutBlock](), 0
    with posterior.adapter.full_precision():
        for batch in heldout_batches(posterior, loader):
            limit = _block_size(posterior, batch)
            for piece in batch.chunks(limit):
                if size and size + piece.size > limit:
                    yield _joined(pieces)
                    pieces, size = [], 0
                pieces.append(_block(posterior, piece))
                size += piece.size
    if size:
        yield _joined(pieces)


def _block_size(posterior: GaussianPosterior, batch: Batch) -> int:
    """The number of examples of a block."""
    rows = min(posterior.kf.linearize.prepare(posterior.mean_vector, batch), JOINT_CLASSES + 2)
    each = rows * posterior.adapter.num_parameters * posterior.adapter.dtype.itemsize
    return max(1, min(BLOCK_EXAMPLES, BLOCK_BYTES // each))


def _block(posterior: GaussianPosterior, batch: Batch) -> HeldoutBlock:
    """Examples of one batch as a block."""
    family, settings = posterior.likelihood, posterior.config.curvature_settings
    few = replace(settings, curvature="truncated", curvature_epsilon=1e-6, curvature_classes=JOINT_CLASSES)
    outputs = posterior.adapter.outputs(posterior.mean_vector, batch.inputs)
    targets = required_targets(family, outputs, batch)
    if family.name != "categorical" or outputs.shape[1] <= JOINT_CLASSES + 1:
        linearized = posterior.kf.linearize(posterior.mean_vector, batch)
        jacobian = linearized.softmax_jacobian() if family.name == "categorical" else linearized.jacobian()
        return HeldoutBlock(family, linearized.outputs, targets, jacobian)
    projected = project_outputs(few, family, outputs, targets)
    assert projected.directions is not None
    rows = projected.directions.num_rows
    linearized = posterior.kf.linearize(posterior.mean_vector, batch, rows_per_example=rows)
    jacobian = linearized.jacobian(projected.directions)
    return HeldoutBlock(projected.family, projected.outputs, projected.targets, jacobian)


def _joined(pieces: list[HeldoutBlock]) -> HeldoutBlock:
    """Several blocks as one; masked columns and rows of zeros fill those with fewer outputs."""
    if len(pieces) == 1:
        return pieces[0]
    width = max(piece.outputs.shape[1] for piece in pieces)
    missing = [width - piece.outputs.shape[1] for piece in pieces]
    outputs = torch.cat(
        [F.pad(p.outputs, (0, gap), value=MASKED_LOGIT) for p, gap in zip(pieces, missing, strict=True)]
    )
    rows = torch.cat([F.pad(p.jacobian.dense(), (0, 0, 0, gap)) for p, gap in zip(pieces, missing, strict=True)])
    return HeldoutBlock(pieces[0].family, outputs, torch.cat([p.targets for p in pieces]), Jacobian.from_rows(rows))
