"""Predictive distributions of a posterior, by any method, for a batch or a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.predictive import predictive_distributions
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.linearized_prediction import (
    check_targets,
    parameter_draws_are_cheaper,
    predict_from_covariance,
    predict_from_parameter_draws,
)
from bayes_kf.inference.predictive.method_agreement import warn_if_methods_disagree
from bayes_kf.inference.predictive.prediction import METHODS, LoaderPrediction, Prediction, concatenate
from bayes_kf.inference.predictive.targets.target_distribution import TargetDistribution
from bayes_kf.inference.predictive.targets.target_mixture import TargetMixture
from bayes_kf.inference.predictive.token_predictions import predict_tokens
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs, split_batch
from bayes_kf.models.batched_forward import outputs_of_draws
from bayes_kf.models.language import LabelledTokens, SupervisedTokens
from bayes_kf.processes import shared_work
from bayes_kf.processes.launched import working_together
from bayes_kf.processes.random_state import use_random_state_of_first
from bayes_kf.processes.whole_loader import whole_loader
from bayes_kf.validation import check_one_of, check_whole

NO_PROBIT = {"poisson": "counts", "ordinal": "ordered classes"}


def predict(
    posterior: GaussianPosterior,
    inputs: Inputs,
    method: str,
    num_samples: int,
    generator: torch.Generator | None,
    targets: Tensor | None,
    *,
    compare: bool = True,
    adapter_generator_state: Tensor | None = None,
    stacklevel: int = 4,
) -> Prediction:
    """The predictive distribution for a batch; see :meth:`Posterior.predict`.

    Args:
        posterior: the posterior that predicts.
        inputs: the batch.
        method: one of ``METHODS``.
        num_samples: S draws.
        generator: source of the draws; None: a new one seeded with ``config.seed``.
        targets: for ``log_prob``.
        compare: whether to warn if "sampled" and "linearized" disagree.
        adapter_generator_state: state of the generator from which adapters are drawn, so that the same adapters predict
            all batches of a loader. Draws of outputs differ between examples and do not start again.
        stacklevel: of that warning.
    """
    check_arguments(posterior, method, num_samples, targets)
    batch = Batch.checked(posterior.adapter.read(inputs), targets, posterior.adapter.device)
    return predict_batch(
        posterior, batch, method, num_samples, posterior.generator(generator),
        compare=compare, adapter_generator_state=adapter_generator_state, stacklevel=stacklevel + 1,
    )  # fmt: skip


def predict_batch(
    posterior: GaussianPosterior,
    batch: Batch,
    method: str,
    num_samples: int,
    generator: torch.Generator,
    *,
    compare: bool,
    adapter_generator_state: Tensor | None,
    stacklevel: int,
) -> Prediction:
    """The same for checked arguments and a batch on the adapter's device."""
    with posterior.adapter.full_precision():
        if isinstance(posterior.adapter, LabelledTokens):
            return predict_tokens(posterior, posterior.adapter, batch, method, num_samples, generator)
        draws_parameters = method == "linearized" and parameter_draws_are_cheaper(posterior, batch, num_samples)
        if (method == "sampled" or draws_parameters) and adapter_generator_state is not None:
            generator.set_state(adapter_generator_state)
        if method == "mean":
            return _predict_at_mean(posterior, batch)
        if method == "sampled":
            sampled = _predict_from_adapters(posterior, batch, num_samples, generator)
            if compare:
                warn_if_methods_disagree(posterior, batch, sampled, stacklevel)
            return sampled
        if draws_parameters:
            return predict_from_parameter_draws(posterior, batch, num_samples, generator)
        return _predict_in_chunks(posterior, batch, method, num_samples, generator)


def predict_loader(
    posterior: GaussianPosterior,
    loader: Iterable[Any],
    method: str,
    num_samples: int,
    generator: torch.Generator | None,
    keep_samples: bool,
) -> LoaderPrediction:
    """The predictive distributions for all batches of a loader, on the CPU; see :meth:`Posterior.predict_loader`."""
    loader, generator = whole_loader(loader), posterior.generator(generator)
    with working_together("predict_loader") as begins:
        if begins:
            use_random_state_of_first(loader, generator)
        first_state = generator.get_state()

        def predict_batch(inputs: Inputs, targets: Tensor | None, is_first: bool) -> Prediction:
            return predict(
                posterior, inputs, method, num_samples, generator, targets,
                compare=is_first, adapter_generator_state=first_state, stacklevel=7,
            )  # fmt: skip

        batches = map(posterior.adapter.read, loader)
        return collect_predictions(predict_batch, batches, keep_samples, posterior.adapter)


