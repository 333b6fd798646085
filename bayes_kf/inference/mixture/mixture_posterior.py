"""The posterior that the default fit returns: a mixture of several Gaussians over one model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.heldout import calibration
from bayes_kf.inference.mixture.mixture_prediction import member_generators, predict_mixture
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive import arviz_export, predict
from bayes_kf.inference.predictive.gaussian_posterior import check_members, reweighted
from bayes_kf.inference.predictive.prediction import LoaderPrediction, Prediction
from bayes_kf.inference.predictive.text.text_predictions import TextPredictions
from bayes_kf.inference.pyro import sample_moments
from bayes_kf.inference.saving import pretrained
from bayes_kf.inference.saving.hub_upload import HubUpload
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.models.likelihood import Likelihood
from bayes_kf.processes.launched import working_together
from bayes_kf.processes.random_state import use_random_state_of_first
from bayes_kf.processes.whole_loader import whole_loader

if TYPE_CHECKING:
    from bayes_kf.inference.pyro.mixture.mixture_guide import MixtureGuide

OF_ONE_MEMBER = ("kf", "state", "mean_vector", "variance_vector", "covariance_matrix", "filter", "prior_variance")


@dataclass(frozen=True, repr=False)
class MixturePosterior(TextPredictions, HubUpload):
    """Σ_k w_k N(μ_k, P_k) over the trainable tensors of a model: several :class:`Posterior` s with weights.

    Predictions, draws and text come from all members. What belongs to one Gaussian (``state``, ``kf``,
    ``covariance_matrix``, ...) is an attribute of a member: ``mixture.best.state``, ``mixture.members[1].state``.

    Attributes:
        members: K posteriors of one model; the one with the largest weight first.
        weights: w, K positive numbers that add up to 1.
        history: series of the fit of the first member, see :class:`Posterior`.
    """

    members: tuple[Posterior, ...]
    weights: tuple[float, ...]
    history: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        members, weights = tuple(self.members), tuple(float(w) for w in self.weights)
        check_members(members, weights)
        for number, member in enumerate(members[1:], 1):
            if member.config.likelihood != members[0].config.likelihood:
                raise ValueError(f"`members` must have one likelihood, got another in number {number}.")
        order = sorted(range(len(weights)), key=lambda k: -weights[k])  # stable
        object.__setattr__(self, "members", tuple(members[k] for k in order))
        object.__setattr__(self, "weights", tuple(weights[k] for k in order))

    def __getattr__(self, name: str) -> NoReturn:
        if name in OF_ONE_MEMBER:
            raise AttributeError(
                f"a mixture of {len(self.members)} posteriors has no `{name}`: each member has one, "
                f"`posterior.best.{name}` that with the largest weight"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} of {len(self.members)} members:"]
        lines += [f"  {weight:.2f}  {member!r}" for weight, member in zip(self.weights, self.members, strict=True)]
        return "\n".join(lines)

    @property
    def best(self) -> Posterior:
        """The member with the largest weight; the first of them if several have it."""
        return self.members[0]

    @property
    def adapter(self) -> AdapterModel:
        """The model as a function of its trainable tensors."""
        return self.best.adapter

    @property
    def config(self) -> KalmanConfig:
        """The settings of the best member."""
        return self.best.config

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the best member's targets."""
        return self.best.likelihood

    @property
    def softmax_temperature(self) -> float:
        """The divisor of the logits in predictions, the same for all members."""
        return self.best.softmax_temperature

    @property
    def temperature(self) -> float:
        """The factor on the best member's covariance."""
        return self.best.temperature

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the members' predictions, one sentence each."""
        return tuple(dict.fromkeys(note for member in self.members for note in member.notes))

    @property
    def mean(self) -> dict[str, Tensor]:
        """Means of the mixture, Σ w_k μ_k, tensor name -> tensor. They are the parameters of no member."""
        return self.adapter.unflatten(self._mean_vector())

    @property
    def variance(self) -> dict[str, Tensor]:
        """Marginal variances of the mixture, Σ w_k (p_k + (μ_k − μ)²), tensor name -> tensor."""
        mean = self._mean_vector()
        parts = [w * (m.variance_vector + (m.mean_vector - mean).square()) for w, m in self._weighted()]
        return self.adapter.unflatten(torch.stack(parts).sum(0))

    def predict(
        self,
        inputs: Inputs,
        method: str = "linearized",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
    ) -> Prediction:
        """Predictive distribution for a batch: the weighted mean of the members'; see :meth:`Posterior.predict`.

        Disagreement between members counts as epistemic.
        """
        generators = member_generators(self.generator(generator), len(self.members))
        return predict_mixture(self.members, self.weights, inputs, method, num_samples, generators, targets)

    def predict_loader(
        self,
        loader: Iterable[Any],
        method: str = "linearized",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        keep_samples: bool = False,
    ) -> LoaderPrediction:
        """Predictive distributions for all examples of a loader; see :meth:`Posterior.predict_loader`."""
        loader, generator = whole_loader(loader), self.generator(generator)
        with working_together("predict_loader") as begins:
            if begins:
                use_random_state_of_first(loader, generator)
            generators = member_generators(generator, len(self.members))
            states = [one.get_state() for one in generators]

            def predict_batch(inputs: Inputs, targets: Tensor | None, is_first: bool) -> Prediction:
                return predict_mixture(
                    self.members, self.weights, inputs, method, num_samples, generators, targets,
                    compare=is_first, adapter_generator_states=states, stacklevel=6,
                )  # fmt: skip

            batches = map(self.adapter.read, loader)
            return predict.collect_predictions(predict_batch, batches, keep_samples, self.adapter)

    def sample(self, num_samples: int, generator: torch.Generator | None = None, width: float = 1.0) -> Tensor:
        """Draws from the mixture, (S, n): for each a member, then parameters from its Gaussian.

        Args:
            num_samples: S.
            generator: source of the draws; by default a new one seeded with ``config.seed``.
            width: factor on the standard deviations of the members.
        """
        generator = self.generator(generator)
        weights = torch.tensor(self.weights, dtype=torch.float64, device=generator.device)
        chosen = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        draws = self.best.mean_vector.new_empty(num_samples, self.adapter.num_parameters)
        for number, member in enumerate(self.members):
            where = (chosen == number).nonzero().squeeze(1).to(draws.device)
            if len(where):
                draws[where] = member.sample(len(where), generator, width)
        return draws

    def generator(self, generator: torch.Generator | None = None) -> torch.Generator:
        """The given generator, or a new one seeded with ``config.seed``."""
        return self.best.generator(generator)

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """Logits divided by :attr:`softmax_temperature`; same shape."""
        return self.best.scaled_logits(logits)

    def adapters_at_once(self, batch: Batch) -> int:
        """How many adapters fit in memory together, in forward passes over a batch."""
        return self.best.adapters_at_once(batch)

    def calibrate(self, loader: Iterable[Any]) -> Self:
        """The mixture with the size of each member's covariance and the sharpness that held-out data choose.

        See :meth:`Posterior.calibrate`. The weights stay.
        """
        members = tuple(calibration.calibrate(self.members, self.weights, loader))
        return replace(self, members=members, history=self.history | members[0].history)

    def calibrate_softmax(self, loader: Iterable[Any]) -> Self:
        """The mixture with its sharpness alone set by held-out data; see :meth:`Posterior.calibrate_softmax`."""
        members = tuple(calibration.calibrate_sharpness(self.members, self.weights, loader))
        return replace(self, members=members, history=self.history | members[0].history)

    def update(self, inputs: Inputs, targets: Tensor) -> Self:
        """The mixture after one more batch: every member updated, and its weight multiplied by its p(y | x).

        Raises:
            ValueError: if inputs or targets are malformed.
            DivergenceError: if a member refuses the update.
        """
        predictions = [member.predict(inputs, targets=targets).log_prob for member in self.members]
        evidence = [float(log_prob.double().sum()) for log_prob in predictions if log_prob is not None]
        members = [replace(m, state=m.kf.update(m.state, inputs, targets)[0]) for m in self.members]
        return replace(self, members=tuple(members), weights=reweighted(self.weights, evidence))

    def output_variance(self, batch: Any) -> dict[str, float]:
        """The weighted mean of the members' contributions of each tensor; see :meth:`Posterior.output_variance`."""
        parts = [(weight, member.output_variance(batch)) for weight, member in self._weighted()]
        return {name: sum(weight * part[name] for weight, part in parts) for name in parts[0][1]}

    def log_density(self, draws: Tensor) -> Tensor:
        """log Σ_k w_k N(θ; μ_k, temperature·P_k) of parameter vectors (S, n), in float64, (S,).

        Raises:
            ValueError: if the draws are not of shape (S, n).
        """
        parts = torch.stack([member.log_density(draws) for member in self.members], 1)
        return (parts + torch.tensor(self.weights, dtype=torch.float64).log().to(parts)).logsumexp(1)

    def guide(self) -> MixtureGuide:
        """A Pyro guide that begins at this mixture: a site ``member``, and one for each tensor, under its name."""
        from bayes_kf.inference.pyro.mixture.mixture_guide import MixtureGuide  # loads Pyro

        return MixtureGuide(self.members, self.weights)

    @property
    def pyro_model(self) -> Callable[..., Tensor]:
        """The Pyro model, called (inputs, targets=None): a member, its prior, and the likelihood of the targets.

        All members are equally probable before data; the weights of the mixture are those of :meth:`guide`.
        """
        from bayes_kf.inference.pyro.mixture.mixture_model import MixtureModel  # loads Pyro

        return MixtureModel.of(self.members)

    @classmethod
    def from_samples(
        cls,
        model: nn.Module | AdapterModel,
        samples: Mapping[str, Tensor],
        configs: Sequence[KalmanConfig],
        inputs: Inputs | None = None,
    ) -> Self:
        """The mixture with the moments of draws, where the site ``member`` says which member each draw is of.

        The weights are the shares of the draws.

        Args:
            model: the module, or an adapter of it.
            samples: tensor name -> S draws, (S, ...), and ``member``, (S,), the numbers of the members.
            configs: the settings of each member.
            inputs: as for :meth:`Posterior.from_samples`.

        Raises:
            ValueError: if draws are missing or do not fit, a number is none of a member, or a member has no draws.
        """
        adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
        parts = sample_moments.divided_by_member(samples, len(configs))
        members = [
            Posterior.from_samples(adapter, part, c, inputs) for (part, _), c in zip(parts, configs, strict=True)
        ]
        return cls(tuple(members), tuple(share for _, share in parts))

    def with_adapter(self, adapter: AdapterModel) -> Self:
        """The same mixture over another view of its model; see :meth:`Posterior.with_adapter`."""
        return replace(self, members=tuple(member.with_adapter(adapter) for member in self.members))

    def apply_to(self, model: nn.Module, member: int = 0) -> Posterior:
        """Write the mean of one member into ``model``, in place; returns that member.

        Args:
            model: with the mixture's trainable tensors.
            member: number of the member; by default the best one.

        Raises:
            ValueError: if there is no such member, or the model has other trainable tensors.
        """
        if not 0 <= member < len(self.members):
            raise ValueError(f"`member` must be from 0 to {len(self.members) - 1}, got {member}.")
        self.members[member].apply_to(model)
        return self.members[member]

    def to_arviz(
        self, num_samples: int = 500, generator: torch.Generator | None = None, loader: Iterable[Any] | None = None
    ) -> Any:
        """Draws from the mixture as ArviZ data; see :meth:`Posterior.to_arviz`."""
        return arviz_export.to_arviz(self, num_samples, generator, loader)

    def save_pretrained(self, folder: str | Path, scores: Mapping[str, float] | None = None) -> None:
        """Write the mixture as a folder; see :meth:`Posterior.save_pretrained`.

        The folder itself holds the best member, as a folder of a :class:`Posterior` does: PEFT loads its mean from
        there. The others lie in ``member_1``, ``member_2``, ..., and the weights in ``mixture.json``.
        """
        pretrained.save_mixture(self.members, self.weights, Path(folder), scores)

    def export_adapters(
        self, folder: str | Path, num_samples: int = 8, generator: torch.Generator | None = None, width: float = 1.0
    ) -> list[Path]:
        """Write draws from the mixture as PEFT adapters; see :meth:`Posterior.export_adapters`."""
        return pretrained.export_draws(self.best, Path(folder), self.sample(num_samples, generator, width), width)

    def _weighted(self) -> list[tuple[float, Posterior]]:
        return list(zip(self.weights, self.members, strict=True))

    def _mean_vector(self) -> Tensor:
        return torch.stack([weight * member.mean_vector for weight, member in self._weighted()]).sum(0)


Posterior.mixture_type = MixturePosterior
