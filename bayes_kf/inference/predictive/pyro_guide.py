"""The adapter as a Pyro model and its posterior as a Pyro guide; both have one sample site per tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Batch, Inputs, to_device
from bayes_kf.models.batched_forward import outputs_of_draws

_COUNTER = itertools.count()


class KalmanModel:
    """The Pyro model whose posterior is N(μ, T·P), with one sample site for each tensor.

    With the filter's prior N(μ₀, diag(p₀)) and the temperature T of the posterior, the model is

        θ ~ N(μ₀, T·diag(p₀)),    p(y | x, θ)^(1/T) in place of the likelihood.

    Prior and likelihood are both raised to the power 1/T. A linear-Gaussian model then has the posterior N(μ, T·P)
    exactly, for every T: SVI starts at its optimum, and NUTS finds the guide's covariance. The negative ELBO is that of
    the tempered model; multiply it by T to compare temperatures. At T = 1 it is the plain model.

    A call ``(inputs, targets=None, num_data=None)`` returns a draw of ``y``; the temperature does not flatten its
    distribution. The raw outputs η are the deterministic site ``outputs``, (B, m), inside the plate ``data`` (dimension
    −1). Without targets they are divided by ``softmax_temperature``, so that ``Predictive`` with the guide has the
    distribution of ``posterior.predict(method="sampled")``. With ``num_data``, a batch stands for that many examples
    (for SVI on minibatches). Outer plates (``Predictive(parallel=True)``, ``Trace_ELBO(vectorize_particles=True)``)
    draw many adapters, which run in one batched forward pass.

    The user's module does not become a Pyro module: its tensors are replaced during a call.

    Args:
        posterior: it provides the module, the prior, the likelihood and the temperature.
    """

    def __init__(self, posterior: GaussianPosterior) -> None:
        self.adapter, self._posterior = posterior.adapter, posterior
        prior, self.temperature = posterior.state.prior, posterior.temperature
        self.prior_mean = self.adapter.unflatten(prior.mean)
        self.prior_sd = self.adapter.unflatten((self.temperature * prior.variance).sqrt())
        self.family = posterior.likelihood

    def __call__(self, inputs: Inputs, targets: Tensor | None = None, num_data: int | None = None) -> Tensor:
        """Sample θ and y; see the class."""
        batch = Batch.of(to_device(inputs, self.adapter.device))
        sites = {
            name: pyro.sample(name, dist.Normal(self.prior_mean[name], self.prior_sd[name]).to_event(len(shape)))
            for name, shape in zip(self.adapter.names, self.adapter.shapes, strict=True)
        }
        outputs = self._outputs(sites, batch)
        if targets is None:
            outputs = self._posterior.scaled_logits(outputs)
        else:
            one = outputs.reshape(-1, *outputs.shape[-2:])[0]
            targets = self.family.check(one, targets.to(outputs.device))
        subsample = torch.arange(batch.size, device=outputs.device)
        with pyro.plate("data", num_data or batch.size, subsample=subsample, dim=-1):
            pyro.deterministic("outputs", outputs, event_dim=1)
            with poutine.scale(scale=1.0 / self.temperature):
                return pyro.sample("y", self.family.distribution(outputs), obs=targets)  # type: ignore[arg-type]

    def _outputs(self, sites: dict[str, Tensor], batch: Batch) -> Tensor:
        """Raw outputs, (*plates, B, m), of tensors whose leading dimensions are the plates around the call."""
        shapes = dict(zip(self.adapter.names, self.adapter.shapes, strict=True))
        leading = {name: site.shape[: site.dim() - len(shapes[name])] for name, site in sites.items()}
        # dimension -1 belongs to the data and has size 1 in a tensor; Pyro omits that 1 from given draws
        leading = {name: shape[:-1] if shape and shape[-1] == 1 else shape for name, shape in leading.items()}
        plates = torch.broadcast_shapes(*leading.values())
        flat = [
            site.reshape(*leading[name], -1).expand(*plates, -1).reshape(plates.numel(), -1).to(self.adapter.dtype)
            for name, site in sites.items()
        ]
        draws = torch.cat(flat, 1)  # (S, n)
        at_once = None if len(draws) == 1 else self._posterior.adapters_at_once(batch)
        outputs = outputs_of_draws(self.adapter, draws, batch.inputs, at_once, gradients=torch.is_grad_enabled())
        return outputs.reshape(*plates, *outputs.shape[1:])


class KalmanGuide(PyroModule):
    """A Pyro guide with the sites of :class:`KalmanModel`, drawn from N(μ, temperature·P).

    Its ``loc`` and ``scale`` are Pyro parameters that start at the posterior, so SVI continues from there. With a
    diagonal covariance the scale is the standard deviation of each parameter. Otherwise θ = loc + P^(1/2) z with
    z ~ N(0, scale²): the correlations stay, and SVI fits the scale along the axes. Each guide has its own name in the
    parameter store, so several posteriors can be used in one process.

    Args:
        posterior: the start; training the guide does not change it.
    """

    loc: Tensor  # a PyroParam, read as the constrained tensor
    scale: Tensor

    def __init__(self, posterior: GaussianPosterior) -> None:
        super().__init__(name=f"kalman_guide_{next(_COUNTER)}")
        self._adapter, belief = posterior.adapter, posterior.state.belief
        spread = posterior.temperature**0.5
        self._root: Callable[[Tensor], Tensor] | None = None
        self.loc = PyroParam(posterior.mean_vector.clone())  # type: ignore[assignment]
        if isinstance(belief, DiagonalGaussian):
            sd = spread * posterior.variance_vector.sqrt()
            self.scale = PyroParam(sd, constraints.positive)  # type: ignore[assignment]
        else:
            self._root = belief.root()
            self._log_volume = 0.5 * belief.log_determinant().to(posterior.mean_vector)
            sd = torch.full_like(posterior.mean_vector, spread)
            self.scale = PyroParam(sd, constraints.positive)  # type: ignore[assignment]

    def forward(
        self, inputs: Inputs | None = None, targets: Tensor | None = None, num_data: int | None = None
    ) -> dict[str, Tensor]:
        """A draw of every site, name -> tensor; the arguments are those of the model and are not used."""
        return self._sample_sites() if self._root is None else self._sample_joint(self._root)

    def _sample_sites(self) -> dict[str, Tensor]:
        locs, scales = self._adapter.unflatten(self.loc), self._adapter.unflatten(self.scale)
        return {
            name: pyro.sample(name, dist.Normal(locs[name], scales[name]).to_event(locs[name].dim())) for name in locs
        }

    def _sample_joint(self, root: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Draw all tensors at once from an auxiliary site; the site of each tensor is a point mass at its part."""
        standard = dist.Normal(torch.zeros_like(self.loc), self.scale).to_event(1)
        noise = pyro.sample(f"{self._pyro_name}_joint", standard, infer={"is_auxiliary": True})
        plates = noise.shape[:-1]
        split = (self.loc + root(noise)).split(self._adapter.sizes, -1)
        zeros = torch.zeros(plates, dtype=noise.dtype, device=noise.device)
        parts = {
            name: part.reshape(*plates, *shape)
            for name, part, shape in zip(self._adapter.names, split, self._adapter.shapes, strict=True)
        }
        densities = dict.fromkeys(parts, zeros)
        densities[self._adapter.names[0]] = zeros - self._log_volume  # Jacobian of the map z -> θ, counted once
        return {
            name: pyro.sample(name, dist.Delta(part, densities[name], event_dim=part.dim() - len(plates)))
            for name, part in parts.items()
        }
