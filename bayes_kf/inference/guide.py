"""The adapter as a Pyro model and its belief as a Pyro guide; both sample one site per tensor, under its name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from bayes_kf.inference import diagonal, noise
from bayes_kf.models.adapter import Inputs, batch_size, to_device

if TYPE_CHECKING:
    from bayes_kf.inference.posterior import Posterior

_COUNTER = itertools.count()


class KalmanModel:
    """θ ~ N(μ₀, diag(p₀)), the filter's prior, site by site; y ~ likelihood(f(θ, x)) as site ``y``.

    Called ``(inputs, targets=None, num_data=None)``; returns ``y``. The raw outputs η are the deterministic site
    ``outputs``. With ``num_data``, a batch stands for that many examples (for SVI on minibatches). The user's module is
    not turned into a Pyro module: its tensors are replaced for the length of a call.

    Args:
        posterior: gives the module, the prior and the likelihood.
    """

    def __init__(self, posterior: Posterior) -> None:
        self.adapter = posterior.adapter
        prior = posterior.state.prior
        self.prior_mean = self.adapter.unflatten(prior.mean)
        self.prior_sd = self.adapter.unflatten(prior.variance.sqrt())
        self.family = noise.likelihood(posterior.config, posterior.state.noise)

    def __call__(self, inputs: Inputs, targets: Tensor | None = None, num_data: int | None = None) -> Tensor:
        """Sample θ and y; see the class."""
        inputs = to_device(inputs, self.adapter.device)
        sites = {
            name: pyro.sample(name, dist.Normal(self.prior_mean[name], self.prior_sd[name]).to_event(len(shape)))
            for name, shape in zip(self.adapter.names, self.adapter.shapes, strict=True)
        }
        tensors = {name: sites[name].to(dtype) for name, dtype in zip(sites, self.adapter.dtypes, strict=True)}
        with self.adapter.evaluating():
            outputs = self.adapter.call(tensors, inputs).to(self.adapter.dtype)
        pyro.deterministic("outputs", outputs)
        if targets is not None:
            targets = self.family.check(outputs, targets.to(outputs.device))
        size = batch_size(inputs)
        with pyro.plate("data", num_data or size, subsample=torch.arange(size, device=outputs.device)):
            return pyro.sample("y", self.family.distribution(outputs), obs=targets)  # type: ignore[arg-type]


class KalmanGuide(PyroModule):
    """The belief as a guide: same sites as :class:`KalmanModel`, drawn from N(μ, temperature·P).

    Its mean ``loc`` and spread ``scale`` are Pyro parameters that start at the belief, so SVI goes on from there. A
    diagonal belief has the standard deviations as its scale. A correlated one draws θ = loc + P^(1/2) z with
    z ~ N(0, scale²): its correlations stay and the scale along its axes learns. Each guide keeps its parameters under
    a name of its own in the parameter store, so several posteriors can be used in one process.

    Args:
        posterior: the belief to start from; it is not changed by training the guide.
    """

    loc: Tensor  # a PyroParam, read as the constrained tensor
    scale: Tensor

    def __init__(self, posterior: Posterior) -> None:
        super().__init__(name=f"kalman_guide_{next(_COUNTER)}")
        self._adapter, belief = posterior.adapter, posterior.state.belief
        spread = posterior.temperature**0.5
        self._root: Callable[[Tensor], Tensor] | None = None
        self.loc = PyroParam(posterior.mean_vector.clone())  # type: ignore[assignment]
        if isinstance(belief, diagonal.State):
            sd = spread * posterior.variance_vector.sqrt()
            self.scale = PyroParam(sd, constraints.positive)  # type: ignore[assignment]
        else:
            self._root = posterior.config.structure.root(belief)
            self._log_volume = 0.5 * posterior.config.structure.log_determinant(belief).to(posterior.mean_vector)
            sd = torch.full_like(posterior.mean_vector, spread)
            self.scale = PyroParam(sd, constraints.positive)  # type: ignore[assignment]

    def forward(
        self, inputs: Inputs | None = None, targets: Tensor | None = None, num_data: int | None = None
    ) -> dict[str, Tensor]:
        """Sample every site; the arguments are the model's and are not used. Returns name -> draw."""
        return self._sample_sites() if self._root is None else self._sample_joint(self._root)

    def _sample_sites(self) -> dict[str, Tensor]:
        locs, scales = self._adapter.unflatten(self.loc), self._adapter.unflatten(self.scale)
        return {
            name: pyro.sample(name, dist.Normal(locs[name], scales[name]).to_event(locs[name].dim())) for name in locs
        }

    def _sample_joint(self, root: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """All tensors at once from an auxiliary site, then each as a point mass at its part."""
        standard = dist.Normal(torch.zeros_like(self.loc), self.scale).to_event(1)
        noise = pyro.sample(f"{self._pyro_name}_joint", standard, infer={"is_auxiliary": True})
        parts = self._adapter.unflatten(self.loc + root(noise))
        densities = {name: self._log_volume * 0.0 for name in parts}
        densities[self._adapter.names[0]] = -self._log_volume  # of the map from noise to parameters, counted once
        return {
            name: pyro.sample(name, dist.Delta(part, densities[name], event_dim=part.dim()))
            for name, part in parts.items()
        }
