"""The prior variance: as configured, or scaled so that the outputs for the first inputs vary as configured."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.config_groups import PriorSettings
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.linearization.row_buffer import selected_outputs
from bayes_kf.inference.measurement_model.output_directions import random_signs
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch
from bayes_kf.models.likelihoods.tokens import SPREAD, STATISTICS
from bayes_kf.models.prior.layer_tensors import layer_tensors
from bayes_kf.models.prior.prior_variance import constant_variance, logit_variance, uniform_variance
from bayes_kf.models.prior.variance_bounds import largest_variances
from bayes_kf.models.prior.whitened_inputs import whitened_factors

BOUNDED = ("categorical", "bernoulli", "ordinal")  # likelihoods under which `bound_prior` narrows a given variance
MAX_LOGIT_SD = 10.0  # prior sd of the logits
LINEARITY_TOL = 0.01  # relative deviation from linearity below which outputs count as linear in the parameters
MAX_RELATIVE_SD = 3.0  # of a tensor: prior sd over root mean square
IDENTITY_RTOL = 1e-4  # within which the Jacobian of a tensor counts as the identity
MAX_PROBES = 16  # per example, unless the curvature is exact


def configured_variance(settings: PriorSettings, mean: Tensor) -> Tensor:
    """The variance by the configured rule, (n,); ones if the first inputs determine it.

    Raises:
        ValueError: if it is not positive and finite in the mean's precision.
    """
    size, value = len(mean), settings.initial_variance
    if value is None:
        variance = constant_variance(size, 1.0)
    elif settings.initial_rule == "constant":
        variance = constant_variance(size, value)
    else:
        variance = uniform_variance(size, value, torch.Generator().manual_seed(settings.seed))
    variance = variance.to(mean)
    if not bool(torch.isfinite(variance).all() and (variance > 0).all()):
        raise ValueError(f"`initial_variance` must be positive and finite in {mean.dtype}, got {value:g}.")
    return variance


def depends_on_inputs(config: KalmanConfig) -> bool:
    """Whether the prior is unknown before the first inputs."""
    has_bound = config.bound_prior and config.likelihood in BOUNDED
    return config.initial_variance is None or has_bound or config.lora_inputs == "whitened"


def mean_for_inputs(settings: PriorSettings, adapter: AdapterModel, mean: Tensor, batch: Batch) -> Tensor:
    """The prior mean, (n,), whose LoRA factors may depend on the first inputs."""
    return whitened_factors(adapter, mean, batch.inputs) if settings.lora_inputs == "whitened" else mean


def variance_for_inputs(
    config: KalmanConfig, linearize: Linearizer, mean: Tensor, batch: Batch, configured_mean: Tensor
) -> Tensor:
    """The variance, (n,), if it depends on the first inputs.

    Args:
        config: the settings.
        linearize: of the model.
        mean: the prior mean, (n,), at which the outputs are linearized.
        batch: the first one.
        configured_mean: before :func:`mean_for_inputs`, (n,). Its tensors have the sizes that variances refer to. For a
            whitened factor these are sizes of the factor's outputs, not of its elements.
    """
    if config.initial_variance is not None and not (config.bound_prior and config.likelihood in BOUNDED):
        return configured_variance(config.prior_settings, mean)
    mean_squares = _jacobian_mean_squares(config, linearize, mean, batch)
    if config.initial_variance is None:
        variance = scaled_variance(config.prior_settings, linearize.adapter, configured_mean, mean_squares)
        if config.initial_spread == "bounded":
            return bounded_features(linearize.adapter, mean, batch, mean_squares, variance)
        return variance
    return bounded_variance(config.prior_settings, linearize.adapter, mean, batch, mean_squares)


def bounded_variance(
    settings: PriorSettings, adapter: AdapterModel, mean: Tensor, batch: Batch, mean_squares: Tensor
) -> Tensor:
    """The configured variance, (n,), no larger than a filter of first order can use.

    Under too large a variance the first examples move the weights out of the region in which the linearization is
    accurate. Unless outputs are linear in the parameters, there are three bounds: the logits for ``batch`` vary by at
    most ``MAX_LOGIT_SD`` a priori; a tensor varies by at most ``MAX_RELATIVE_SD`` times its root mean square (that of
    its neighbours in the module, if it starts from zero); and no LoRA factor lets ΔW be more than twice the size of W.
    Warns if a bound changes anything. Ours.

    Args:
        settings: of the prior.
        adapter: the model.
        mean: the prior mean, (n,).
        batch: the first one.
        mean_squares: of the columns of the Jacobian, over examples and outputs, (n,).
    """
    configured = configured_variance(settings, mean)
    logit_sd = float((configured.double() * mean_squares.double()).sum()) ** 0.5
    if not math.isfinite(logit_sd):
        return configured  # the update reports the cause
    variance, limits = (
        configured * min(1.0, (MAX_LOGIT_SD / max(logit_sd, MAX_LOGIT_SD)) ** 2),
        largest_variances(adapter),
    )
    squares = {name: float(mean[where].double().square().mean()) for name, where in adapter.slices().items()}
    of_module: dict[str, float] = {}
    for name, square in squares.items():
        module = name.rpartition(".")[0]
        of_module[module] = max(square, of_module.get(module, 0.0))
    for name, where in adapter.slices().items():
        square = squares[name] or of_module[name.rpartition(".")[0]]
        limit = limits.get(name, MAX_RELATIVE_SD**2 * square if square > 0.0 else float("inf"))
        variance[where] = variance[where].clamp_max(limit)
    if torch.equal(variance, configured) or _is_linear(settings.seed, adapter, mean, batch, variance):
        return configured
    warnings.warn(
        f"`initial_variance` {settings.initial_variance:g} lets the logits vary by {logit_sd:.3g} a priori, which is "
        f"more than a linearized filter can use: it is multiplied by {float((variance / configured).mean()):.2g}. "
        "`bound_prior=False` uses it unchanged.",
        stacklevel=2,
    )
    return variance


def scaled_variance(settings: PriorSettings, adapter: AdapterModel, mean: Tensor, mean_squares: Tensor) -> Tensor:
    """The variance that gives the outputs the configured sd, (n,), constant in every tensor."""
    slices = adapter.slices()
    gains = [float(mean_squares[where].double().sum()) for where in slices.values()]
    squares = [float(mean[where].double().square().mean()) for where in slices.values()]
    modules = [name.rpartition(".")[0] for name in slices]
    variances = logit_variance(gains, squares, modules, settings.initial_logit_sd, settings.initial_spread)
    if settings.initial_spread == "modules":
        limits = largest_variances(adapter)
        variances = [min(v, limits.get(name, v)) for name, v in zip(slices, variances, strict=True)]
    if settings.initial_bias_sd is not None:
        least = settings.initial_bias_sd**2
        variances = [
            max(v, least) if is_output_bias(mean_squares[where]) else v
            for v, where in zip(variances, slices.values(), strict=True)
        ]
    return torch.cat([mean.new_full((size,), value) for value, size in zip(variances, adapter.sizes, strict=True)])


def bounded_features(
    adapter: AdapterModel, mean: Tensor, batch: Batch, mean_squares: Tensor, variance: Tensor
) -> Tensor:
    """The variance with less for the adapter layers, if they would change the outputs by more than their own size.

    Under one variance for all parameters the output layer decides how large it is. Where its inputs are short vectors,
    as in sentence encoders, that variance is large, and in the adapter layers it would change the features by many
    times their size. So the variance of the adapter layers' tensors is at most the one whose change of the outputs for
    ``batch``, to first order, has the outputs' own mean square (of classes: after subtraction of their mean). If that
    change is unknown because a new output layer is zero, it is the mean square of their initial values. Ours.

    Args:
        adapter: the model.
        mean: the prior mean, (n,).
        batch: the first one.
        mean_squares: of the columns of the Jacobian, over examples and outputs, (n,).
        variance: of all parameters, (n,).
    """
    slices = adapter.slices()
    ranges = [slices[name] for name in layer_tensors(adapter)]
    if not ranges or len(ranges) == len(slices):
        return variance
    outputs = adapter.outputs(mean, batch.inputs).double()
    if outputs.shape[1] > 1:
        outputs = outputs - outputs.mean(1, keepdim=True)
    change = sum(float((variance[where].double() * mean_squares[where].double()).sum()) for where in ranges)
    size = float(outputs.square().mean())
    bounded = variance.clone()
    if change > 0.0 and size > 0.0:
        for where in ranges:
            bounded[where] *= min(1.0, size / change)
        return bounded
    initial = sum(float(mean[where].double().square().sum()) for where in ranges)
    number = sum(int(mean[where].count_nonzero()) for where in ranges)
    for where in ranges:
        bounded[where] = bounded[where].clamp_max(initial / max(1, number))
    return bounded


def is_output_bias(mean_squares: Tensor) -> bool:
    """Whether a tensor is added to the outputs: its Jacobian is the identity, with mean squares one over its size."""
    return bool(
        torch.allclose(mean_squares * len(mean_squares), torch.ones_like(mean_squares), rtol=IDENTITY_RTOL, atol=0.0)
    )


def _is_linear(seed: int, adapter: AdapterModel, mean: Tensor, batch: Batch, variance: Tensor) -> bool:
    """Whether twice a step drawn from N(0, variance) changes the outputs twice as much."""
    generator = torch.Generator(device=mean.device).manual_seed(seed)
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    step = variance.sqrt() * noise
    start, once, twice = (adapter.outputs(mean + times * step, batch.inputs) for times in (0.0, 1.0, 2.0))
    return bool((once - start - 0.5 * (twice - start)).norm() <= LINEARITY_TOL * (once - start).norm())


def _jacobian_mean_squares(config: KalmanConfig, linearize: Linearizer, mean: Tensor, batch: Batch) -> Tensor:
    """Mean squares of the Jacobian's columns over examples and outputs, (n,); by probes unless curvature is exact."""
    num_outputs, total = linearize.prepare(mean, batch), torch.zeros_like(mean)
    if config.likelihood == "tokens":
        return _token_mean_squares(linearize, mean, batch)
    count = num_outputs if config.curvature == "exact" else min(num_outputs, MAX_PROBES)
    generator = torch.Generator(device=mean.device).manual_seed(config.seed)
    for _, chunk in linearize.chunks(mean, batch, count):
        linearized = linearize(mean, chunk, rows_per_example=count)
        directions = None if count == num_outputs else random_signs(linearized.outputs, count, generator)
        total += linearized.jacobian(directions).column_squares()
    return total / (batch.size * num_outputs)


def _token_mean_squares(linearize: Linearizer, mean: Tensor, batch: Batch) -> Tensor:
    """The same of the logits of learned tokens, weighted by their Fisher information F, (n,).

    The probes of a sequence have E rrᵀ = Σ_t J_tᵀ F_t J_t, and logits of variance s² that are independent have
    tr F_t C = s² tr F_t: so the mean square is Σ r² / Σ tr F_t.
    """
    total, spread = torch.zeros_like(mean), 0.0
    for _, chunk in linearize.chunks(mean, batch, linearize.num_outputs - STATISTICS):
        linearized = linearize(mean, chunk, rows_per_example=linearize.num_outputs - STATISTICS)
        probes = selected_outputs(linearized.outputs, range(STATISTICS, linearize.num_outputs))
        total += linearized.jacobian(probes).column_squares() / probes.num_rows
        spread += float(linearized.outputs[:, SPREAD].double().sum())
    return total / max(spread, torch.finfo(torch.float32).tiny)
