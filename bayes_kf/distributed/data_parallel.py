"""The information form on several processes: two vectors of length n are summed, and nothing else of that size is sent.

The precision of a diagonal belief in information form grows by diag(JᵀVJ), its mean moves by P Jᵀ(y − π): both are sums
over examples, whoever has them. Every process holds the whole belief. A batch is learned from at once, expanded at the
mean before it, as the natural gradient does, and is not linearized again where that is far (``relinearize``): large
global batches learn less here than on one process, so choose them small while steps are large. Innovations, which need
rows of different processes beside each other, are not known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.distributed.base import FilterOfMany
from bayes_kf.distributed.shares import Share
from bayes_kf.inference import diagonal, noise, tempering
from bayes_kf.inference.evidence import Batch, Part, Tally
from bayes_kf.inference.learn import (
    DAMPING_STEP,
    MAX_DAMPINGS,
    ROUNDING,
    check_finite,
    scored,
    warn_untaken,
)
from bayes_kf.inference.state import FilterState, UpdateInfo
from bayes_kf.inference.trust import TRUSTED, is_small

WANTED = {"covariance": "diagonal_information", "noise": "exponential_family", "expansion": "mean"}


class Sums(NamedTuple):
    """Sums over the examples of one process, or of all.

    Attributes:
        precision: diag(JᵀVJ), (n,).
        gradient: Jᵀ(y − π), (n,).
        log_prob: Σ log p(y | μ).
        scores: log losses by temperature and their squared differences.
        examples: how many.
    """

    precision: Tensor
    gradient: Tensor
    log_prob: Tensor
    scores: tempering.State
    examples: int


class DataParallelFilter(FilterOfMany):
    """A filter in information form over the processes of a group, the belief whole on each.

    Sends 2n numbers a process and update, whatever the batch, where :class:`ShardedFilter` sends rows. The result is
    that of ``KalmanConfig(covariance="diagonal_information", expansion="mean")`` on one process that is given all
    examples at once (there, batches of more than 192 rows are learned in parts, one after the other). Draws that price
    temperatures and probe curvature are others than there. ``info`` is about this process's examples, and knows no
    innovation.

    Args:
        model: the same on every process.
        config: the settings; as above, without a gate or an estimated noise variance.
        group: of torch.distributed; by default that of ``init_process_group``.

    Raises:
        ValueError: for another config.
        RuntimeError: where torch.distributed was not initialized, or the processes' models or settings differ.
    """

    NEEDS_AN_EXAMPLE = False

    def shard(self, state: FilterState) -> FilterState:
        """The state as it is: every process holds all of it."""
        return state

    def gather(self, state: FilterState) -> FilterState:
        """The state as it is."""
        return state

    def _check(self) -> None:
        for name, value in WANTED.items():
            if getattr(self.config, name) != value:
                raise ValueError(
                    f"`{name}` must be {value!r} for sums over processes, got {getattr(self.config, name)!r}."
                )
        if self.config.gate_quantile is not None or self.config.noise_variance == "estimated":
            raise ValueError("`gate_quantile` and `noise_variance` must be None and a number for sums over processes.")

    def _update(self, state: FilterState, share: Share) -> tuple[FilterState, UpdateInfo]:
        before, size = self.kf._predicted(state), share.sizes[self.group.rank]
        first = sum(share.sizes[: self.group.rank])  # so that no two processes draw the same probes
        batches: list[Batch] = []
        failed, tally = None, Tally()
        own = Sums(torch.zeros_like(before.belief.mean), torch.zeros_like(before.belief.mean), *self._nothing(), 0)
        try:
            if size and share.inputs is not None:
                self.kf.linearize.prepare(before.belief.mean, share.inputs)
                shifted = before._replace(examples=before.examples + first)
                batches = list(self.kf._observed(shifted, share.inputs, share.targets, before.belief.mean))
                for batch in batches:
                    tally.piece(batch.outputs, batch.targets, noise.likelihood(self.config, before.noise))
                    tally.linearized(batch)
                    numbered = shifted._replace(examples=shifted.examples + own.examples)
                    own = self._added(own, numbered, batch)
        except Exception as error:  # whatever it is, the others must not wait for this process
            failed = error
        self.shares.all_or_none(failed)
        sums = self._summed(own, sum(share.sizes))
        check_finite("the precision", sums.precision)
        check_finite("the gradient", sums.gradient)
        belief, damping = self._condition(before, batches, sums)
        scores = before.scores
        if isinstance(self.config.temperature, str):
            total, differences = scores.total + sums.scores.total, scores.differences + sums.scores.differences
            scores = tempering.State(scores.updates + 1, total, differences)
        after = before._replace(
            belief=belief,
            scores=scores,
            noise=before.noise._replace(step=before.noise.step + 1),
            step=before.step + 1,
            examples=before.examples + sums.examples,
        )
        info = tally.info(float((belief.mean - before.belief.mean).norm()))
        return after, info._replace(damping=damping)

    def _nothing(self) -> tuple[Tensor, tempering.State]:
        device = self.adapter.device
        return torch.zeros((), dtype=torch.float64, device=device), tempering.init(device)

    def _added(self, sums: Sums, state: FilterState, batch: Batch) -> Sums:
        """The sums with a piece of this process's examples."""
        everything = slice(0, len(batch.targets))
        part = Part.of(batch.seen, batch.jacobian, everything, max(batch.widths))
        output_cov = part.jacobian.block_gram(state.belief.variance).to(part.outputs.dtype)
        scores = scored(self.config, state._replace(scores=sums.scores), batch, everything, part, output_cov)
        factor, residual = part.family.whiten(part.outputs.double(), part.targets)
        seen = part.jacobian.multiplied(factor)
        curved = seen if part.probes is None else part.pulled.multiplied(part.probes.factor(part.outputs))
        return Sums(
            sums.precision + curved.column_squares(),
            sums.gradient + seen.rmatvec(residual.to(seen.like)),
            sums.log_prob + part.family.log_prob(part.outputs, part.targets).double().sum(),
            scores,
            sums.examples + len(batch.targets),
        )

    def _summed(self, own: Sums, examples: int) -> Sums:
        size = len(tempering.GRID)
        numbers = [own.log_prob.view(1), own.scores.total, own.scores.differences.flatten()]
        log_prob, total, differences = self.group.total(torch.cat(numbers)).split([1, size, size**2])
        scores = tempering.State(0, total, differences.view(size, size))
        return Sums(self.group.total(own.precision), self.group.total(own.gradient), log_prob[0], scores, examples)

    def _condition(self, state: FilterState, batches: list[Batch], sums: Sums) -> tuple[diagonal.State, float]:
        """The belief after the batch, its precision damped until the objective falls; as it was where it never does."""
        damping, prior = 1.0, state.belief
        for attempt in range(MAX_DAMPINGS + 1):
            variance = prior.variance / (1.0 + damping * sums.precision * prior.variance)
            found = diagonal.State(prior.mean + variance * damping * sums.gradient, variance)
            if not self.config.damping or self._accepts(state, found, batches, sums):
                break
            if attempt == MAX_DAMPINGS:
                check_finite("the mean", found.mean)
                warn_untaken()
                return prior, 0.0
            damping *= DAMPING_STEP
        check_finite("the mean", found.mean)
        check_finite("the variance", found.variance)
        return found, damping

    def _accepts(self, state: FilterState, found: diagonal.State, batches: list[Batch], sums: Sums) -> bool:
        """Whether a step lowers −log p(y | μ) + ½ δᵀP⁻¹δ over all processes, or moves no output far."""
        family, step = noise.likelihood(self.config, state.noise), found.mean - state.belief.mean
        finite = bool(torch.isfinite(found.mean).all())
        small = finite and all(is_small(batch.jacobian.matvec(step), family, TRUSTED) for batch in batches)
        if sum(self.group.numbers(int(not small), self.adapter.device)) == 0:
            return True
        loss = torch.zeros((), dtype=torch.float64, device=self.adapter.device)
        for batch in batches if finite else []:
            moved = batch.outputs_at(found.mean, slice(0, len(batch.targets)))
            loss = loss - family.log_prob(moved, batch.targets).double().sum()
        loss = self.group.total(loss if finite else loss + torch.inf)
        penalty = 0.5 * float((step.square() / state.belief.variance).sum())
        return float(loss) + penalty <= -float(sums.log_prob) + ROUNDING * (1.0 + abs(float(sums.log_prob)))
