"""The priors of a Pyro model's sites: Normal ones, and scale mixtures of Normals.

A scale mixture is p(θ) = ∫ N(θ; m, (s σ)²) p(σ) dσ. With t = log σ, up to constants:

    Laplace(m, s):         σ² ~ Exp(1/2),            log p(t) = 2t − σ²/2
    StudentT(ν, m, s):     σ⁻² ~ Gamma(ν/2, ν/2),    log p(t) = −ν t − ν/(2σ²);  Cauchy: ν = 1
    Horseshoe(m, s):       σ ~ HalfCauchy(1),        log p(t) = t − log(1 + σ²)

``pyro.local_gaussians`` puts a Gaussian in the place of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayes_kf.inference.pyro.horseshoe import Horseshoe
from bayes_kf.models.adapter import AdapterModel

SUPPORTED = "Normal, Laplace, StudentT, Cauchy and Horseshoe"

NORMAL = "Normal"
FAMILIES: dict[type, str] = {
    dist.Normal: NORMAL,
    dist.Laplace: "Laplace",
    dist.StudentT: "StudentT",
    dist.Cauchy: "StudentT",
    Horseshoe: "Horseshoe",
}
NODES = 192  # of integrals over t = log σ; the trapezoidal rule converges exponentially
TAIL = 14.0  # the density of t is cut off where it is e^(−14) of its maximum ...
CONFLICT = 3.5  # ... and that far beyond on the right, where data contradict the prior


class SitePrior(NamedTuple):
    """The prior of one tensor.

    Attributes:
        name: of the site.
        family: "Normal", "Laplace", "StudentT" or "Horseshoe".
        mean: m, of the tensor's shape.
        scale: s, the standard deviation of a Normal.
        df: ν of a StudentT, otherwise None.
    """

    name: str
    family: str
    mean: Tensor
    scale: Tensor
    df: Tensor | None = None

    def variance(self) -> Tensor:
        """The prior variance; infinite for a StudentT with ν ≤ 2 and a Horseshoe."""
        square = self.scale.square()
        if self.family == "Horseshoe":
            return torch.full_like(square, math.inf)
        if self.df is not None:
            return torch.where(self.df > 2.0, square * self.df / (self.df - 2.0), torch.full_like(square, math.inf))
        return 2.0 * square if self.family == "Laplace" else square

    def local_scales(self, df: Tensor | None) -> tuple[Tensor, Tensor]:
        """σ at nodes that are equally spaced in t, and log p(t) there up to a constant.

        Args:
            df: ν of n numbers of a StudentT, or of all in one; both results are then (n, K), otherwise (K,).
        """
        steps = torch.linspace(0.0, 1.0, NODES, dtype=torch.float64, device=self.scale.device)
        if df is not None:
            nu = df.unsqueeze(-1)
            first, last = -(TAIL / nu).sqrt(), TAIL / nu + (3.0 * TAIL / nu).sqrt()
            t = first + (last + CONFLICT / (1.0 + nu / 1000.0) - first) * steps  # nearly Normal for large ν
            return t.exp(), -nu * t - 0.5 * nu * (-2.0 * t).exp()
        if self.family == "Laplace":
            t = -0.5 * TAIL + (0.5 * TAIL + 0.5 * math.log(2.0 * TAIL) + CONFLICT) * steps
            return t.exp(), 2.0 * t - 0.5 * (2.0 * t).exp()
        t = TAIL * (2.0 * steps - 1.0)
        return t.exp(), t - torch.log1p((2.0 * t).exp())


class ModelSites(NamedTuple):
    """What one run of a Pyro model shows.

    Attributes:
        priors: one for each tensor, in the adapter's order.
        values: the drawn tensors as one vector, θ (n,).
        log_prob: log density of the observed site, summed over examples, not scaled.
        scale: the factor on it in the model's joint density.
    """

    priors: list[SitePrior]
    values: Tensor
    log_prob: float
    scale: float


def run_model(model: Callable[..., Any], adapter: AdapterModel, *args: Any, **kwargs: Any) -> ModelSites:
    """Run a Pyro model once, with targets, and read its sites.

    Raises:
        ValueError: if a site is no tensor of the adapter, a tensor has no site, or its distribution is not supported,
            scaled or masked; if not exactly one site is observed.
    """
    with poutine.block(), torch.no_grad():
        trace: Any = poutine.trace(model).get_trace(*args, **kwargs)
    nodes = {k: v for k, v in trace.nodes.items() if v["type"] == "sample" and not site_is_subsample(v)}
    nodes = {k: v for k, v in nodes.items() if not v["infer"].get("_deterministic")}
    observed = [name for name, node in nodes.items() if node["is_observed"]]
    if len(observed) != 1:
        raise ValueError(f"`model` must observe one site, the targets, got {len(observed)}: {', '.join(observed)}.")
    target = nodes.pop(observed[0])
    for name, node in nodes.items():
        if name not in adapter.names:
            raise ValueError(
                f"`model` must have no sample sites but the trainable tensors, got {name!r} ~ {_described(node['fn'])}."
            )
    missing = [name for name in adapter.names if name not in nodes]
    if missing:
        raise ValueError(f"`model` must sample every trainable tensor, got no site {missing[0]!r}.")
    shapes = dict(zip(adapter.names, adapter.shapes, strict=True))
    if target["mask"] is not None:
        raise ValueError("`model` must not mask the observed site, got a masked one.")
    priors = [_site_prior(name, nodes[name], shape, adapter) for name, shape in shapes.items()]
    values = adapter.flatten({name: nodes[name]["value"].detach() for name in adapter.names})
    log_prob = float(target["fn"].log_prob(target["value"]).double().sum())
    return ModelSites(priors, values, log_prob, float(target["scale"]))


def _site_prior(name: str, node: dict[str, Any], shape: torch.Size, adapter: AdapterModel) -> SitePrior:
    """The prior of a site, in the adapter's precision and on its device."""
    fn, value = node["fn"], node["value"]
    if value.shape != shape:
        raise ValueError(f"`model` must sample {name!r} with shape {tuple(shape)}, got {tuple(value.shape)}.")
    if node["mask"] is not None or not bool((torch.as_tensor(node["scale"]) == 1.0).all()):
        raise ValueError(f"`model` must neither scale nor mask {name!r}, got a scaled or masked site.")
    base: Any = _without_dimensions(fn)
    family = FAMILIES.get(type(base))
    if family is None:
        raise ValueError(f"`model` must give {name!r} one of the priors {SUPPORTED}, got {_described(fn)}.")
    df = torch.ones_like(base.loc) if isinstance(base, dist.Cauchy) else getattr(base, "df", None)
    values = [None if part is None else part.detach().expand(shape) for part in (base.loc, base.scale, df)]
    mean, scale, df = (None if part is None else part.to(adapter.device, adapter.dtype).clone() for part in values)
    assert mean is not None
    assert scale is not None
    return SitePrior(name, family, mean, scale, df)


def _without_dimensions(fn: Any) -> Any:
    """The distribution of single numbers inside ``to_event``."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _described(fn: Any) -> str:
    """The name of a distribution without the dimensions around it."""
    return type(_without_dimensions(fn)).__name__


def differing_site(one: Sequence[SitePrior], other: Sequence[SitePrior]) -> str | None:
    """The name of the first site whose prior differs between two runs; None if there is none."""
    for a, b in zip(one, other, strict=True):
        if a.family != b.family or not all(_equal(x, y) for x, y in zip(a[2:], b[2:], strict=True)):
            return a.name
    return None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
