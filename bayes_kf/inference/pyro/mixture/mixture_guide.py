"""Several filters as one Pyro guide, with a site for the member that can be summed out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroParam
from torch import Tensor, nn

from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior, check_members, reweighted
from bayes_kf.inference.predictive.targets.quantile_search import root
from bayes_kf.inference.pyro.guide_store import put_param
from bayes_kf.inference.pyro.kalman_guide import KalmanGuide
from bayes_kf.inference.pyro.mixture.member_distribution import MEMBER, MemberDistribution, choose
from bayes_kf.inference.pyro.mixture.mixture_model import MixtureModel
from bayes_kf.inference.pyro.sample_moments import flat_draws
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs

_COUNTER = itertools.count()


class MixtureGuide(AutoGuide):
    """A Pyro guide whose distribution is a mixture of Gaussians, each the belief of a Kalman filter.

    The site ``member`` is Categorical(weights); given its value k, the sites of the tensors are those of the
    :class:`KalmanGuide` of member k. ``member`` is marked for parallel enumeration, so ``TraceEnum_ELBO`` sums it out.
    ``weights`` and each member's ``loc`` and ``scale`` are Pyro parameters, which ``SVI`` can train too. The state of
    the guide is in the parameter store, as ``<name>.weights``, ``<name>.member_0.loc`` and so on.

    If all members have diagonal covariances, the tensors' sites are Normal, and ``pyro.condition`` may fix them:
    the sum over ``member`` is then the density of the mixture, and ``infer_discrete`` draws the member. Otherwise they
    are parts of one draw, as in :class:`KalmanGuide`. :meth:`member_probs` is exact in both cases.

    Args:
        members: posteriors over one adapter, at most one of which needs to have learned anything.
        weights: as many positive numbers that add up to 1; equal ones by default.
        name: of the guide in the parameter store; by default a new one.

    Raises:
        ValueError: if the members do not fit together, the weights do not fit, or a tensor has the name ``member``.
    """

    weights: Tensor  # a PyroParam, read as a constrained tensor

    def __init__(
        self, members: Sequence[GaussianPosterior], weights: Sequence[float] | None = None, *, name: str | None = None
    ) -> None:
        values = [1.0 / len(members)] * len(members) if weights is None and members else list(weights or [])
        _check(members, values)
        super().__init__(MixtureModel(self._current_members))
        taken = pyro.get_param_store()
        unused = (f"mixture_guide_{number}" for number in _COUNTER)
        self._pyro_name = name or next(n for n in unused if f"{n}.weights" not in taken)
        adapter = members[0].adapter
        guides = [
            KalmanGuide(adapter, member.config, state=member.state, name=f"{self._pyro_name}.member_{number}")
            for number, member in enumerate(members)
        ]
        self._guides = tuple(guides)  # a tuple, so that their parameters keep their own names
        self.weights = PyroParam(torch.tensor(values, dtype=torch.float64), constraints.simplex)  # type: ignore[assignment]
        self._put_weights(values)

    def __getattr__(self, name: str) -> Any:
        if name != "weights":
            return super().__getattr__(name)
        with self._pyro_context:  # so that a state set in the store is seen at once
            return super().__getattr__(name)

    @property
    def members(self) -> tuple[KalmanGuide, ...]:
        """The guide of every member; number k belongs to the value k of the site ``member``."""
        return self._guides

    @property
    def adapter(self) -> AdapterModel:
        """The model as a function of its trainable tensors; ``names`` and ``shapes`` are those of the sites."""
        return self._guides[0].adapter

    def update(self, inputs: Inputs, targets: Tensor) -> tuple[UpdateInfo, ...]:
        """The reports of one filter update of every member; its weight is multiplied by its p(y | x) before.

        Args:
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            targets: (B,) class labels, or (B, m) numbers for the other likelihoods.

        Raises:
            ValueError: if inputs or targets do not fit.
            DivergenceError: if a member refuses the update. The guide is not changed by an error.
        """
        predictions = [guide.posterior().predict(inputs, targets=targets).log_prob for guide in self._guides]
        evidence = [float(log_prob.double().sum()) for log_prob in predictions]
        updates = [guide._kf.update(guide.state, inputs, targets) for guide in self._guides]
        for guide, (state, _) in zip(self._guides, updates, strict=True):
            guide.state = state
        self._put_weights(reweighted(self.weights.detach().tolist(), evidence))
        return tuple(info for _, info in updates)

    def posterior(self) -> Any:
        """The :class:`~bayes_kf.MixturePosterior` of the present state, without a history.

        Its members are ordered by weight. Later updates do not change it.
        """
        members = [guide.posterior() for guide in self._guides]
        weights = reweighted(self.weights.detach().tolist(), [0.0] * len(members))
        return type(members[0]).mixture_type(tuple(members), weights)

    def forward(self, inputs: Inputs | None = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A draw of the member and of every tensor's site, name -> tensor; the arguments are the model's.

        Raises:
            ValueError: if a prior needs inputs for its scale and there are none.
        """
        for guide in self._guides:
            guide.prepare(inputs)
        weights = self.weights.to(self._guides[0].loc)  # densities of one dtype, or they cannot be summed
        member = pyro.sample(MEMBER, dist.Categorical(weights), infer={"enumerate": "parallel"})
        is_diagonal = all(isinstance(guide.store.read().state.belief, DiagonalGaussian) for guide in self._guides)
        sites = self._sample_sites(member) if is_diagonal else self._sample_joint(member)
        return {MEMBER: member} | sites

    def member_probs(self, sites: Mapping[str, Tensor]) -> Tensor:
        """The probabilities of the members given the tensors' values, p(member | θ), in float64, (S, K).

        In closed form, w_k N(θ; μ_k, P_k) over its sum over k: what ``infer_discrete`` draws from.

        Args:
            sites: a tensor (S, ...) of S values for every site, as ``Predictive`` returns them.

        Raises:
            ValueError: if a site is missing or does not fit.
        """
        draws = flat_draws(self.adapter, sites)
        densities = torch.stack([guide.posterior().log_density(draws) for guide in self._guides], 1)
        return (densities + self.weights.detach().log()).softmax(1)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every number's marginal, name -> tensor. The arguments are not used.

        Medians of several tensors belong to no member together: as a point to start from take one member's,
        ``guide.members[0].median()``.
        """
        return {name: values[0] for name, values in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of every number's marginal, a mixture of K normals, name -> (Q, ...); a search to 1e-12.

        Args:
            quantiles: Q probabilities in (0, 1).
            args: not used.
            kwargs: not used.

        Raises:
            ValueError: if a probability does not lie in (0, 1).
        """
        levels = torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1)
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError(f"`quantiles` must lie in (0, 1), got {levels.tolist()}.")
        moments = [guide._loc_scale() for guide in self._guides]
        locs, sds = (torch.stack([m[i].double() for m in moments]) for i in range(2))  # (K, n)
        shares, normal = self.weights.unsqueeze(1), dist.Normal(locs, sds)
        ends = [normal.icdf(level.expand_as(locs)) for level in levels]  # a mixture's quantile lies between its parts'
        rows = [
            root(lambda at: (shares * normal.cdf(at)).sum(0), float(level), end.amin(0), end.amax(0))
            for level, end in zip(levels, ends, strict=True)
        ]
        values = torch.stack(rows).to(self._guides[0].loc)
        parts = zip(self.adapter.names, values.split(self.adapter.sizes, 1), self.adapter.shapes, strict=True)
        return {name: part.reshape(len(levels), *shape) for name, part, shape in parts}

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The distribution of all tensors as one vector, (n,): a MixtureSameFamily of Normals or MultivariateNormals.

        Raises:
            ValueError: if a covariance is not diagonal and n is above 20,000.
        """
        parts = [guide.get_posterior() for guide in self._guides]
        locs = torch.stack([part.mean for part in parts])
        if all(isinstance(part, torch.distributions.Independent) for part in parts):
            components: Any = dist.Normal(locs, torch.stack([part.stddev for part in parts])).to_event(1)
        else:
            covariances = [
                torch.diag(part.variance)
                if isinstance(part, torch.distributions.Independent)
                else part.covariance_matrix
                for part in parts
            ]
            components = dist.MultivariateNormal(locs, torch.stack(covariances))
        return dist.MixtureSameFamily(dist.Categorical(self.weights.to(locs)), components)

    def _sample_sites(self, member: Tensor) -> dict[str, Tensor]:
        moments = [guide._loc_scale() for guide in self._guides]
        locs, sds = ([self.adapter.unflatten(m[i]) for m in moments] for i in range(2))
        sites = {}
        for name, shape in zip(self.adapter.names, self.adapter.shapes, strict=True):
            parts = [dist.Normal(loc[name], sd[name]).to_event(len(shape)) for loc, sd in zip(locs, sds, strict=True)]
            sites[name] = pyro.sample(name, MemberDistribution(member, parts))
        return sites

    def _sample_joint(self, member: Tensor) -> dict[str, Tensor]:
        """All tensors from one auxiliary site, by the chosen member's map; see ``KalmanGuide``."""
        loc = self._guides[0].loc
        standard = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        noise = pyro.sample(f"{self._pyro_name}_joint", standard, infer={"is_auxiliary": True})
        maps = [guide.noise_map() for guide in self._guides]
        vector = choose(member, [apply(noise) for apply, _ in maps], 1)
        density = choose(member, [-log_volume.to(noise) for _, log_volume in maps])
        plates = vector.shape[:-1]
        sites = {}
        for number, (name, part, shape) in enumerate(
            zip(self.adapter.names, vector.split(self.adapter.sizes, -1), self.adapter.shapes, strict=True)
        ):
            counted = density.expand(plates) if number == 0 else torch.zeros_like(density).expand(plates)
            value = part.reshape(*plates, *shape)
            sites[name] = pyro.sample(name, dist.Delta(value, counted, event_dim=len(shape)))
        return sites

    def _put_weights(self, weights: Sequence[float]) -> None:
        """New weights in the store, as a new tensor."""
        values = torch.tensor(weights, dtype=torch.float64)
        to_simplex = torch.distributions.transform_to(constraints.simplex)
        put_param(self, "weights", nn.Parameter(to_simplex.inv(values)), constraints.simplex)

    def _current_members(self, inputs: Inputs | None) -> list[GaussianPosterior]:
        """The posteriors whose priors, noise and temperatures :attr:`model` uses in a call."""
        return [guide._current_posterior(inputs) for guide in self._guides]


def _check(members: Sequence[GaussianPosterior], weights: Sequence[float]) -> None:
    """Raise ValueError if members and weights are not those of a mixture."""
    check_members(members, weights)
    if MEMBER in members[0].adapter.names:
        raise ValueError(f"`members` must have no tensor named {MEMBER!r}, the name of the member's site, got one.")
