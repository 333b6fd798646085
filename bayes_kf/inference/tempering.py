"""How far to trust the covariance: a factor on P in predictions, priced by the stream itself.

Before each update the filter's own linearized prediction is scored at every temperature of a grid. The posterior's is
the one whose prequential log loss is lowest. No validation set, no extra pass through the network. Ours.

A factor on P can only take away doubt that P adds. Where the mean by itself is less sure than held-out data bear out,
logits are divided by a number below 1 (temperature scaling, Guo et al. 2017), which has most posterior probability
under a prior of a tenth around 1 on its logarithm. Above 1 it would do P's work, and where labels are often wrong it
would ask for doubt that P has already given. Prior and bound are ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.prediction import gaussian_draws
from bayes_kf.models.likelihood import Gaussian, Likelihood

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NUM_DRAWS = 32
MOST_DRAWS = 512  # for held-out data, as far as all of them together are ...
HELD_OUT_NUMBERS = 2**22  # ... below this
NUM_RESPONSES = 64  # of the outputs to drawn parameters, in the place of a covariance of more outputs
WITHIN = 0.5  # standard errors by which held-out data must prefer another temperature to one nearer to 1
SOFTMAX_GRID = tuple(round(1.0 - 0.05 * k, 2) for k in range(16))  # 1 to 0.25: softmax is made surer, never less sure
SOFTMAX_SD = 0.1  # of the logarithm, around 1, under the prior of what logits are divided by
SOFTMAX_PRIOR = 0.5 * (torch.tensor(SOFTMAX_GRID, dtype=torch.float64).log() / SOFTMAX_SD).square()  # −log density
FEWEST_DRAWS = 4  # with very many outputs, where all of them together are ...
DRAWN_NUMBERS = 2**17  # ... kept below this


def log_losses(family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor, seed: int) -> Tensor:
    """Summed −log p(y) of a batch under η ~ N(outputs, t·output_cov), for every t of ``GRID``, (K,) in nats.

    Args:
        family: the likelihood.
        outputs: f, (B, m).
        output_cov: J P⁻ Jᵀ, (B, m, m).
        targets: as the likelihood's ``check`` returned them.
        seed: of the draws, the same for every temperature.
    """
    return each_log_loss(family, outputs, output_cov, targets, seed, NUM_DRAWS).sum(1)


def each_log_loss(
    family: Likelihood, outputs: Tensor, output_cov: Tensor, targets: Tensor, seed: int, num_draws: int
) -> Tensor:
    """As :func:`log_losses`, of each example, (K, B)."""
    if isinstance(family, Gaussian):
        return _gaussian(family, outputs, output_cov, targets)
    generator = torch.Generator(device=outputs.device).manual_seed(seed)
    spread = gaussian_draws(torch.zeros_like(outputs), output_cov, num_draws, generator)
    return drawn_log_loss(family, outputs, spread, targets)


def drawn_log_loss(family: Likelihood, outputs: Tensor, spread: Tensor, targets: Tensor) -> Tensor:
    """As :func:`each_log_loss`, from S draws of η − outputs at temperature 1, (S, B, m)."""
    roots = torch.tensor(GRID, dtype=outputs.dtype, device=outputs.device).sqrt()
    log_prob = torch.stack([family.log_prob(outputs + root * spread, targets) for root in roots])  # (K, S, B)
    return -(log_prob.double().logsumexp(1) - math.log(len(spread)))


def held_out_draws(outputs: Tensor) -> int:
    """Draws for a batch of held-out data.

    The logarithm of a mean of few draws is too low, and the more so the hotter, which 32 of them decided by.
    """
    return max(NUM_DRAWS, min(MOST_DRAWS, HELD_OUT_NUMBERS // outputs.numel()))


def mixed(responses: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """S draws from N(0, Σ r rᵀ/K) for K responses r of a batch's outputs to drawn parameters, (K, B, m) to (S, B, m).

    Far more draws than responses, which cost a forward pass each: the covariance is noisy then, but the logarithm of a
    mean over draws is not too low for want of them.
    """
    number = len(responses)
    weights = torch.randn((num_draws, number), generator=generator, dtype=responses.dtype, device=responses.device)
    return ((weights / number**0.5) @ responses.flatten(1)).unflatten(1, responses.shape[1:])


def isotropic_log_losses(family: Likelihood, outputs: Tensor, variance: Tensor, targets: Tensor, seed: int) -> Tensor:
    """As :func:`log_losses` under η ~ N(outputs, t·variance·I), variance (B,): for steps that saw one direction."""
    generator = torch.Generator(device=outputs.device).manual_seed(seed)
    num_draws = max(FEWEST_DRAWS, min(NUM_DRAWS, DRAWN_NUMBERS // outputs.numel()))
    scale = variance.sqrt().to(outputs).unsqueeze(-1)
    roots = torch.tensor(GRID, dtype=outputs.dtype, device=outputs.device).sqrt().view(-1, 1, 1, 1)
    noise = torch.empty(min(num_draws, max(1, DRAWN_NUMBERS // outputs.numel())), *outputs.shape).to(outputs)
    log_probs = []
    for start in range(0, num_draws, len(noise)):
        drawn = noise[: num_draws - start].normal_(generator=generator).mul_(scale)
        together = len(roots) if drawn.numel() * len(roots) <= DRAWN_NUMBERS else 1  # temperatures
        log_probs.append(torch.cat([family.log_prob(outputs + r * drawn, targets) for r in roots.split(together)]))
    log_prob = torch.cat(log_probs, 1)  # (K, S, B)
    return -(log_prob.double().logsumexp(1) - math.log(num_draws)).sum(-1)


class State(NamedTuple):
    """Sums over updates of the log losses ℓ by temperature, (K,), in nats.

    Attributes:
        updates: number of updates scored, or of their parts, where they were learned in parts.
        total: Σ ℓ.
    """

    updates: int
    total: Tensor


def init(device: torch.device) -> State:
    """The state before the first update."""
    return State(0, torch.zeros(len(GRID), dtype=torch.float64, device=device))


def add(state: State, losses: Tensor) -> State:
    """The sums with one more update's losses, (K,)."""
    return State(state.updates + 1, state.total + losses)


