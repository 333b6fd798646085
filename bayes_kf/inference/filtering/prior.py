"""The variance that a belief starts from: as given, or scaled so that the first inputs' outputs vary as configured."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model.output_directions import signs
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size
from bayes_kf.models.prior.prior_variance import constant_variance, logit_variance, uniform_variance
from bayes_kf.models.prior.variance_bounds import largest_variances

MOST_SD = 10.0  # of the logits
LINEAR = 0.01  # share of a change of the outputs that may be missed where they are linear in the parameters
LARGEST_MOVE = 3.0  # of a tensor, prior sd over root mean square
IDENTITY = 1e-4  # relative rounding within which a tensor's Jacobian is taken for the identity
SCALE_PROBES = 16  # per example, where the outputs are not seen one by one


def unscaled(config: KalmanConfig, mean: Tensor) -> Tensor:
    """The variance by the configured rule, (n,); a unit where the first inputs scale it.

    Raises:
        ValueError: where it is not positive and finite in the mean's precision.
    """
    size, variance = len(mean), config.initial_variance
    if variance is None:
        drawn = constant_variance(size, 1.0)
    elif config.initial_rule == "constant":
        drawn = constant_variance(size, variance)
    else:
        drawn = uniform_variance(size, variance, torch.Generator().manual_seed(config.seed))
    drawn = drawn.to(mean)
    if not bool(torch.isfinite(drawn).all() and (drawn > 0).all()):
        raise ValueError(f"`initial_variance` must be positive and finite in {mean.dtype}, got {variance:g}.")
    return drawn


def depends_on_inputs(config: KalmanConfig) -> bool:
    """Whether the variance cannot be known before the first inputs."""
    bounds = config.bound_prior and config.likelihood in ("categorical", "bernoulli")
    return config.initial_variance is None or bounds


def fitted(config: KalmanConfig, linearize: Linearizer, mean: Tensor, inputs: Inputs) -> Tensor:
    """The variance, (n,), where it depends on the first inputs."""
    find = scaled if config.initial_variance is None else bounded
    return find(config, linearize, mean, inputs)


def bounded(config: KalmanConfig, linearize: Linearizer, mean: Tensor, inputs: Inputs) -> Tensor:
    """The configured variance, (n,), no wider than a filter of first order can use.

    Under too wide a prior the first examples move the weights out of the region where the linearization holds. So,
    unless outputs are linear in the parameters, the logits for ``inputs`` vary by at most ``MOST_SD`` a priori, no
    tensor by more than ``LARGEST_MOVE`` times its own root mean square (one that starts from zero, its neighbour's in
    the module), and no LoRA factor more than lets ΔW be twice the size of W. Warns where that changes anything. Ours.
    """
    adapter, given = linearize.adapter, unscaled(config, mean)
    spread = float((given.double() * _squares(config, linearize, mean, inputs).double()).sum()) ** 0.5
    if not math.isfinite(spread):
        return given  # the update will say what is wrong
    variance, most = given * min(1.0, (MOST_SD / max(spread, MOST_SD)) ** 2), largest_variances(adapter)
    squares = {name: float(mean[where].double().square().mean()) for name, where in adapter.slices().items()}
    largest: dict[str, float] = {}
    for name, square in squares.items():
        module = name.rpartition(".")[0]
        largest[module] = max(square, largest.get(module, 0.0))
    for name, where in adapter.slices().items():
        square = squares[name] or largest[name.rpartition(".")[0]]
        limit = most.get(name, LARGEST_MOVE**2 * square if square > 0.0 else float("inf"))
        variance[where] = variance[where].clamp_max(limit)
    if torch.equal(variance, given) or _is_linear(config, adapter, mean, inputs, variance):
        return given
    warnings.warn(
        f"`initial_variance` {config.initial_variance:g} lets the logits vary by {spread:.3g} a priori, and is above "
        f"what a linearized filter can use: it is {float((variance / given).mean()):.2g} times as large now. "
        "`bound_prior=False` takes it as it is.",
        stacklevel=2,
    )
    return variance


def _is_linear(config: KalmanConfig, adapter: AdapterModel, mean: Tensor, inputs: Inputs, variance: Tensor) -> bool:
    """Whether a draw from N(mean, variance) moves the outputs half as far as one twice as far away."""
    generator = torch.Generator(device=mean.device).manual_seed(config.seed)
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    step = variance.sqrt() * noise
    start, once, twice = (adapter.outputs(mean + times * step, inputs) for times in (0.0, 1.0, 2.0))
    return bool((once - start - 0.5 * (twice - start)).norm() <= LINEAR * (once - start).norm())


def scaled(config: KalmanConfig, linearize: Linearizer, mean: Tensor, inputs: Inputs) -> Tensor:
    """The variance that gives the outputs for ``inputs`` the configured spread, (n,), constant in every tensor."""
    adapter, squares = linearize.adapter, _squares(config, linearize, mean, inputs)
    where = adapter.slices()
    gains = [float(squares[part].double().sum()) for part in where.values()]
    starts = [float(mean[part].double().square().mean()) for part in where.values()]
    modules = [name.rpartition(".")[0] for name in where]
    variances = logit_variance(gains, starts, modules, config.initial_logit_sd, config.initial_spread)
    if config.initial_spread == "modules":
        most = largest_variances(adapter)
        variances = [min(v, most.get(name, v)) for name, v in zip(where, variances, strict=True)]
    if config.initial_bias_sd is not None:
        least = config.initial_bias_sd**2
        variances = [
            max(v, least) if is_output_bias(squares[part]) else v
            for v, part in zip(variances, where.values(), strict=True)
        ]
    return torch.cat([mean.new_full((size,), value) for value, size in zip(variances, adapter.sizes, strict=True)])


def is_output_bias(squares: Tensor) -> bool:
    """Whether a tensor is added to the outputs: its Jacobian is the identity, of mean squares one over its size."""
    return bool(torch.allclose(squares * len(squares), torch.ones_like(squares), rtol=IDENTITY, atol=0.0))


def _squares(config: KalmanConfig, linearize: Linearizer, mean: Tensor, inputs: Inputs) -> Tensor:
    """Mean squares of the Jacobian's columns over examples and outputs, (n,); by probes for many outputs."""
    num_outputs, total = linearize.prepare(mean, inputs), torch.zeros_like(mean)
    count = num_outputs if config.curvature == "exact" else min(num_outputs, SCALE_PROBES)
    generator = torch.Generator(device=mean.device).manual_seed(config.seed)
    for _, piece in linearize.chunks(mean, inputs, count):
        batch = linearize(mean, piece, rows_per_example=count)
        directions = None if count == num_outputs else signs(batch.outputs, count, generator)
        total += batch.jacobian(directions).column_squares()
    return total / (batch_size(inputs) * num_outputs)
