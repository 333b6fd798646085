"""The sharpness of predicted probabilities: a divisor S of the logits, chosen by held-out examples.

S minimizes the log loss of the predictions at their covariance, −Σ log E softmax(η/S)_y, plus ½ (ln S / sd)². Below 1
it makes predictions more confident, above 1 less. The prior has sd 0.5, and 0.2 with fewer than ``FEW`` examples:
thirty that are all predicted right would make a posterior certain. Temperature scaling (Guo et al. 2017) is the case
without a covariance and without a prior.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_kf.inference.heldout.choice import Choice, most_probable
from bayes_kf.inference.heldout.heldout_examples import HeldoutOutputs
from bayes_kf.inference.measurement_model import noise
from bayes_kf.models.likelihood import LIKELIHOODS, StudentT

SHARPNESS = tuple(10.0 ** (k / 8) for k in range(-8, 9))  # S, 0.1 to 10
COARSE = tuple(10.0 ** (k / 4) for k in range(-3, 4))  # S, 0.18 to 5.6
PRIOR_SD, PRIOR_SD_OF_FEW = 0.5, 0.2  # of ln S
FEW = 50  # examples
AVERAGING_POWER = 0.2  # of the number of members, by which the S of their average is smaller than that of one


def choose_sharpness(
    members: Sequence[HeldoutOutputs],
    values: Sequence[float] = SHARPNESS,
    weights: Sequence[float] = (1.0,),
    evaluations: int = 8,
) -> Choice:
    """The most probable S, one for all members of a mixture.

    Args:
        members: the held-out outputs of each member.
        values: the S that are tried first.
        weights: of the members, which add up to 1.
        evaluations: as for :func:`.most_probable`.
    """
    number = len(members[0].targets)
    sd = PRIOR_SD if number >= FEW else PRIOR_SD_OF_FEW

    @functools.cache
    def log_density(divisor: float) -> float:
        return -float(mixture_log_loss(members, weights, divisor).sum()) - 0.5 * (math.log(divisor) / sd) ** 2

    return most_probable(log_density, values, evaluations)


def cross_fitted_sharpness(members: Sequence[HeldoutOutputs]) -> Choice:
    """The S of an equally weighted mixture whose members were held out from different examples.

    Each example is predicted by the one member that has not learned it, so the most probable S is that of a single
    member. The average of K members is less confident than each of them, and more often right. So the mixture's S is
    that one divided by K^(1/5), chosen for two members (``docs/development/decisions.md``, "Several posteriors"). Ours.

    Args:
        members: the held-out outputs of each member, of its own examples.
    """
    single, divisor = choose_sharpness([HeldoutOutputs.joined(members)]), len(members) ** AVERAGING_POWER
    return single._replace(value=single.value / divisor, low=single.low / divisor, high=single.high / divisor)


def point_log_losses(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The log losses of outputs (N, m) without a covariance, (N,) in nats: for classes at their most probable S.

    For Gaussian and Student-t targets they are those of the noise variance that suits the examples best.
    """
    outputs = outputs.double()
    if likelihood == "gaussian":
        squares = (targets.to(outputs).reshape(outputs.shape) - outputs).square()
        variance = squares.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
        return 0.5 * (variance.log() + squares / variance).sum(1)
    family = LIKELIHOODS[likelihood]()
    if isinstance(family, StudentT):
        squares = (targets.to(outputs).reshape(outputs.shape) - outputs).square()
        family = StudentT(noise.student_scale(squares, family.dof), family.dof)
    checked = family.check(outputs, targets)
    if likelihood != "categorical":
        return -family.log_prob(outputs, checked)
    sd = PRIOR_SD if len(checked) >= FEW else PRIOR_SD_OF_FEW

    def log_density(divisor: float) -> float:
        return float(family.log_prob(outputs / divisor, checked).sum()) - 0.5 * (math.log(divisor) / sd) ** 2

    chosen = most_probable(log_density, SHARPNESS).value
    return -family.log_prob(outputs / chosen, checked)


def mixture_log_loss(members: Sequence[HeldoutOutputs], weights: Sequence[float], divisor: float) -> Tensor:
    """−log Σ_k w_k E p(y | η_k / divisor) of each example, (N,) in nats, float64."""
    shares = torch.tensor(weights, dtype=torch.float64).log()
    losses = torch.stack([member.log_loss(divisor) for member in members])
    return -(shares.unsqueeze(1) - losses).logsumexp(0)