def choose(state: State) -> float:
    """The temperature of the lowest log loss, the largest among equals; 1 before anything was scored."""
    if state.updates == 0:
        return 1.0
    best = state.total.min()  # a temperature that gave some target no probability is at infinity, and out
    return GRID[int((state.total == best).nonzero().max())] if bool(torch.isfinite(best)) else GRID[0]


def choose_held_out(losses: Tensor) -> float:
    """The temperature for held-out log losses, (K, N): of those that they do not clearly speak against, nearest to 1.

    Its mean lies above the least by at most ``WITHIN`` standard errors of their difference, paired by example: a
    hundred examples hardly tell neighbours apart, and a belief is neither sharpened nor blurred on their account. A
    single example has no standard error, and speaks only against what gave it no probability.
    """
    means = losses.mean(1)
    best = int(means.argmin())
    if not bool(torch.isfinite(means[best])):
        return GRID[0]
    excess = losses - losses[best]
    number = losses.shape[1]
    error = excess.std(1, correction=0) / (number - 1) ** 0.5 if number > 1 else torch.full_like(means, 1e300)
    near = excess.mean(1) <= WITHIN * error  # false for what is infinite
    near[best] = True
    return min((t for t, is_near in zip(GRID, near.tolist(), strict=True) if is_near), key=lambda t: abs(math.log(t)))


def softmax_log_losses(family: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Summed −log p(y) of a batch with its logits divided by every number of ``SOFTMAX_GRID``, (G,) on the CPU."""
    logits = outputs.double()
    return -torch.stack([family.log_prob(logits / divisor, targets).sum() for divisor in SOFTMAX_GRID]).cpu()


def choose_softmax(losses: Tensor) -> float:
    """The number of ``SOFTMAX_GRID`` of the least sum of log losses and ``SOFTMAX_PRIOR``, (G,), 1 among equals."""
    return SOFTMAX_GRID[int(losses.nan_to_num(torch.inf).argmin())] if bool(torch.isfinite(losses[0])) else 1.0


def temperature(setting: float | str, state: State) -> float:
    """The configured temperature, or the one that the scores choose."""
    return choose(state) if isinstance(setting, str) else setting


def _gaussian(family: Gaussian, outputs: Tensor, output_cov: Tensor, targets: Tensor) -> Tensor:
    """As :func:`each_log_loss`, in closed form, all temperatures at once."""
    heat = torch.tensor(GRID, dtype=torch.float64, device=outputs.device).view(-1, 1, 1, 1)
    noise_var = family.noise_variance.to(heat).expand_as(outputs)
    total = heat * output_cov.double() + torch.diag_embed(noise_var)  # (K, B, m, m)
    normal = torch.distributions.MultivariateNormal(outputs.double(), total, validate_args=False)
    return -normal.log_prob(targets.double())
