"""The Pyro model of a mixture: a member, its prior, and the likelihood of its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.pyro.kalman_model import KalmanModel
from bayes_kf.inference.pyro.mixture.member_distribution import MEMBER, MemberDistribution, choose
from bayes_kf.models.batch import Batch, Inputs, to_device


class MixtureModel:
    """The Pyro model over a module's trainable tensors in which each member has a prior of its own.

        member ~ Categorical(1/K),    θ | member = k ~ N(μ₀ₖ, Tₖ·diag(p₀ₖ)),    p(y | x, θ)^(1/Tₖ)

    Given the member it is the :class:`KalmanModel` of that member. Before the data all members are equally probable:
    the weights of a mixture are probabilities of the members after data, and belong to the guide.

    The site ``member`` is marked for parallel enumeration: ``TraceEnum_ELBO`` sums it out, and NUTS does where
    ``max_plate_nesting`` is 1. Calls and the other sites are those of :class:`KalmanModel`.

    Args:
        members: from inputs (or None) to the posteriors whose priors, noise and temperatures a call uses. All of them
            are over one adapter.
    """

    def __init__(self, members: Callable[[Inputs | None], Sequence[GaussianPosterior]]) -> None:
        self._members = members

    @classmethod
    def of(cls, members: Sequence[GaussianPosterior]) -> MixtureModel:
        """The model of fixed posteriors."""
        return cls(lambda _: members)

    def __call__(self, inputs: Inputs, targets: Tensor | None = None, num_data: int | None = None) -> Tensor:
        """Sample the member, θ and y; see the class."""
        members = self._members(inputs)
        adapter = members[0].adapter
        weights = members[0].mean_vector.new_full((len(members),), 1.0 / len(members))
        member = pyro.sample(MEMBER, dist.Categorical(weights), infer={"enumerate": "parallel"})
        means = [adapter.unflatten(m.state.prior.mean) for m in members]
        sds = [adapter.unflatten((m.temperature * m.state.prior.variance).sqrt()) for m in members]
        sites = {}
        for name, shape in zip(adapter.names, adapter.shapes, strict=True):
            priors = [
                dist.Normal(mean[name], sd[name]).to_event(len(shape)) for mean, sd in zip(means, sds, strict=True)
            ]
            sites[name] = pyro.sample(name, MemberDistribution(member, priors))
        return self.observe(member, sites, inputs, targets, num_data)

    def observe(
        self,
        member: Tensor,
        sites: Mapping[str, Tensor],
        inputs: Inputs,
        targets: Tensor | None = None,
        num_data: int | None = None,
    ) -> Tensor:
        """The part of the model below the priors: the sites ``outputs`` and ``y`` in the plate ``data``.

        Args:
            member: the value of the site ``member``, which chooses the noise and the temperature.
            sites: as for :meth:`KalmanModel.observe`.
            inputs: a batch of B examples.
            targets: observed values of ``y``; None draws them.
            num_data: number of examples that the batch stands for; B by default.

        Raises:
            ValueError: if a tensor is missing or does not fit, or targets do not fit the likelihood.
        """
        members = self._members(None)
        adapter = members[0].adapter
        batch = Batch.of(to_device(inputs, adapter.device))
        raw = KalmanModel.of(members[0]).outputs(sites, batch, members[0])
        each = [raw if targets is not None else m.scaled_logits(raw) for m in members]  # (*plates, B, m)
        if targets is not None:
            targets = members[0].likelihood.check(raw.reshape(-1, *raw.shape[-2:])[0], targets.to(raw.device))
        parts = [m.likelihood.distribution(outputs) for m, outputs in zip(members, each, strict=True)]
        likelihood = MemberDistribution(member, parts, [m.temperature for m in members])  # type: ignore[arg-type]
        subsample = torch.arange(batch.size, device=raw.device)
        with pyro.plate("data", num_data or batch.size, subsample=subsample, dim=-1):
            _record("outputs", choose(member, each, 1))
            return pyro.sample("y", likelihood, obs=targets)


def _record(name: str, value: Tensor) -> None:
    """As ``pyro.deterministic``, whose log density is float32 and does not go into the sums of a float64 model."""
    fn = dist.Delta(value, value.new_zeros(value.shape[:-1]), event_dim=1)
    pyro.sample(name, fn, obs=value, infer={"_deterministic": True})
