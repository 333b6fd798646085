"""A Gaussian posterior over the trainable tensors of a model: its moments and its draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.kalman_filter import FilterState, KalmanFilter
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch
from bayes_kf.models.language import LearnedTokens
from bayes_kf.models.likelihood import Likelihood

MAX_MATRIX = 20_000  # parameters above which a dense covariance is refused
TRAINING = "training_"  # prefix of history series about data on which the adapter was trained before
PREQUENTIAL = ("log_loss", "correct", "innovation", "dof")  # series that are prequential if the data are new


class PosteriorDraws(Protocol):
    """A posterior from which adapters are drawn: one Gaussian, or a mixture."""

    @property
    def adapter(self) -> AdapterModel:
        """The model as a function of its trainable tensors."""

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the targets."""

    def sample(self, num_samples: int, generator: torch.Generator | None = None, width: float = 1.0) -> Tensor:
        """Draws of the parameters, (S, n); ``width`` is a factor on their standard deviations."""

    def generator(self, generator: torch.Generator | None = None) -> torch.Generator:
        """The given generator, or a new one seeded with ``config.seed``."""

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """Logits divided by the softmax temperature; same shape."""

    def adapters_at_once(self, batch: Batch) -> int:
        """How many adapters fit in memory together, in forward passes over a batch."""


