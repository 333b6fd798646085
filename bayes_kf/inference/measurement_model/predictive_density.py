"""The predictive density log p(y) = log E p(y | η) under η ~ N(f, t·C), at several temperatures t.

These numbers compare temperatures, so they must be unbiased: the logarithm of a mean of S independent draws is too low
by about Var(p) / (2 S p̄²), which grows with the temperature. There are four cases:

- Gaussian: the closed form.
- One target with Student-t or heteroscedastic noise: a mixture of normal distributions, by quadrature over the
  variance of the noise.
- One output (Bernoulli, Poisson), and two classes, whose log odds are one number: quadrature in one dimension.
- Otherwise: quasi-random draws (scrambled Sobol points and their mirror images) whose first coordinate, the most even
  one, lies along the gradient of log p(y | η). Examples use different sets in turn, by their number, because the errors
  of a single set would add up.

The result of an example depends on its own f, C, y and number alone, not on the blocks of a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_kf.models.likelihood import Bernoulli, Gaussian, Likelihood, RealLikelihood
from bayes_kf.models.likelihoods.canonical import CanonicalLikelihood

NODES = 97  # of the quadrature in one dimension
QUADRATURE_SDS = 9.0  # standard deviations on each side of the integrand's mode
MIXTURE_REACH = 38.0  # standard deviations of a log variance on each side: surprises are explained far out
MAX_NEWTON = 40  # steps of Newton's method toward that mode
NEWTON_ATOL = 1e-3  # change of the mode that ends them: the mode need not be exact
MAX_POINTS, MIN_POINTS = 512, 32  # quasi-random draws; as many as MAX_NUMEL allows
MAX_NUMEL = 2**20  # numbers per example, and numbers in memory at once
MAX_SETS, MIN_SETS = 64, 2  # sets of points, which examples use in turn; as many as MAX_SET_NUMEL allows
MAX_SET_NUMEL = 2**21  # numbers in all sets


def log_loss(
    family: Likelihood,
    outputs: Tensor,
    output_cov: Tensor,
    targets: Tensor,
    temperatures: Sequence[float],
    first: int = 0,
) -> Tensor:
    """−log p(y) of each example under η ~ N(outputs, t·output_cov), (K, B) in nats, float64.

    Args:
        family: the likelihood.
        outputs: f, (B, m).
        output_cov: C, (B, m, m).
        targets: as the likelihood's ``check`` returned them.
        temperatures: t, K of them.
        first: the number of the first example; the others follow.
    """
    covariance = output_cov.double()
    if isinstance(family, Gaussian):
        return _gaussian(family, outputs.double(), covariance, targets.double(), temperatures)
    if isinstance(family, RealLikelihood) and targets.shape[1] == 1:
        heated = (t * covariance.unsqueeze(1) for t in temperatures)  # (B, 1, p, p)
        location, value = outputs.double().unsqueeze(1), targets.double()
        densities = [family.normal_mixture(location, c, MIXTURE_REACH).log_density(value) for c in heated]
        return -torch.stack(densities).squeeze(-1)
    if outputs.shape[1] == 1:
        sd = covariance[:, 0, 0].clamp_min(0.0).sqrt()
        return _one_output(family, outputs[:, 0].double(), sd, targets[:, 0].double(), temperatures)
    if family.name == "categorical" and outputs.shape[1] == 2:
        odds = (outputs[:, 1] - outputs[:, 0]).double()
        variance = covariance[:, 0, 0] - 2.0 * covariance[:, 0, 1] + covariance[:, 1, 1]
        return _one_output(Bernoulli(), odds, variance.clamp_min(0.0).sqrt(), targets.double(), temperatures)
    return root_log_loss(family, outputs, square_root(covariance).to(outputs), targets, temperatures, first)


def is_sampled(family: Likelihood, num_outputs: int) -> bool:
    """Whether the likelihood is that of more than two classes, for which :func:`log_loss` takes quasi-random draws."""
    return family.name == "categorical" and num_outputs > 2


def square_root(covariance: Tensor) -> Tensor:
    """The symmetric R (B, m, m) with R R = C, float64; eigenvalues of C that rounding made negative are zero."""
    covariance = covariance.double()
    scale = covariance.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-300)[:, None, None]
    values, vectors = torch.linalg.eigh(covariance / scale)
    return scale.sqrt() * (vectors * values.clamp_min(0.0).sqrt().unsqueeze(1)) @ vectors.mT


def isotropic_log_loss(
    family: Likelihood,
    outputs: Tensor,
    variance: Tensor,
    targets: Tensor,
    temperatures: Sequence[float],
    first: int = 0,
) -> Tensor:
    """As :func:`log_loss` for C = variance·I, variance (B,)."""
    sd = variance.to(outputs).clamp_min(0.0).sqrt().view(-1, 1, 1)
    return root_log_loss(family, outputs, sd, targets, temperatures, first)


def root_log_loss(
    family: Likelihood,
    outputs: Tensor,
    root: Tensor,
    targets: Tensor,
    temperatures: Sequence[float],
    first: int = 0,
) -> Tensor:
    """As :func:`log_loss` by quasi-random draws, for C = rootᵀ root with root (B, r, m), or (B, 1, 1) times I."""
    rank = outputs.shape[1] if root.shape[1:] == (1, 1) else root.shape[1]
    width = max(rank, outputs.shape[1])
    count = MAX_POINTS if MAX_POINTS * width <= MAX_NUMEL else max(MIN_POINTS, MAX_NUMEL // width)
    sets = _point_sets(count // 2, rank)
    number = torch.arange(first, first + len(outputs)) % len(sets)
    chunk = max(1, MAX_NUMEL // (count * width))  # examples in memory at once
    losses = []
    for start in range(0, len(outputs), chunk):
        some = slice(start, start + chunk)
        points = sets[number[some]].to(root)
        losses.append(_sampled_log_loss(family, outputs[some], root[some], targets[some], points, temperatures))
    return torch.cat(losses, 1)


def _sampled_log_loss(
    family: Likelihood,
    outputs: Tensor,
    root: Tensor,
    targets: Tensor,
    points: Tensor,
    temperatures: Sequence[float],
) -> Tensor:
    """Log losses (K, B) from standard normal points (B, r, S) and their mirror images.

    A reflection maps the first axis to the direction in which log p(y | η) changes most. Outputs come first in memory
    and draws last, because sums over few outputs are fast there.
    """
    gradient = family.residual(outputs, targets)
    isotropic = root.shape[1:] == (1, 1)
    along = F.normalize(gradient if isotropic else (root @ gradient.unsqueeze(-1)).squeeze(-1), dim=-1)  # (B, r)
    normal = along.clone()
    normal[:, 0] -= 1.0
    normal = F.normalize(normal, dim=-1).unsqueeze(-1)  # of the mirror, (B, r, 1)
    reflected = points - 2.0 * normal * (normal.mT @ points)
    deviation = (reflected * root if isotropic else root.mT @ reflected).transpose(0, 1)  # (m, B, S)
    deviation = torch.cat([deviation, -deviation], -1)
    centre, losses = outputs.T.unsqueeze(-1), []
    label = targets.view(1, -1, 1).expand(1, -1, deviation.shape[-1]) if family.name == "categorical" else None
    for t in temperatures:
        eta = centre + t**0.5 * deviation
        if label is None:
            log_prob = family.log_prob(eta.permute(2, 1, 0), targets).T
        else:
            log_prob = eta.gather(0, label).squeeze(0) - eta.logsumexp(0)
        losses.append(-log_prob.double().logsumexp(1))
    return math.log(deviation.shape[-1]) + torch.stack(losses)


@functools.lru_cache(maxsize=8)
def _point_sets(count: int, dimension: int) -> Tensor:
    """Scrambled Sobol points as standard normal numbers, (sets, dimension, count), the same at every call."""
    sets = max(MIN_SETS, min(MAX_SETS, MAX_SET_NUMEL // (count * dimension)))
    if dimension > torch.quasirandom.SobolEngine.MAXDIM:
        generator = torch.Generator().manual_seed(0)
        return torch.randn((sets, dimension, count), generator=generator)
    points = torch.empty(sets, dimension, count)
    for number in range(sets):
        engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=number)
        uniform = engine.draw(count, dtype=torch.float64).clamp(1e-12, 1.0 - 1e-12)
        points[number] = torch.special.ndtri(uniform).T
    return points


def _one_output(
    family: Likelihood, outputs: Tensor, sd: Tensor, targets: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """Log losses (K, ..., B) of one output, by quadrature: outputs (..., B), sd (B,) at temperature 1, targets (B,).

    The integrand exp(g(ε)), g = log p(y | f + sε) − ε²/2, has one maximum ε̂. Nodes are ε̂ + c sinh u, u equally spaced:
    dense at ε̂, where the likelihood may be much narrower than the belief, and up to ``QUADRATURE_SDS`` away.
    """
    heat = torch.tensor(temperatures, dtype=torch.float64, device=outputs.device)
    sd = heat.sqrt().view(-1, *[1] * outputs.dim()) * sd  # (K, ..., B)
    mode = _mode(family, outputs, sd, targets)
    width = 1.0 / (1.0 + sd)
    last = torch.asinh(QUADRATURE_SDS / width)
    step = 2.0 * last / (NODES - 1)
    place = (
        torch.linspace(-1.0, 1.0, NODES, dtype=torch.float64, device=outputs.device).view(-1, *[1] * sd.dim()) * last
    )
    node = mode + width * place.sinh()
    log_prob = family.log_prob((outputs + sd * node).unsqueeze(-1), targets.unsqueeze(-1))
    terms = log_prob - 0.5 * node.square() + (step * width * place.cosh()).log()
    return 0.5 * math.log(2.0 * math.pi) - terms.logsumexp(0)


def _mode(family: Likelihood, outputs: Tensor, sd: Tensor, targets: Tensor) -> Tensor:
    """The maximum of log p(y | f + sε) − ε²/2 over ε, (K, ..., B), by Newton's method in a bracket."""
    assert isinstance(family, CanonicalLikelihood)  # its log density is concave
    tiny = torch.finfo(sd.dtype).tiny
    bound = sd * family.residual(outputs.unsqueeze(-1), targets.unsqueeze(-1)).squeeze(-1)
    low, high = bound.clamp_max(0.0), bound.clamp_min(0.0)  # the slope at 0 is s·e, and falls by at least 1 a unit
    if family.name == "poisson":  # the likelihood's own maximum is at log y
        peak = (targets.clamp_min(tiny).log() - outputs) / sd.clamp_min(tiny)
        low, high = torch.maximum(low, peak.clamp_max(0.0)), torch.minimum(high, peak.clamp_min(0.0))
    mode = torch.zeros_like(bound)
    for _ in range(MAX_NEWTON):
        point = (outputs + sd * mode).unsqueeze(-1)
        slope = sd * family.residual(point, targets.unsqueeze(-1)).squeeze(-1) - mode
        curvature = 1.0 + sd.square() * family.variance(point)[..., 0, 0]
        low, high = torch.where(slope > 0, mode, low), torch.where(slope > 0, high, mode)
        proposal = mode + slope / curvature
        proposal = torch.where((proposal > low) & (proposal < high), proposal, 0.5 * (low + high))
        change, mode = (proposal - mode).abs().max(), proposal
        if float(change) < NEWTON_ATOL:
            break
    return mode


def _gaussian(
    family: Gaussian, outputs: Tensor, output_cov: Tensor, targets: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """Log losses (K, B) in closed form."""
    heat = torch.tensor(temperatures, dtype=torch.float64, device=outputs.device).view(-1, 1, 1, 1)
    noise_var = family.noise_variance.to(heat).expand_as(outputs)
    normal = torch.distributions.MultivariateNormal(
        outputs, heat * output_cov + torch.diag_embed(noise_var), validate_args=False
    )
    return -normal.log_prob(targets)
