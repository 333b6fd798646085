"""Draws from a belief, and what they predict, as the groups of ArviZ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.predictive import prediction
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import check_inputs, split_batch, to_device
from bayes_kf.models.batched_forward import outputs_of_draws
from bayes_kf.models.likelihood import Gaussian, Likelihood

if TYPE_CHECKING:
    from bayes_kf.inference.posterior import Posterior

Groups = dict[str, dict[str, np.ndarray]]
MANY_COUNTS = 1e6  # rate above which a Poisson is drawn as a Gaussian; far above, torch's own draws are not counts
FEWEST_DRAWS = 4  # of a chain, below which ArviZ has no R̂
TARGET = "target"  # the variable that observed_data, posterior_predictive and log_likelihood share


def inference_data(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """ArviZ data of these groups, whichever ``from_dict`` the installed version has."""
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)  # type: ignore[arg-type]


def num_chains(num_samples: int) -> int:
    """How many chains independent draws are given as: ArviZ takes R̂ from at least two, of four draws or more.

    The least divisor of the number of draws that allows for that, two for even ones; 1 where there is none.

    Example:
        >>> num_chains(500), num_chains(9), num_chains(15), num_chains(7)
        (2, 1, 3, 1)
    """
    return next((count for count in range(2, num_samples // FEWEST_DRAWS + 1) if num_samples % count == 0), 1)


def in_chains(values: np.ndarray) -> np.ndarray:
    """Draws (S, ...) as (chains, S / chains, ...)."""
    chains = num_chains(len(values))
    return values.reshape(chains, len(values) // chains, *values.shape[1:])


def named_draws(adapter: AdapterModel, draws: Tensor) -> dict[str, np.ndarray]:
    """Draws (S, n) as chains of every tensor, name -> (chains, draws, *shape)."""
    return {
        name: in_chains(draws[:, where].reshape(len(draws), *shape).cpu().numpy())
        for (name, where), shape in zip(adapter.slices().items(), adapter.shapes, strict=True)
    }


def predictive_groups(posterior: Posterior, draws: Tensor, loader: Iterable[Any], generator: torch.Generator) -> Groups:
    """What the adapters ``draws`` (S, n), the same for all batches, say about a loader's targets."""
    adapter, family = posterior.adapter, noise.likelihood(posterior.config.noise_settings, posterior.state.noise)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, batch in enumerate(loader):
        inputs, targets = split_batch(batch)
        if not isinstance(targets, Tensor):
            kind = "none" if targets is None else type(targets).__name__
            raise ValueError(f"`loader` must yield tensors of targets with every batch, got {kind} in batch {index}.")
        check_inputs(inputs)
        inputs = to_device(inputs, adapter.device)
        outputs = outputs_of_draws(adapter, draws, inputs, posterior._draws_at_once(inputs))  # (S, B, m)
        outputs = posterior.scaled_logits(outputs)
        if index == 0:
            posterior._compare(inputs, prediction.mixture(family, outputs, None))
        known = family.check(outputs[0], targets.to(adapter.device))
        log_prob = family.log_prob(outputs, known)
        drawn = draw_targets(family, outputs, generator)
        if outputs.shape[-1] == 1:  # one output is no axis: ArviZ wants targets and log-likelihoods of one shape
            known, drawn = known.squeeze(-1), drawn.squeeze(-1)
        parts.append((known.cpu(), drawn.cpu(), log_prob.cpu()))
    if not parts:
        raise ValueError("`loader` must yield at least one batch, got none.")
    observed, predicted, log_probs = zip(*parts, strict=True)
    return {
        "observed_data": {TARGET: torch.cat(observed).numpy()},  # (N,) or (N, m)
        # (chains, draws, N) or (chains, draws, N, m)
        "posterior_predictive": {TARGET: in_chains(torch.cat(predicted, dim=1).numpy())},
        "log_likelihood": {TARGET: in_chains(torch.cat(log_probs, dim=1).numpy())},  # (chains, draws, N)
    }


def draw_targets(family: Likelihood, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """A target from each of the outputs (S, B, m): classes (S, B), else (S, B, m), on the generator's device."""
    mean = family.mean(outputs).to(generator.device)
    if family.name == "categorical":
        return torch.multinomial(mean.flatten(0, 1), 1, replacement=True, generator=generator).view(mean.shape[:-1])
    if family.name == "bernoulli":
        return torch.bernoulli(mean, generator=generator)
    if isinstance(family, Gaussian):
        unit = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + family.noise_variance.to(mean).sqrt() * unit
    few = torch.poisson(mean.clamp_max(MANY_COUNTS), generator=generator)
    if bool((mean <= MANY_COUNTS).all()):
        return few
    unit = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return torch.where(mean <= MANY_COUNTS, few, (mean + mean.sqrt() * unit).round())
