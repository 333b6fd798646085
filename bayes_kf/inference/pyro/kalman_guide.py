"""The filter as a Pyro guide: the recursion advances the mean and the covariance of the sample sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroParam
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.covariance.rescaling import rescaled
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.predictive.gaussian_posterior import MAX_MATRIX, GaussianPosterior
from bayes_kf.inference.pyro.guide_store import GuideStore
from bayes_kf.inference.pyro.kalman_model import KalmanModel
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs

_COUNTER = itertools.count()


class KalmanGuide(AutoGuide):
    """A Pyro guide whose Gaussian is the belief of a Kalman filter.

    It has one sample site for each trainable tensor of the model, under the tensor's name, as :attr:`model` has. Their
    joint distribution is N(loc, T·S P S): P is the covariance of the filter in the configured structure, T the
    temperature (``KalmanConfig.temperature``), S = diag(scale). :meth:`update`, or ``KalmanSVI``, advances loc and P by
    one measurement update; ``scale`` is 1 then. ``loc`` and ``scale`` are Pyro parameters: ``pyro.infer.SVI`` can train
    them too, and the next update begins from where it left them.

    The state is in Pyro's parameter store, as ``<name>.loc``, ``<name>.scale``, ``<name>.belief.…``, ``<name>.prior.…``
    and so on. All of them are floating-point tensors, so ``get_state``, ``set_state`` and a file of tensors restore the
    filter to the bit. ``pyro.clear_param_store`` does not reset a guide.

    The prior gets its scale from the inputs of the first update, or of the first call before it.

    Args:
        model: the module, or an adapter of it; it is only read.
        config: the settings of the filter; ``KalmanConfig()`` by default. Settings that only ``fit`` uses (``tune``,
            ``passes``, ``mean_passes``) do not count.
        state: where to begin; by default the prior whose mean is the model's present tensors.
        name: of the guide in the parameter store. With a name, a guide without ``state`` takes the state that is in
            the store under it. By default a new name.

    Raises:
        ValueError: if the model has no trainable tensors, the state in the store is not one of this model and config,
            or Pyro's setting ``module_local_params`` is on.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> guide = KalmanGuide(model, KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0))
        >>> info = guide.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
        >>> guide.posterior().variance["weight"]  # one observation of the first weight with unit noise
        tensor([[0.5000, 1.0000]])
    """

    loc: Tensor  # PyroParams, read as constrained tensors
    scale: Tensor

    def __init__(
        self,
        model: nn.Module | AdapterModel,
        config: KalmanConfig | None = None,
        *,
        state: FilterState | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(model, GaussianPosterior):
            raise ValueError("`model` must be a module or an adapter, got a posterior; use its method `guide()`.")
        kf = KalmanFilter(model, config)
        super().__init__(KalmanModel(kf.adapter, self._current_posterior))
        taken = pyro.get_param_store()
        unused = (f"kalman_guide_{number}" for number in _COUNTER)
        self._pyro_name = name or next(n for n in unused if f"{n}.loc" not in taken)
        start = kf.init() if state is None else state
        mean = start.belief.mean
        self.loc = PyroParam(mean.clone())  # type: ignore[assignment]
        self.scale = PyroParam(torch.ones_like(mean), constraints.positive)  # type: ignore[assignment]
        self._kf, self.store = kf, GuideStore(self, kf, start)
        if state is not None or f"{self._pyro_name}.loc" not in taken:
            self.store.write(start)
        self.store.read()

    def __getattr__(self, name: str) -> Any:
        if name not in ("loc", "scale"):
            return super().__getattr__(name)
        with self._pyro_context:  # so that a state set in the store is seen at once
            return super().__getattr__(name)

    @property
    def adapter(self) -> AdapterModel:
        """The model as a function of its trainable tensors; ``names`` and ``shapes`` are those of the sites."""
        return self._kf.adapter

    @property
    def config(self) -> KalmanConfig:
        """The settings of the filter."""
        return self._kf.config

    @property
    def state(self) -> FilterState:
        """The state of the filter, with the loc and scale that SVI may have moved."""
        stored = self.store.read()
        loc, scale = self.loc.detach().clone(), self.scale.detach()
        belief = stored.state.belief.with_mean(loc)
        return stored.state._replace(belief=belief if bool((scale == 1.0).all()) else rescaled(belief, scale))

    @state.setter
    def state(self, state: FilterState) -> None:
        self.store.write(state)

    def init(self, inputs: Inputs) -> FilterState:
        """The state, with the scale of the prior measured on ``inputs`` unless it has one already."""
        stored = self.store.read().state
        if not stored.prior_is_scaled:
            self.store.write(self._kf.scale_prior(stored, inputs), keep_params=True)
        return self.state

    def update(self, inputs: Inputs, targets: Tensor) -> UpdateInfo:
        """The report of one ``KalmanFilter.update`` with a batch, which advances the guide.

        Args:
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            targets: (B,) class labels, or (B, m) numbers for the other likelihoods.

        Raises:
            ValueError: if inputs or targets do not fit.
            DivergenceError: if the filter refuses the update. The guide is not changed by an error.
        """
        self.state, info = self._kf.update(self.state, inputs, targets)
        return info

    def posterior(self) -> Any:
        """The :class:`~bayes_kf.Posterior` of the present state, without a history.

        Its covariance is S P S with the scale of the guide, exactly in every structure of the package: a low-rank
        precision D + WWᵀ becomes S⁻¹(D + WWᵀ)S⁻¹. Later updates do not change it.

        Raises:
            ValueError: if SVI moved the scale and the structure is none of the package's.
        """
        return self._kf.posterior(self.state)

    def prepare(self, inputs: Inputs | None) -> None:
        """Give the prior its scale, if it has none yet.

        Raises:
            ValueError: if there are no inputs for it.
        """
        if self.store.read().state.prior_is_scaled:
            return
        if inputs is None:
            raise ValueError(
                "`inputs` must be given before the first update, since the prior takes its scale from them, got None."
            )
        self.init(inputs)

    def forward(self, inputs: Inputs | None = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A draw of every site, name -> tensor.

        The arguments are the model's. Before the first update the prior takes its scale from ``inputs``.

        Raises:
            ValueError: if the prior needs inputs for its scale and there are none.
        """
        self.prepare(inputs)
        stored = self.store.read()
        loc, scale = self.loc, self.scale * stored.temperature**0.5
        if isinstance(stored.state.belief, DiagonalGaussian):
            return self._sample_sites(loc, scale * stored.marginal_sd)
        return self._sample_joint()

    def _sample_sites(self, loc: Tensor, sd: Tensor) -> dict[str, Tensor]:
        locs, sds = self.adapter.unflatten(loc), self.adapter.unflatten(sd)
        return {name: pyro.sample(name, dist.Normal(locs[name], sds[name]).to_event(locs[name].dim())) for name in locs}

    def noise_map(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The map z → θ of standard normal draws (..., n) to the guide's, and the log of its volume factor."""
        stored, loc = self.store.read(), self.loc
        scale = self.scale * stored.temperature**0.5
        return lambda noise: loc + scale * stored.root(noise), stored.half_log_determinant + scale.double().log().sum()

    def _sample_joint(self) -> dict[str, Tensor]:
        """Draw all tensors at once from an auxiliary site; the site of each tensor is a point mass at its part."""
        adapter, (to_parameters, log_volume) = self.adapter, self.noise_map()
        standard = dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)
        noise = pyro.sample(f"{self._pyro_name}_joint", standard, infer={"is_auxiliary": True})
        plates = noise.shape[:-1]
        split = to_parameters(noise).split(adapter.sizes, -1)
        zeros = torch.zeros(plates, dtype=noise.dtype, device=noise.device)
        parts = {
            name: part.reshape(*plates, *shape)
            for name, part, shape in zip(adapter.names, split, adapter.shapes, strict=True)
        }
        densities = dict.fromkeys(parts, zeros)
        densities[adapter.names[0]] = zeros - log_volume.to(noise)  # counted once
        return {
            name: pyro.sample(name, dist.Delta(part, densities[name], event_dim=part.dim() - len(plates)))
            for name, part in parts.items()
        }

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every site, name -> tensor; it is the mean. The arguments are not used."""
        return self.adapter.unflatten(self.loc.detach().clone())

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of every number's marginal, name -> (Q, ...).

        Args:
            quantiles: Q probabilities in [0, 1].
            args: not used.
            kwargs: not used.

        Raises:
            ValueError: if a probability lies outside [0, 1].
        """
        loc, sd = self._loc_scale()
        probs = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device).reshape(-1)
        if not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError(f"`quantiles` must lie in [0, 1], got {probs.tolist()}.")
        values = dist.Normal(loc, sd).icdf(probs.unsqueeze(-1))  # (Q, n)
        parts = zip(self.adapter.names, values.split(self.adapter.sizes, -1), self.adapter.shapes, strict=True)
        return {name: part.reshape(len(probs), *shape) for name, part, shape in parts}

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The distribution of all sites as one vector, (n,), in the order of ``adapter.names``.

        Normal with independent numbers for a diagonal covariance, MultivariateNormal otherwise. A low-rank *precision*
        is not the low-rank covariance of LowRankMultivariateNormal. Gradients reach loc and scale.

        Raises:
            ValueError: if the covariance is not diagonal and n is above 20,000.
        """
        stored, loc = self.store.read(), self.loc
        scale, size = self.scale * stored.temperature**0.5, len(loc)
        if isinstance(stored.state.belief, DiagonalGaussian):
            return dist.Normal(loc, scale * stored.marginal_sd).to_event(1)
        if size > MAX_MATRIX:
            raise ValueError(f"`get_posterior` takes at most {MAX_MATRIX:,} parameters, got {size:,}.")
        covariance = scale.unsqueeze(-1) * stored.state.belief.covariance_matrix() * scale
        return dist.MultivariateNormal(loc, 0.5 * (covariance + covariance.mT))

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The mean and the marginal standard deviations, (n,) each."""
        stored = self.store.read()
        return self.loc, self.scale * stored.temperature**0.5 * stored.marginal_sd

    def _current_posterior(self, inputs: Inputs | None) -> GaussianPosterior:
        """The posterior whose prior, noise and temperature :attr:`model` uses in a call."""
        stored = self.store.read()
        if inputs is not None and not stored.state.prior_is_scaled:
            self.init(inputs)
            stored = self.store.read()
        return GaussianPosterior(self._kf, stored.state)
