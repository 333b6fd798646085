"""How far from the mean adapters may be drawn so that each of them is still good by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Batch, split_batch
from bayes_kf.models.likelihoods.tokens import COUNT, LOG_PROB
from bayes_kf.validation import check_whole

HALVINGS = 7  # steps of the search, between 1 and LEAST
LEAST = 1e-3


@torch.no_grad()
def draw_width(
    posterior: Posterior | MixturePosterior,
    loader: Iterable[Any],
    most: float = 0.02,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
) -> float:
    """The largest factor on the standard deviations at which drawn adapters lose little against the mean.

    A posterior is that of the linearized model. Adapters are drawn for the model itself, where draws of the whole
    Gaussian may write nonsense. A draw's loss is compared with the mean's on held-out data, the same draws at all
    widths; the search halves the interval from 0.001 to 1 in logarithms. The idea of a width that the held-out loss
    decides is TFB's (training-free Bayesianization); the search and the criterion, which is of single draws, are ours.

    Args:
        posterior: whose draws will be exported.
        loader: batches with targets that it was not fitted on.
        most: loss of a draw above the mean's, on average, in nats a target (for text, a token).
        num_samples: S draws.
        generator: source of the draws; by default that of ``export_adapters``, which then writes the same draws.

    Returns:
        From 0.001 to 1.

    Raises:
        ValueError: if an argument is bad, the loader yields nothing, or a batch has no targets or does not fit.
    """
    check_whole("num_samples", num_samples)
    if not (isinstance(most, int | float) and most > 0):
        raise ValueError(f"`most` must be above 0 nats, got {most!r}.")
    device = posterior.adapter.device
    batches = [Batch.checked(*split_batch(batch), device) for batch in loader]
    if not batches:
        raise ValueError("`loader` must yield batches, got none.")
    if any(batch.targets is None for batch in batches):
        raise ValueError("`loader` must yield batches with targets, got one without.")
    state = posterior.generator(generator).get_state()

    def losses(width: float) -> Tensor:
        again = torch.Generator(device=device)
        again.set_state(state)
        draws, which = posterior.sample(num_samples, again, width).unique(dim=0, return_inverse=True)
        return torch.stack([_loss(posterior, draw, batches) for draw in draws])[which.cpu()]

    at_mean = losses(0.0)  # of a mixture, at the mean of each draw's member

    def excess(width: float) -> float:
        return float((losses(width) - at_mean).mean())

    if excess(1.0) <= most:
        return 1.0
    low, high = math.log(LEAST), 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if excess(math.exp(middle)) <= most else (low, middle)
    return math.exp(low)


def _loss(posterior: Posterior | MixturePosterior, vector: Tensor, batches: list[Batch]) -> Tensor:
    """Mean loss of one adapter, in nats a target."""
    total, count, likelihood = torch.zeros((), dtype=torch.float64), 0.0, posterior.likelihood
    for batch in batches:
        outputs = posterior.adapter.outputs(vector, posterior.adapter.with_targets(batch).inputs)
        assert batch.targets is not None  # checked before
        if likelihood.name == "tokens":
            total -= outputs[:, LOG_PROB].double().sum().cpu()
            count += float(outputs[:, COUNT].sum())
        else:
            targets = likelihood.check(outputs, batch.targets)
            total -= likelihood.log_prob(posterior.scaled_logits(outputs), targets).double().sum().cpu()
            count += batch.size
    return total / count
