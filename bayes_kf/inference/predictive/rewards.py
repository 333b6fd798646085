"""The joint distribution of several texts' rewards, and what follows from it for choices among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws, semidefinite
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.measurement_model.predictive_density import log_loss
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.models.language import Reward
from bayes_kf.models.likelihood import Bernoulli
from bayes_kf.validation import check_whole, is_number


@dataclass(frozen=True, eq=False)
class Rewards:
    """Rewards of N texts: Σ_k w_k N(f_k, C_k), with the covariances of different texts; one part unless a mixture.

    Preferences inform differences of rewards alone. A constant that is common to all texts keeps its prior, in ``mean``
    and in ``sd``. No probability of a comparison depends on it, nor do :meth:`centered` and :meth:`relative_to`. All
    tensors are float64, in the unit of the logits.

    Attributes:
        means: f, (K, N).
        covariances: C, (K, N, N).
        weights: w, (K,).

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> certain = torch.tensor([[[0.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
        >>> rewards = Rewards(torch.tensor([[1.0, 1.5]], dtype=torch.float64), certain, one)
        >>> rewards.sd.tolist(), rewards.lower_bound(1.0).tolist(), rewards.best_of_n(1.0)
        ([0.0, 2.0], [1.0, -0.5], 0)
    """

    means: Tensor
    covariances: Tensor
    weights: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of each reward, (N,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """The covariance of the rewards, (N, N); of a mixture with that of its means."""
        apart = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + (apart.T * self.weights) @ apart

    @property
    def sd(self) -> Tensor:
        """The standard deviation of each reward, (N,)."""
        return self.covariance.diagonal().clamp_min(0.0).sqrt()

    def centered(self) -> Rewards:
        """The rewards less their mean over the N texts."""
        size = self.means.shape[1]
        return self._combined(torch.eye(size).to(self.means) - 1.0 / size)

    def relative_to(self, text: int) -> Rewards:
        """The rewards less that of one text, the present answer for example; its own is 0.

        Args:
            text: the index.

        Raises:
            ValueError: if there is no such text.
        """
        size = self.means.shape[1]
        if not isinstance(text, int) or not -size <= text < size:
            raise ValueError(f"`text` must be the index of one of {size} texts, got {text!r}.")
        contrasts = torch.eye(size).to(self.means)
        contrasts[:, text] -= 1.0
        return self._combined(contrasts)

    def preference_probs(self) -> Tensor:
        """E σ(rᵢ − rⱼ), (N, N): the probability that text i is preferred to text j when someone is asked.

        Both orders add up to 1. It is near ½ where the posterior knows little, and also where people disagree.
        """
        return self._of_pairs(_expected_sigmoid)

    def probs_better(self) -> Tensor:
        """P(rᵢ > rⱼ), (N, N): the probability that text i has the larger reward; ½ for equal ones.

        It is the posterior's uncertainty alone, without the disagreement of people.
        """
        return self._of_pairs(_probability_above_zero)

    def probs_best(self, num_samples: int = 10_000, generator: torch.Generator | None = None) -> Tensor:
        """The probability that each text has the largest reward of all N, by joint draws, (N,).

        Args:
            num_samples: S draws; the standard error is at most 0.5/√S.
            generator: source of the draws; by default a new one seeded with 0.

        Raises:
            ValueError: if ``num_samples`` is not a whole number of at least 1.
        """
        check_whole("num_samples", num_samples)
        generator = generator or torch.Generator().manual_seed(0)
        draws = gaussian_draws(self.means, self.covariances, num_samples, generator)  # (S, K, N)
        best = torch.nn.functional.one_hot(draws.argmax(-1), self.means.shape[1]).double()
        return self.weights @ best.mean(0)

    def lower_bound(self, z: float = 1.0) -> Tensor:
        """mean − z·sd, (N,): for z > 0 it is lower for texts that the reward model knows little about.

        Raises:
            ValueError: if ``z`` is not a number.
        """
        if not is_number(z):
            raise ValueError(f"`z` must be a number of standard deviations, got {z!r}.")
        return self.mean - z * self.sd

    def best_of_n(self, z: float = 1.0) -> int:
        """The index of the text with the largest lower bound; 0 takes the largest mean.

        Args:
            z: standard deviations, as for :meth:`lower_bound`.
        """
        return int(self.lower_bound(z).argmax())

    def _combined(self, contrasts: Tensor) -> Rewards:
        """The linear combinations of the rewards in the rows of ``contrasts``, (N, N)."""
        return Rewards(self.means @ contrasts.mT, contrasts @ self.covariances @ contrasts.mT, self.weights)

    def _of_pairs(self, probability: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A probability of each difference rᵢ − rⱼ, (N, N), computed once for both orders."""
        size = self.means.shape[1]
        i, j = torch.triu_indices(size, size, 1, device=self.means.device)
        result = torch.full_like(self.covariances[0], 0.5)
        if not len(i):
            return result
        mean = self.means[:, i] - self.means[:, j]  # (K, pairs)
        own = self.covariances.diagonal(dim1=1, dim2=2)
        variance = (own[:, i] + own[:, j] - 2.0 * self.covariances[:, i, j]).clamp_min(0.0)
        probs = self.weights @ torch.stack([probability(m, v) for m, v in zip(mean, variance, strict=True)])
        result[i, j], result[j, i] = probs, 1.0 - probs
        return result


def joint_rewards(members: Sequence[GaussianPosterior], weights: Sequence[float], inputs: Inputs) -> Rewards:
    """The rewards of N texts under the linearized model: r ~ N(f(x, μ), J P Jᵀ) for each member.

    Args:
        members: posteriors of one reward model.
        weights: of the members, which add up to 1.
        inputs: of the model: ``input_ids`` (N, T), ``attention_mask`` (N, T).

    Raises:
        ValueError: if the model has more than one output, or the inputs do not fit.
    """
    moments = [_moments(member.with_adapter(Reward(member.adapter.model)), inputs) for member in members]
    means, covariances = (torch.stack(parts) for parts in zip(*moments, strict=True))
    return Rewards(means, covariances, torch.tensor(weights, dtype=torch.float64, device=means.device))


def _moments(posterior: GaussianPosterior, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """f (N,) and J P Jᵀ (N, N) of one Gaussian, with its temperature, in float64."""
    batch, at = Batch.checked(inputs, device=posterior.adapter.device), posterior.mean_vector
    outputs, rows = [], []
    with posterior.adapter.full_precision():
        for _, chunk in posterior.kf.linearize.chunks(at, batch):
            linearized = posterior.kf.linearize(at, chunk)
            outputs.append(linearized.outputs)
            rows.append(linearized.jacobian().dense())
        covariance = posterior.state.belief.joint_output_covariance(Jacobian.from_rows(torch.cat(rows)))
    divisor = posterior.softmax_temperature
    scaled = posterior.temperature / divisor**2 * covariance.double()
    symmetric = 0.5 * (scaled + scaled.mT)
    return torch.cat(outputs).squeeze(-1).double() / divisor, semidefinite(symmetric.unsqueeze(0)).squeeze(0)


def _expected_sigmoid(mean: Tensor, variance: Tensor) -> Tensor:
    """E σ(x) under x ~ N(mean, variance), (M,), by quadrature."""
    yes = torch.ones_like(mean).unsqueeze(-1)
    return (-log_loss(Bernoulli(), mean.unsqueeze(-1), variance[:, None, None], yes, [1.0])[0]).exp()


def _probability_above_zero(mean: Tensor, variance: Tensor) -> Tensor:
    """P(x > 0) under x ~ N(mean, variance), (M,); ½ if x is 0 for sure."""
    ratio = torch.where(mean == 0.0, mean, mean / variance.sqrt())
    return torch.special.ndtr(ratio)
