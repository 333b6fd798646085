"""The priors of a Pyro model's sites as Gaussians: Normal ones as they are, scale mixtures by local Gaussian terms.

A scale mixture p(θ) = ∫ N(θ; m, 1/λ) p(λ) dλ is replaced by N(m, 1/λ) with λ = E[λ] under mean-field variational Bayes,
q(θ) q(λ), which depends on the belief through r = E[(θ − m)²] alone:

    Laplace(m, b):         λ = 1 / (b √r)
    StudentT(ν, m, s):     λ = (ν + 1) / (ν s² + r);  Cauchy: ν = 1
    Horseshoe(m, τ):       λ = x/τ², c x² + c x = 1, c = r/(2τ²)

The first is the E step of the Bayesian lasso (Park and Casella 2008), the others those of gamma and half-Cauchy
mixtures. Without data the fixed points are λ = 1/b², 1/s² and 1/τ². The posterior of θ is Gaussian throughout, so
spikes at zero and skewness are lost, and the fixed point of a horseshoe may depend on the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from bayes_kf.inference.pyro.horseshoe import Horseshoe, local_precision
from bayes_kf.models.adapter import AdapterModel

SUPPORTED = "Normal, Laplace, StudentT, Cauchy and Horseshoe"

FAMILIES: dict[type, str] = {
    dist.Normal: "Normal",
    dist.Laplace: "Laplace",
    dist.StudentT: "StudentT",
    dist.Cauchy: "StudentT",
    Horseshoe: "Horseshoe",
}


class SitePrior(NamedTuple):
    """The prior of one tensor.

    Attributes:
        name: of the site.
        family: "Normal", "Laplace", "StudentT" or "Horseshoe".
        mean: m, of the tensor's shape.
        scale: standard deviation of a Normal; b, s or τ of the others.
        df: ν of a StudentT, otherwise None.
    """

    name: str
    family: str
    mean: Tensor
    scale: Tensor
    df: Tensor | None = None

    def precision(self, square: Tensor | None = None) -> Tensor:
        """λ, given r = E[(θ − m)²] of the belief; without it, that of the fixed point before any data."""
        if self.family == "Normal" or square is None:
            return self.scale.square().reciprocal()
        if self.family == "Laplace":
            return 1.0 / (self.scale * square.sqrt())
        if self.family == "Horseshoe":
            return local_precision(square, self.scale)
        assert self.df is not None
        return (self.df + 1.0) / (self.df * self.scale.square() + square)


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
