"""Predictions of the labels of tokens: each labelled token is an example, whatever sequence it belongs to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kf.inference.predictive import predictive_distributions
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.prediction import Prediction
from bayes_kf.models.batch import IGNORED, Batch, Inputs
from bayes_kf.models.batched_forward import finite_difference_jvps, outputs_of_draws
from bayes_kf.models.language import LabelledTokens
from bayes_kf.models.language.logits import mapping
from bayes_kf.models.likelihood import Categorical


def predict_tokens(
    posterior: GaussianPosterior,
    adapter: LabelledTokens,
    batch: Batch,
    method: str,
    num_samples: int,
    generator: torch.Generator,
) -> Prediction:
    """The prediction of N tokens, sequence after sequence: those with labels, or without labels all that are there.

    By "linearized" logits are f ± Jδ, δ ~ N(0, temperature·P), a forward pass for each δ; J P Jᵀ is not formed, and
    "sampled" is not compared with it.

    Args:
        posterior: over ``adapter``.
        adapter: the reading.
        batch: of sequences.
        method: "linearized", "sampled" or "mean".
        num_samples: S draws.
        generator: their source.

    Raises:
        ValueError: for "probit", or if "linearized" would need finite differences in half precision.
    """
    if method == "probit":
        raise ValueError("`method` must be 'linearized', 'sampled' or 'mean' for labels of tokens, got 'probit'.")
    if method == "linearized" and not adapter.is_precise:
        raise ValueError(
            "`method` must be 'sampled' or 'mean' for labels of tokens in half precision, got 'linearized'."
        )
    family, mean = Categorical(), posterior.mean_vector
    inputs, targets = _with_labels(adapter, batch)
    if method == "mean":
        outputs = adapter.logits.outputs(mean, inputs)
        return predictive_distributions.from_point(family, outputs, targets)
    has_labels = bool((inputs["labels"] >= 0).any())  # else there is no forward pass to measure
    at_once = posterior.adapters_at_once(Batch(inputs, None, batch.size)) if has_labels else 1
    if method == "sampled":
        draws = outputs_of_draws(adapter.logits, posterior.sample(num_samples, generator), inputs, at_once)
        return predictive_distributions.from_draws(family, draws, targets)
    steps = posterior.sample_deviations(-(-num_samples // 2), generator, posterior.temperature)
    changes = finite_difference_jvps(adapter.logits, mean, steps, inputs, at_once)
    draws = adapter.logits.outputs(mean, inputs) + torch.cat([changes, -changes])[:num_samples]
    return predictive_distributions.from_draws(family, draws, targets)


def at_places(values: Tensor, inputs: Inputs, labels: Tensor | None) -> Tensor:
    """Values of the N predicted tokens, (N, C), at their places in the sequences, (B, T, C), with 0 elsewhere.

    Args:
        values: of a prediction for these inputs.
        inputs: of the prediction.
        labels: (B, T); None if there were none.
    """
    given = mapping(inputs, "input_ids")
    chosen = _tokens_there(given) if labels is None else labels >= 0
    placed = values.new_zeros((*chosen.shape, values.shape[-1]))
    placed[chosen.to(values.device)] = values
    return placed


def _tokens_there(inputs: Mapping[str, Tensor]) -> Tensor:
    """Whether a token is one that `attention_mask` does not hide, (B, T)."""
    ids = inputs["input_ids"]
    return inputs.get("attention_mask", torch.ones_like(ids)).to(ids.device) > 0


def _with_labels(adapter: LabelledTokens, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs with labels that say which tokens are predicted, and the labels of these, (N,), if there are any."""
    inputs = dict(adapter.with_targets(batch).inputs)
    if "labels" in inputs:
        return inputs, adapter.predicted_targets(inputs, None)
    return inputs | {"labels": torch.where(_tokens_there(inputs), 0, IGNORED)}, None
