"""The methods of ``run.py``: AdamW, the filter with three curvatures, and methods of other packages.

Each function takes its own model and two batches, and returns a :class:`Running`: whole steps on the second batch.
IVON's package, ivon-opt, is under the GPL and in no extra; it is measured if it is installed. laplace-torch fits a
covariance at a fixed mean, and ``jacrev`` is the Jacobian alone: neither is a whole step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayes_kf as bkf
from benchmarks.speed.models import Batch, logits, trainable

RATE = 1e-4  # small, so that a hundred steps on one batch hardly change the model
EPSILON = 1e-3  # probability that `truncated` leaves out
PRIOR_SD = 0.1  # for peers that need one


class Running(NamedTuple):
    """A method with its model.

    Attributes:
        step: one whole step.
        state: the vector that a step changes; it must differ after the first step.
        facts: further numbers of the last step.
    """

    step: Callable[[], None]
    state: Callable[[], Tensor]
    facts: Callable[[], dict[str, float]] = dict


Make = Callable[[nn.Module, Batch, Batch], Running]


def adamw(model: nn.Module, _: Batch, batch: Batch) -> Running:
    """Forward, backward and ``torch.optim.AdamW``; gradients are dropped after the step."""
    parameters = list(trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def step() -> None:
        F.cross_entropy(logits(model, batch.inputs), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Running(step, lambda: _flat(parameters))


def kalman(curvature: str, covariance: str = "diagonal") -> Make:
    """The filter: ``update`` from the state after another batch, the same state each time."""

    def make(model: nn.Module, before: Batch, batch: Batch) -> Running:
        kf = bkf.KalmanFilter(model, _config(curvature, covariance))
        state, info = kf.update(kf.init(before.inputs), *before)
        current: dict[str, Any] = {"state": state, "info": info}

        def step() -> None:
            current.clear()  # not three states at a time
            current["state"], current["info"] = kf.update(state, *batch)

        def now() -> Tensor:
            return torch.cat([current["state"].belief.mean, kf.marginal_variance(current["state"])])

        return Running(step, now, lambda: _seen(current["info"]))

    return make


def _config(curvature: str, covariance: str) -> bkf.KalmanConfig:
    return bkf.KalmanConfig(curvature=curvature, curvature_epsilon=EPSILON, covariance=covariance)


def ivon(model: nn.Module, _: Batch, batch: Batch) -> Running:
    """IVON's own package: a gradient at one draw of the weights, and its step."""
    from ivon import IVON

    parameters = list(trainable(model).values())
    optimizer = IVON(parameters, lr=RATE, ess=1e4, hess_init=0.1)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            F.cross_entropy(logits(model, batch.inputs), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Running(step, lambda: _flat(parameters))


def posteriors_ekf(model: nn.Module, _: Batch, batch: Batch) -> Running:
    """``posteriors.ekf.diag_fisher``: the empirical Fisher from gradients by example."""
    with warnings.catch_warnings(action="ignore"):
        from posteriors.ekf import diag_fisher

    def log_likelihood(parameters: dict[str, Tensor], given: Batch) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(model, parameters, kwargs=given.inputs).logits
        return -F.cross_entropy(outputs, given.labels, reduction="none"), outputs

    transform = diag_fisher.build(log_likelihood, lr=RATE, per_sample=True, init_sds=PRIOR_SD)
    current = {"state": transform.init({name: p.detach().clone() for name, p in trainable(model).items()})}

    def step() -> None:
        current["state"], _ = transform.update(current["state"], batch)

    def now() -> Tensor:
        parts = (current["state"].params, current["state"].sd_diag)
        return torch.cat([_flat([part[name] for name in trainable(model)]) for part in parts])

    return Running(step, now)


def pyro_svi(model: nn.Module, _: Batch, batch: Batch) -> Running:
    """Pyro: a step of SVI with ``AutoNormal`` over the same tensors, one particle, Adam."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal, init_to_value

    start = {name.replace(".", "_"): p.detach().clone() for name, p in trainable(model).items()}
    names = dict(zip(start, trainable(model), strict=True))

    def sampled(given: Batch) -> None:
        sites = {
            names[site]: pyro.sample(site, dist.Normal(torch.zeros_like(t), 1.0).to_event(t.dim()))
            for site, t in start.items()
        }
        outputs = torch.func.functional_call(model, sites, kwargs=given.inputs).logits
        with pyro.plate("data", len(given.labels)):
            pyro.sample("y", dist.Categorical(logits=outputs), obs=given.labels)

    pyro.clear_param_store()
    guide = AutoNormal(sampled, init_loc_fn=init_to_value(values=start), init_scale=PRIOR_SD)
    svi = SVI(sampled, guide, pyro.optim.Adam({"lr": RATE}), Trace_ELBO())
    guide(batch)
    return Running(lambda: svi.step(batch), lambda: _flat(list(guide.parameters())))


def laplace_fit(structure: str) -> Make:
    """laplace-torch: ``fit`` of all trainable tensors on the batch, with its default backend."""

    def make(model: nn.Module, _: Batch, batch: Batch) -> Running:
        with warnings.catch_warnings(action="ignore"):
            from laplace import Laplace
        key = next(iter(batch.inputs))  # laplace-torch reads the batch size from this key
        fitted = Laplace(_Logits(model), "classification", "all", structure, dict_key_x=key)
        loader = _Loader(batch)

        def now() -> Tensor:
            hessian = getattr(fitted, "H", None)
            groups = [[hessian]] if isinstance(hessian, Tensor) else getattr(hessian, "eigenvalues", [])
            return _flat([part for group in groups for part in group] or [torch.zeros(1)])

        return Running(lambda: fitted.fit(loader), now)

    return make


def jacrev(model: nn.Module, _: Batch, batch: Batch) -> Running:
    """``torch.func.jacrev`` of the outputs of the batch: the Jacobian alone, no conditioning."""
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    firsts: list[Tensor] = []

    def outputs(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, tensors, kwargs=batch.inputs).logits

    def step() -> None:
        jacobian = torch.func.jacrev(outputs)(parameters)
        firsts[:] = [rows.flatten(2)[:, :, 0].clone() for rows in jacobian.values()]

    return Running(step, lambda: _flat(firsts or [torch.zeros(1)]))


class Method(NamedTuple):
    """A method's constructor, title, required package, and whether it needs eager attention in the place of SDPA."""

    make: Make
    title: str
    package: str | None = None
    eager: bool = False


METHODS: dict[str, Method] = {
    "adamw": Method(adamw, "AdamW"),
    "exact": Method(kalman("exact"), "**exact**"),
    "low-rank": Method(kalman("exact", "low_rank"), "**exact**, low rank 20"),
    "truncated": Method(kalman("truncated"), "**truncated**, ε = 1e-3"),
    "sampled": Method(kalman("sampled"), "**sampled**, K = 1"),
    "ivon": Method(ivon, "IVON", "ivon-opt"),
    "svi": Method(pyro_svi, "Pyro SVI, AutoNormal", "pyro-ppl"),
    "posteriors": Method(posteriors_ekf, "posteriors EKF, diagonal", "posteriors", eager=True),
    "laplace-diag": Method(laplace_fit("diag"), "laplace-torch, diagonal fit", "laplace-torch"),
    "laplace-kron": Method(laplace_fit("kron"), "laplace-torch, Kronecker fit", "laplace-torch"),
    "jacrev": Method(jacrev, "`torch.func.jacrev`, Jacobian alone"),
}


def installed(name: str) -> str | None:
    """Version of the package that a method needs; "" for none, None if it is absent."""
    package = METHODS[name].package
    try:
        return version(package) if package else ""
    except ModuleNotFoundError:
        return None


class _Logits(nn.Module):
    """A model that takes a mapping and returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        return logits(self.model, {key: value for key, value in inputs.items() if key != "labels"})


class _Loader:
    """One batch as a loader for laplace-torch."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.dataset = {**batch.inputs, "labels": batch.labels}, range(len(batch.labels))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield self.batch


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _seen(info: Any) -> dict[str, float]:
    """The number of classes with 1 − ε of the probability, the accuracy, and the guard's damping."""
    ordered = info.outputs.softmax(1).sort(1, descending=True).values
    kept = (ordered.cumsum(1) < 1 - EPSILON).sum(1) + 1
    facts = {"kept_classes": kept.double().mean().item(), "damping": float(info.damping)}
    return facts | {"accuracy": info.correct.double().mean().item(), "log_loss": info.log_loss.double().mean().item()}
