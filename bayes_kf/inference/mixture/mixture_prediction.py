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
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.inference.predictive.predictive_distributions import average
from bayes_kf.models.batch import Inputs
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

    Each member has a generator of its own, so that the predictions of a loader do not depend on its batches. Of S draws
    each member has a number in proportion to its weight: of the adapters for "sampled"; otherwise each member uses S
    draws for its own distribution, and ``samples`` of the result holds its share of them.
    """
    check_whole("num_samples", num_samples)
    shares, parts = divide_draws(weights, num_samples), []
    states = adapter_generator_states or [None] * len(members)
    for number, (member, share) in enumerate(zip(members, shares, strict=True)):
        count = max(1, share) if method == "sampled" else num_samples
        parts.append(
            predict.predict(
                member, inputs, method, count, generators[number], targets,
                compare=compare and number == 0, adapter_generator_state=states[number],
                stacklevel=stacklevel + 1,
            )
        )  # fmt: skip
    joined = average(members[0].likelihood, parts, weights)
    draws = [part.samples for part in parts]
    if any(some is None for some in draws):
        return joined
    pieces = [some[:share] for some, share in zip(draws, shares, strict=True) if some is not None]
    return replace(joined, samples=torch.cat(pieces))


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
