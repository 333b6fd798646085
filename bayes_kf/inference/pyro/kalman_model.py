"""The Pyro model over a module's trainable tensors, with one sample site per tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs, to_device
from bayes_kf.models.batched_forward import outputs_of_draws


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
        adapter: the model.
        posterior: from inputs (or None) to the posterior that has the prior, the noise and the temperature of a call.
    """

    def __init__(self, adapter: AdapterModel, posterior: Callable[[Inputs | None], GaussianPosterior]) -> None:
        self.adapter, self.posterior = adapter, posterior

    @classmethod
    def of(cls, posterior: GaussianPosterior) -> KalmanModel:
        """The model of a fixed posterior."""
        return cls(posterior.adapter, lambda _: posterior)

    def __call__(self, inputs: Inputs, targets: Tensor | None = None, num_data: int | None = None) -> Tensor:
        """Sample θ and y; see the class."""
        posterior = self.posterior(inputs)
        prior, temperature = posterior.state.prior, posterior.temperature
        means, sds = self.adapter.unflatten(prior.mean), self.adapter.unflatten((temperature * prior.variance).sqrt())
        sites = {
            name: pyro.sample(name, dist.Normal(mean, sds[name]).to_event(mean.dim())) for name, mean in means.items()
        }
        with poutine.scale(scale=1.0 / temperature):
            return self.observe(sites, inputs, targets, num_data)

    def observe(
        self,
        sites: Mapping[str, Tensor],
        inputs: Inputs,
        targets: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """The part of the model below the priors: the sites ``outputs`` and ``y`` in the plate ``data``.

        Args:
            sites: a tensor for every name in ``adapter.names``, of its shape; plates around the call go before it.
            inputs: a batch of B examples.
            targets: observed values of ``y``; None draws them.
            num_data: number of examples that the batch stands for; B by default.

        Raises:
            ValueError: if a tensor is missing or does not fit, or targets do not fit the likelihood.
        """
        batch = Batch.of(to_device(inputs, self.adapter.device))
        posterior = self.posterior(None)
        outputs = self.outputs(sites, batch, posterior)
        if targets is None:
            outputs = posterior.scaled_logits(outputs)
        else:
            one = outputs.reshape(-1, *outputs.shape[-2:])[0]
            targets = posterior.likelihood.check(one, targets.to(outputs.device))
        subsample = torch.arange(batch.size, device=outputs.device)
        with pyro.plate("data", num_data or batch.size, subsample=subsample, dim=-1):
            pyro.deterministic("outputs", outputs, event_dim=1)
            return pyro.sample("y", posterior.likelihood.distribution(outputs), obs=targets)  # type: ignore[arg-type]

    def outputs(self, sites: Mapping[str, Tensor], batch: Batch, posterior: GaussianPosterior) -> Tensor:
        """Raw outputs, (*plates, B, m), of tensors whose leading dimensions are the plates around the call.

        Args:
            sites: as for :meth:`observe`.
            batch: of B examples.
            posterior: it says how many adapters fit in memory together.

        Raises:
            ValueError: if a tensor is missing or does not fit.
        """
        shapes, leading = dict(zip(self.adapter.names, self.adapter.shapes, strict=True)), {}
        for name, shape in shapes.items():
            if name not in sites:
                raise ValueError(f"`sites` must hold every trainable tensor, got none for {name!r}.")
            site, dims = sites[name], len(shape)
            if site.shape[site.dim() - dims :] != shape:
                raise ValueError(f"`sites` must end in the shape {tuple(shape)} for {name!r}, got {tuple(site.shape)}.")
            plates = site.shape[: site.dim() - dims]
            # dimension -1 belongs to the data and has size 1 in a tensor; Pyro omits that 1 from given draws
            leading[name] = plates[:-1] if plates and plates[-1] == 1 else plates
        plates = torch.broadcast_shapes(*leading.values())
        flat = [
            sites[name]
            .reshape(*leading[name], -1)
            .expand(*plates, -1)
            .reshape(plates.numel(), -1)
            .to(self.adapter.dtype)
            for name in shapes
        ]
        draws = torch.cat(flat, 1)  # (S, n)
        at_once = None if len(draws) == 1 else posterior.adapters_at_once(batch)
        outputs = outputs_of_draws(self.adapter, draws, batch.inputs, at_once, gradients=torch.is_grad_enabled())
        return outputs.reshape(*plates, *outputs.shape[1:])
