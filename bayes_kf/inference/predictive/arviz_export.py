"""Draws from a posterior, and their predictions, as ArviZ data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior, PosteriorDraws
from bayes_kf.inference.predictive.linearized_prediction import required_targets
from bayes_kf.inference.predictive.method_agreement import warn_if_methods_disagree
from bayes_kf.inference.predictive.predictive_distributions import from_draws
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, split_batch
from bayes_kf.models.batched_forward import outputs_of_draws

Groups = dict[str, dict[str, np.ndarray]]
MIN_CHAIN = 4  # draws of a chain from which ArviZ computes R̂
TARGET = "target"  # the variable of observed_data, posterior_predictive and log_likelihood


def to_arviz(
    posterior: PosteriorDraws, num_samples: int, generator: torch.Generator | None, loader: Iterable[Any] | None
) -> Any:
    """Draws and, with a loader, their predictions as ArviZ data; see :meth:`Posterior.to_arviz`."""
    generator = posterior.generator(generator)
    draws = posterior.sample(num_samples, generator)
    groups = {"posterior": named_draws(posterior.adapter, draws)}
    if loader is not None:
        with posterior.adapter.full_precision():
            groups |= predictive_groups(posterior, draws, loader, generator)
    return inference_data(groups)


def inference_data(groups: Mapping[str, Mapping[str, np.ndarray]]) -> Any:
    """ArviZ data of these groups, by the ``from_dict`` of the installed version."""
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)  # type: ignore[arg-type]


def num_chains(num_samples: int) -> int:
    """Number of chains into which independent draws are divided: ArviZ needs two of four draws for R̂.

    It is the smallest divisor of the number of draws, from 2 on, that leaves at least four draws per chain; else 1.

    Example:
        >>> num_chains(500), num_chains(9), num_chains(15), num_chains(7)
        (2, 1, 3, 1)
    """
    return next((count for count in range(2, num_samples // MIN_CHAIN + 1) if num_samples % count == 0), 1)


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


def predictive_groups(
    posterior: PosteriorDraws, draws: Tensor, loader: Iterable[Any], generator: torch.Generator
) -> Groups:
    """Predictions of the targets of a loader by drawn adapters.

    Args:
        posterior: the posterior.
        draws: parameters of the adapters, (S, n); they are the same for all batches.
        loader: batches with targets.
        generator: source of the drawn targets.

    Raises:
        ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
    """
    adapter, family = posterior.adapter, posterior.likelihood
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, given in enumerate(loader):
        inputs, targets = split_batch(adapter.read(given))
        if not isinstance(targets, Tensor):
            kind = "none" if targets is None else type(targets).__name__
            raise ValueError(f"`loader` must yield tensors of targets with every batch, got {kind} in batch {index}.")
        batch = Batch.checked(inputs, targets, adapter.device)
        outputs = outputs_of_draws(adapter, draws, batch.inputs, posterior.adapters_at_once(batch))  # (S, B, m)
        outputs = posterior.scaled_logits(outputs)
        if index == 0 and isinstance(posterior, GaussianPosterior):
            warn_if_methods_disagree(posterior, batch, from_draws(family, outputs, None), stacklevel=5)
        checked = required_targets(family, outputs[0], batch)
        log_prob = family.log_prob(outputs, checked)
        drawn = family.sample(outputs, generator)
        if checked.shape[1:] == (1,):  # ArviZ needs targets and log-likelihoods of one shape
            checked, drawn = checked.squeeze(-1), drawn.squeeze(-1)
        parts.append((checked.cpu(), drawn.cpu(), log_prob.cpu()))
    if not parts:
        raise ValueError("`loader` must yield at least one batch, got none.")
    observed, predicted, log_probs = zip(*parts, strict=True)
    return {
        "observed_data": {TARGET: torch.cat(observed).numpy()},  # (N,) or (N, m)
        # (chains, draws, N) or (chains, draws, N, m)
        "posterior_predictive": {TARGET: in_chains(torch.cat(predicted, dim=1).numpy())},
        "log_likelihood": {TARGET: in_chains(torch.cat(log_probs, dim=1).numpy())},  # (chains, draws, N)
    }