def collect_predictions(
    predict_batch: Callable[[Inputs, Tensor | None, bool], Prediction],
    loader: Iterable[Any],
    keep_samples: bool,
    adapter: AdapterModel,
) -> LoaderPrediction:
    """The predictions for all batches of a loader, joined, on the CPU.

    Args:
        predict_batch: from inputs, targets and whether it is the first batch to its prediction.
        loader: batches as ``fit`` takes them; targets may be missing.
        keep_samples: whether the result holds all draws.
        adapter: of the posterior that predicts.

    Raises:
        ValueError: if the loader yields nothing, or a batch does not fit.
    """
    parts = list[LoaderPrediction]()
    for batch in shared_work.same_batches(loader):
        inputs, targets = split_batch(batch)
        part = predict_batch(inputs, targets, not parts)
        fields: dict[str, Any] = {
            name: _to_cpu(value)
            for name, value in vars(part).items()
            if name != "distribution" and (name != "samples" or keep_samples)
        }
        distribution = _stored_distribution(part.distribution, keep_samples)
        targets = _to_cpu(adapter.predicted_targets(inputs, targets))
        parts.append(LoaderPrediction(**fields, distribution=distribution, targets=targets))
    if not parts:
        raise ValueError("`loader` must yield at least one batch, got none.")
    joined = concatenate(parts)
    assert isinstance(joined, LoaderPrediction)
    return joined


def check_arguments(posterior: GaussianPosterior, method: str, num_samples: int, targets: Tensor | None) -> None:
    """Raise ValueError for arguments of :func:`predict` that do not fit."""
    check_one_of("method", method, METHODS)
    if isinstance(posterior.adapter, SupervisedTokens):
        raise ValueError(
            "`predict` needs a reading of the next token or of options for a posterior over text: "
            "`posterior.with_adapter(OptionTokens(model, options))`, for example."
        )
    if method == "probit" and posterior.config.likelihood in NO_PROBIT:
        kind = NO_PROBIT[posterior.config.likelihood]
        raise ValueError(f"`method` 'probit' has no closed form for {kind}, use 'linearized' or 'sampled'.")
    check_whole("num_samples", num_samples)
    if targets is not None and not isinstance(targets, Tensor):
        raise ValueError(f"`targets` must be a tensor or None, got {type(targets).__name__}.")


def _predict_at_mean(posterior: GaussianPosterior, batch: Batch) -> Prediction:
    """The prediction of the mean parameters."""
    family = posterior.likelihood
    outputs = posterior.scaled_logits(posterior.adapter.outputs(posterior.mean_vector, batch.inputs))
    return predictive_distributions.from_point(family, outputs, check_targets(family, outputs, batch.targets))


def _predict_from_adapters(
    posterior: GaussianPosterior, batch: Batch, num_samples: int, generator: torch.Generator
) -> Prediction:
    """The prediction of S adapters drawn from the posterior."""
    draws = posterior.sample(num_samples, generator)
    outputs = outputs_of_draws(posterior.adapter, draws, batch.inputs, posterior.adapters_at_once(batch))
    return prediction_of_adapters(posterior, batch, outputs)


def prediction_of_adapters(posterior: GaussianPosterior, batch: Batch, outputs: Tensor) -> Prediction:
    """The prediction of S adapters drawn from the posterior, from their raw outputs (S, B, m)."""
    family, outputs = posterior.likelihood, posterior.scaled_logits(outputs)
    return predictive_distributions.from_draws(family, outputs, check_targets(family, outputs[0], batch.targets))


def _predict_in_chunks(
    posterior: GaussianPosterior, batch: Batch, method: str, num_samples: int, generator: torch.Generator
) -> Prediction:
    """The prediction from J P Jᵀ, a chunk of the batch at a time; smaller chunks if memory runs out."""
    linearize, before = posterior.kf.linearize, generator.get_state()

    def predict_chunks() -> Prediction:
        generator.set_state(before)  # an attempt that ran out of memory has used it
        chunks = linearize.chunks(posterior.mean_vector, batch)
        return concatenate(
            [predict_from_covariance(posterior, chunk, method, num_samples, generator) for _, chunk in chunks]
        )

    return linearize.retry_in_smaller_chunks(predict_chunks, batch.size)


def _stored_distribution(
    distribution: TargetDistribution | TargetMixture | None, keep_samples: bool
) -> TargetDistribution | TargetMixture | None:
    """The distribution of a batch's targets as a loader's prediction keeps it, on the CPU.

    Without ``keep_samples`` it has no covariance of different targets. Gaussian targets then have none by "sampled",
    whose draws would be kept in it; the others have no other distribution.
    """
    if distribution is None:
        return None
    if keep_samples:
        return distribution.to("cpu")
    parts = distribution.parts if isinstance(distribution, TargetMixture) else [distribution]
    if any(part.is_average_of_normals for part in parts):
        return None
    return distribution.without_joint().to("cpu")


def _to_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()