@dataclass(frozen=True, repr=False)
class GaussianPosterior:
    """N(μ, P) over the n trainable parameters of a model.

    Attributes:
        kf: the filter that computed the posterior; it holds the model and the settings.
        state: the filter's state; it holds μ and P.
        history: series of the fit, name -> 1-D tensor. Per example: ``log_loss`` in nats and, for classifiers,
            ``correct``, both before the example's update. Per update: ``innovation``, ``dof`` (its degrees of freedom),
            ``damping`` and ``seconds``. These are of the first pass. Later passes add ``objective``, −log p(y, θ) after
            each of them, and ``mean_passes`` add ``fitted_log_loss``. ``tune`` adds the ``evidence`` of its candidates;
            several settings add their ``held_out_log_loss``, members of a mixture theirs before the first pass of the
            mean and after each, a regression without settings its ``noise_variance`` after each refit. Held-out data
            add ``size`` and ``sharpness``: the chosen value and the ends of its 90 % interval (a value alone if nothing
            chose it). After ``start="trained"`` no score is prequential, since the adapter
            was trained on the data; the series are then ``training_log_loss``, ``training_correct``,
            ``training_innovation`` and ``training_dof``.
    """

    kf: KalmanFilter
    state: FilterState
    history: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> KalmanConfig:
        """The settings of the fit."""
        return self.kf.config

    @property
    def adapter(self) -> AdapterModel:
        """The model as a function of its trainable tensors."""
        return self.kf.adapter

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the targets; a Gaussian one has the configured or estimated σ²."""
        return noise.likelihood(self.config.noise_settings, self.state.noise)

    @property
    def temperature(self) -> float:
        """Factor on P in predictions and draws, as configured or chosen by the prequential log loss."""
        return self.kf.temperature(self.state)

    @property
    def softmax_temperature(self) -> float:
        """Divisor of the logits in predictions; 1 unless configured or chosen on held-out data."""
        return self.config.predictive_settings.softmax_temperature

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the predictions, one sentence each; model cards and reports show them."""
        if not prequential_temperature.is_mean_alone(self.temperature):
            return ()
        return (f"The temperature is {self.temperature:g}: {prequential_temperature.MEAN_ALONE_NOTE}",)

    def __repr__(self) -> str:
        settings, parameters = self.config, self.adapter.num_parameters
        text = (
            f"{type(self).__name__}({settings.likelihood}, {parameters:,} parameters, "
            f"covariance={settings.covariance!r}, temperature={self.temperature:g}, "
            f"{self.state.examples:,} examples in {self.state.step:,} updates)"
        )
        return "\n".join([text, *self.notes])

    @property
    def mean_vector(self) -> Tensor:
        """μ, (n,)."""
        return self.state.belief.mean

    @property
    def variance_vector(self) -> Tensor:
        """Diagonal of P, (n,), without the temperature."""
        return self.state.belief.marginal_variance()

    @property
    def mean(self) -> dict[str, Tensor]:
        """Posterior means, tensor name -> tensor."""
        return self.adapter.unflatten(self.mean_vector)

    @property
    def variance(self) -> dict[str, Tensor]:
        """Marginal posterior variances, tensor name -> tensor, without the temperature."""
        return self.adapter.unflatten(self.variance_vector)

    @property
    def prior_variance(self) -> dict[str, Tensor]:
        """Prior variances, tensor name -> tensor."""
        return self.adapter.unflatten(self.state.prior.variance)

    def covariance_matrix(self) -> Tensor:
        """P, (n, n), without the temperature.

        Raises:
            ValueError: if n is above 20,000.
        """
        size = len(self.mean_vector)
        if size > MAX_MATRIX:
            gib = size**2 * self.mean_vector.dtype.itemsize / 2**30
            raise ValueError(
                f"`covariance_matrix` takes at most {MAX_MATRIX:,} parameters, got {size:,} ({gib:.1f} GiB)."
            )
        return self.state.belief.covariance_matrix()

    def sample(self, num_samples: int, generator: torch.Generator | None = None, width: float = 1.0) -> Tensor:
        """Draws from N(μ, temperature·P), (S, n).

        Args:
            num_samples: the number of draws, S.
            generator: source of the draws; by default a new one seeded with ``config.seed``.
            width: factor on the standard deviations.
        """
        temperature = self.temperature * width**2
        return self.mean_vector + self.sample_deviations(num_samples, self.generator(generator), temperature)

    def sample_deviations(self, num_samples: int, generator: torch.Generator, temperature: float) -> Tensor:
        """Draws from N(0, temperature·P), (S, n)."""
        mean = self.mean_vector
        normal = torch.randn((num_samples, len(mean)), generator=generator, dtype=mean.dtype, device=generator.device)
        return temperature**0.5 * self.state.belief.root()(normal.to(mean.device))

    def log_density(self, draws: Tensor) -> Tensor:
        """log N(θ; μ, temperature·P) of parameter vectors (S, n), in float64, (S,).

        Raises:
            ValueError: if the draws are not of shape (S, n).
        """
        size = len(self.mean_vector)
        if draws.dim() != 2 or draws.shape[1] != size:
            raise ValueError(f"`draws` must have shape (S, {size}), got {tuple(draws.shape)}.")
        belief, temperature = self.state.belief, self.temperature
        deviations = draws.to(self.mean_vector) - self.mean_vector
        quadratic = torch.stack([belief.quadratic(deviation).double() for deviation in deviations])
        log_volume = belief.log_determinant() + size * math.log(2.0 * math.pi * temperature)
        return -0.5 * (quadratic / temperature + log_volume)

    def generator(self, generator: torch.Generator | None = None) -> torch.Generator:
        """The given generator, or a new one seeded with ``config.seed``."""
        return generator or torch.Generator(device=self.adapter.device).manual_seed(self.config.seed)

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """Logits, or deviations of logits, divided by :attr:`softmax_temperature`; same shape."""
        return logits if self.softmax_temperature == 1.0 else logits / self.softmax_temperature

    def adapters_at_once(self, batch: Batch) -> int:
        """How many adapters fit in memory together, in forward passes over a batch."""
        return max(1, self.kf.linearize.max_chunk_size(self.mean_vector, batch) // batch.size)

    def with_settings(self, **settings: Any) -> Self:
        """The same posterior with other settings for its predictions."""
        config = replace(self.config, tune=None, **settings)
        return replace(self, kf=KalmanFilter(self.adapter, config))

    def with_adapter(self, adapter: AdapterModel) -> Self:
        """The same posterior over another view of its model, which computes other outputs (``models.language``).

        Tokens are learned by ``SupervisedTokens`` or ``LabelledTokens`` under the likelihood "tokens"; other readings
        choose among tokens or texts under "categorical".

        Args:
            adapter: over the same trainable tensors.

        Raises:
            ValueError: if the trainable tensors differ.
        """
        if (adapter.names, adapter.shapes) != (self.adapter.names, self.adapter.shapes):
            raise ValueError("`adapter` must have the trainable tensors that the posterior was fitted on, got others.")
        config = self.config
        if isinstance(adapter, LearnedTokens):
            draws = adapter.num_probes
            config = replace(config, likelihood="tokens", curvature="sampled", curvature_draws=draws)
        elif config.likelihood == "tokens":
            config = replace(config, likelihood="categorical")
        return replace(self, kf=KalmanFilter(adapter, config))

    def reading(self, adapter: AdapterModel) -> Self:
        """The same as :meth:`with_adapter`."""
        return self.with_adapter(adapter)

    def filter(self) -> KalmanFilter:
        """The filter, to continue from :attr:`state`."""
        return self.kf

    def apply_to(self, model: nn.Module) -> None:
        """Write the posterior mean into ``model``, in place; ValueError if it has other trainable tensors."""
        other = AdapterModel(model)
        if (other.names, other.shapes) != (self.adapter.names, self.adapter.shapes):
            raise ValueError("`model` must have the trainable tensors that the posterior was fitted on, got others.")
        other.assign(self.mean_vector.to(other.device))


def as_training_series(history: dict[str, Tensor]) -> dict[str, Tensor]:
    """The history under the names for data on which the adapter was trained before: ``training_log_loss`` and so on.

    Reports, comparisons and the command line then find no prequential scores.
    """
    return {TRAINING + name if name in PREQUENTIAL else name: values for name, values in history.items()}


def check_members(members: Sequence[GaussianPosterior], weights: Sequence[float]) -> None:
    """Raise ValueError if members and weights are not those of a mixture of posteriors over the same tensors."""
    if not members or len(members) != len(weights):
        raise ValueError(f"`weights` must be as many as `members`, got {len(weights)} for {len(members)}.")
    if not all(w > 0.0 for w in weights) or abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"`weights` must be positive and add up to 1, got {', '.join(f'{w:g}' for w in weights)}.")
    first = members[0].adapter
    for number, member in enumerate(members[1:], 1):
        if (member.adapter.names, member.adapter.shapes) != (first.names, first.shapes):
            raise ValueError(f"`members` must be over the same tensors, got others in number {number}.")


def reweighted(weights: Sequence[float], log_evidence: Sequence[float]) -> tuple[float, ...]:
    """The weights of a mixture's members after data: w_k p_k(data) / Σ_j w_j p_j(data), none of them zero.

    Args:
        weights: K positive numbers.
        log_evidence: log p_k(data) of every member.

    Example:
        >>> reweighted([0.5, 0.5], [-1.0, -1.0])
        (0.5, 0.5)
    """
    logs = torch.tensor(weights, dtype=torch.float64).log() + torch.tensor(log_evidence, dtype=torch.float64)
    new = logs.softmax(0).clamp_min(torch.finfo(torch.float64).tiny)
    return tuple((new / new.sum()).tolist())
