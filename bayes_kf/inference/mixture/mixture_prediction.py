"""Predictive distributions of a mixture: the weighted mean of its members' distributions.

The total entropy is that of the mean probabilities and the aleatoric entropy is the members' weighted mean, so that
disagreement between members is epistemic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayes_kf.inference.predictive import predict
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.method_agreement import warn_if_methods_disagree
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.inference.predictive.predictive_distributions import average
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.models.batched_forward import outputs_of_draws
from bayes_kf.models.language import LearnedTokens
from bayes_kf.validation import check_whole


def predict_mixture(
    members: Sequence[GaussianPosterior],
    weights: Sequence[float],
    inputs: Inputs,
    method: str,
    num_samples: int,
    generators: Sequence[torch.Generator],
    targets: Tensor | None,
    *,
    compare: bool = True,
    adapter_generator_states: Sequence[Tensor | None] | None = None,
    stacklevel: int = 4,
) -> Prediction:
    """The predictive distribution for a batch; arguments as for :func:`bayes_kf.inference.predictive.predict.predict`.

    The batch is checked and moved once. By "sampled" the draws of all members go through one batched forward pass, if
    the members are over one module. Each member has a generator of its own, so that the predictions of a loader do not
    depend on its batches. Of S draws each member has a number in proportion to its weight: of the adapters for
    "sampled"; otherwise each member uses S draws for its own distribution, and ``samples`` of the result holds its
    share of them.
    """
    check_whole("num_samples", num_samples)
    first, shares = members[0], divide_draws(weights, num_samples)
    predict.check_arguments(first, method, num_samples, targets)
    batch = Batch.checked(first.adapter.read(inputs), targets, first.adapter.device)
    states = adapter_generator_states or [None] * len(members)
    if method == "sampled" and _share_a_model(members):
        parts = _predict_together(members, batch, [max(1, share) for share in shares], generators, states)
        if compare:
            with first.adapter.full_precision():
                warn_if_methods_disagree(first, batch, parts[0], stacklevel)
    else:
        parts = []
        for number, (member, share) in enumerate(zip(members, shares, strict=True)):
            count = max(1, share) if method == "sampled" else num_samples
            parts.append(
                predict.predict_batch(
                    member, batch, method, count, generators[number], compare=compare and number == 0,
                    adapter_generator_state=states[number], stacklevel=stacklevel + 1,
                )
            )  # fmt: skip
    joined = average(first.likelihood, parts, weights)
    draws = [part.samples for part in parts]
    if any(some is None for some in draws):
        return joined
    pieces = [some[:share] for some, share in zip(draws, shares, strict=True) if some is not None]
    return replace(joined, samples=torch.cat(pieces))


def _predict_together(
    members: Sequence[GaussianPosterior],
    batch: Batch,
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
    states: Sequence[Tensor | None],
) -> list[Prediction]:
    """The prediction of each member by "sampled", from one batched forward pass over the draws of all of them."""
    adapter, draws = members[0].adapter, []
    with adapter.full_precision():
        for member, count, generator, state in zip(members, counts, generators, states, strict=True):
            if state is not None:
                generator.set_state(state)
            draws.append(member.sample(count, generator))
        outputs = outputs_of_draws(adapter, torch.cat(draws), batch.inputs, members[0].adapters_at_once(batch))
        pairs = zip(members, outputs.split(list(counts)), strict=True)
        return [predict.prediction_of_adapters(member, batch, part) for member, part in pairs]


def _share_a_model(members: Sequence[GaussianPosterior]) -> bool:
    """Whether all members are over the tensors of one module, called in one way, with outputs that are predicted."""
    first = members[0].adapter
    if isinstance(first, LearnedTokens):
        return False
    return all(m.adapter is first or (m.adapter.model is first.model and _is_plain(m, members[0])) for m in members)


def _is_plain(*members: GaussianPosterior) -> bool:
    """Whether the adapters compute the module's own outputs; a subclass may compute others."""
    return all(type(member.adapter) is AdapterModel for member in members)


def member_generators(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Generators with seeds that are drawn from one."""
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(device=generator.device).manual_seed(seed) for seed in seeds]


def divide_draws(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many of S draws each member has: in proportion to the weights, with the largest remainders rounded up.

    Example:
        >>> divide_draws([0.5, 0.3, 0.2], 5)
        [3, 1, 1]
    """
    exact = [weight * num_samples for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: num_samples - sum(counts)]:
        counts[k] += 1
    return counts
