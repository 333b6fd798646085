"""The rows of ``run.py``: methods from a stream and a model to predictions.

All start with the same weights and make one pass over the stream, one example at a time. The exceptions are AdamW with
``MORE`` passes, and this package's default, which makes several passes with ``TOGETHER`` examples at a time. Learning
rates of gradient methods fall linearly to zero.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.evaluation import entropy_parts
from bayes_kf.inference.fitting.defaults.default_curvature import EXACT_IN_ONE_PASS
from benchmarks.bench.registry.problems import QualityProblem
from benchmarks.common.learners import Inputs, Stream, logits

BATCH = 1
TOGETHER = 8
MORE = 3  # passes of AdamW, about as long as one of the filter
AHEAD = 64  # examples of a prediction batch
DRAWS = 16  # of the weights, for predictions that are averages over draws
DROPOUT = 0.1
MEMBERS = 5
RATES = {
    "adamw": tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
    "ivon": tuple({"lr": lr, "hess_init": h} for lr in (0.03, 0.1, 0.3) for h in (0.1, 1.0)),
    "svi": tuple({"lr": lr, "prior_sd": sd} for lr in (3e-3, 1e-2) for sd in (0.1, 1.0)),
}

Choice = Mapping[str, float]


class Predicted(NamedTuple):
    """Predictions of a stream's inputs.

    Attributes:
        probs: probabilities (N, C), float64.
        epistemic: mutual information of label and parameters in nats, (N,), float64; None for a row without it.
    """

    probs: Tensor
    epistemic: Tensor | None = None


Predict = Callable[[Stream], Predicted]


class Learned(NamedTuple):
    """The result of a row.

    Attributes:
        predict: from a stream to predictions; labels are not used.
        online: whether each example was predicted correctly before its update, and its log loss; (T,) each.
        facts: further numbers.
        variants: name -> other predictions of the same models, scored beside the row's own.
    """

    predict: Predict
    online: tuple[Tensor, Tensor] | None = None
    facts: Mapping[str, Any] = {}
    variants: Mapping[str, Predict] = {}


Learn = Callable[[QualityProblem, Stream, int, Choice], Learned]


def adamw(passes: int) -> Learn:
    """Fine-tuning by AdamW, weight decay 1e-2."""

    def learn(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
        model = problem.model(seed, 0.0)
        online = descend(model, stream, seed, choice["lr"], passes)
        return Learned(lambda given: Predicted(softmax(model, given)), online if passes == 1 else None)

    return learn


def temperature(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """AdamW on the first seven eighths, and the best temperature on the rest (Guo et al. 2017).

    The temperature lies between 0.5 and 10: if all answers of a small rest are right, the best one would be zero.
    """
    fitted, rest = validation(stream)
    model = problem.model(seed, 0.0)
    descend(model, fitted, seed, choice["lr"])
    outputs = raw(model, rest)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        mean_loss = F.cross_entropy(outputs * log_scale.exp(), rest.labels)
        mean_loss.backward()
        return mean_loss

    optimizer.step(loss)  # type: ignore[arg-type]  # a closure that returns a tensor, as torch documents
    scale = log_scale.detach().exp().clamp(0.1, 2.0)
    return Learned(
        lambda given: Predicted((raw(model, given) * scale).softmax(1)), facts={"temperature": 1 / float(scale)}
    )


def dropout(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """AdamW with LoRA's dropout, which is also active in predictions (Gal and Ghahramani 2016)."""
    model = problem.model(seed, DROPOUT)
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    torch.manual_seed(seed)
    descend(model, stream, seed, choice["lr"])
    return Learned(lambda given: averaged([softmax(model, given) for _ in range(DRAWS)]))


def ensemble(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """Five runs of AdamW with different adapters, classifiers and orders (Lakshminarayanan et al. 2017)."""
    models = [problem.model(MEMBERS * seed + member, 0.0) for member in range(MEMBERS)]
    for member, model in enumerate(models):
        descend(model, stream, MEMBERS * seed + member, choice["lr"])
    return Learned(lambda given: averaged([softmax(model, given) for model in models]))


def laplace(structure: str) -> Learn:
    """laplace-torch on the trained adapter: all trainable tensors, prior precision by its evidence, probit."""

    def learn(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
        with warnings.catch_warnings(action="ignore"):
            from laplace import Laplace
        model = problem.model(seed, 0.0)
        eager(model)  # its Jacobians vectorize backward passes, which SDPA with a mask does not support
        descend(model, stream, seed, choice["lr"])
        wrapped, key = Outputs(model), "input_ids"
        fitted = Laplace(wrapped, "classification", "all", structure, dict_key_x=key)
        fitted.fit(LaplaceLoader(stream))
        fitted.optimize_prior_precision(method="marglik", pred_type="glm", link_approx="probit")

        def predict(given: Stream) -> Predicted:
            batches = given.batches(AHEAD // 4)
            probs = [fitted(_plain(x), pred_type="glm", link_approx="probit") for x, _ in batches]
            return Predicted(torch.cat(probs).double())

        return Learned(predict, facts={"prior_precision": float(fitted.prior_precision.mean())})

    return learn


def ivon(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """IVON (Shen et al. 2024, its own package): ess is the number of examples, β₂ suits short runs."""
    from ivon import IVON

    model = problem.model(seed, 0.0)
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(
        parameters,
        lr=choice["lr"],
        ess=len(stream.labels),
        hess_init=choice["hess_init"],
        beta2=0.999,
        weight_decay=1e-4,
    )
    steps = math.ceil(len(stream.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for inputs, labels in stream.batches(BATCH):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(logits(model, inputs), labels).backward()
        optimizer.step()
        schedule.step()

    return Learned(sampled_by(optimizer, model, DRAWS))


def sampled_by(optimizer: Any, model: nn.Module, count: int) -> Predict:
    """Predictions that are averages over ``count`` draws of IVON's weights."""

    def predict(given: Stream) -> Predicted:
        draws = []
        for _ in range(count):
            with optimizer.sampled_params():
                draws.append(softmax(model, given))
        return averaged(draws)

    return predict


def svi(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """Pyro's SVI with ``AutoNormal`` around the start, Adam, and the data term scaled to the whole stream."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal, init_to_value

    model, total = problem.model(seed, 0.0), len(stream.labels)
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    start = {name.replace(".", "_"): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    names = dict(zip(start, (name for name, p in model.named_parameters() if p.requires_grad), strict=True))

    def sampled(inputs: Inputs, labels: Tensor) -> None:
        sites = {
            names[site]: pyro.sample(site, dist.Normal(t, choice["prior_sd"]).to_event(t.dim()))
            for site, t in start.items()
        }
        outputs = substituted(model, sites, inputs)
        with pyro.plate("data", total, subsample=labels):
            pyro.sample("y", dist.Categorical(logits=outputs), obs=labels)

    guide = AutoNormal(sampled, init_loc_fn=init_to_value(values=start), init_scale=min(0.01, choice["prior_sd"]))
    steps = math.ceil(total / BATCH)
    decay = {"lr": choice["lr"], "lrd": 0.1 ** (1 / steps)}
    inference = SVI(sampled, guide, pyro.optim.ClippedAdam(decay), Trace_ELBO())
    for inputs, labels in stream.batches(BATCH):
        inference.step(inputs, labels)

    @torch.no_grad()
    def predict(given: Stream) -> Predicted:
        draws = []
        for _ in range(DRAWS):
            drawn = {names[site]: value for site, value in guide(*stream.batches(BATCH)[0]).items() if site in names}
            outputs = [substituted(model, drawn, inputs) for inputs, _ in given.batches(AHEAD)]
            draws.append(torch.cat(outputs).double().softmax(1))
        return averaged(draws)

    return Learned(predict)


def curvature(problem: QualityProblem) -> str:
    """The curvature of a single pass: the one that ``fit`` chooses for a stream without settings."""
    return "sampled" if problem.classes > EXACT_IN_ONE_PASS else "exact"


def kalman(make: Callable[..., bkf.KalmanConfig], sampling: bool = True) -> Learn:
    """This package: one pass from the prior, in order; ``sampling`` allows sampled curvature."""

    def learn(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
        config = make(seed=seed, curvature=curvature(problem) if sampling else "exact")
        posterior = bkf.fit(problem.model(seed, 0.0), stream.batches(BATCH), config, progress=False)
        online = posterior.history["correct"].bool(), posterior.history["log_loss"].double()
        return Learned(predictive(posterior), online, {"temperature": posterior.temperature})

    return learn


def default(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """This package without settings: it chooses its prior and temperature on an eighth of the stream."""
    posterior = bkf.fit(problem.model(seed, 0.0), stream.batches(TOGETHER), progress=False)
    chosen = posterior.config.initial_spread
    return Learned(predictive(posterior), facts={"temperature": posterior.temperature, "prior": chosen})


def post_hoc(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """This package on AdamW's adapter: the mean is fixed, one pass estimates the covariance."""
    model = problem.model(seed, 0.0)
    descend(model, stream, seed, choice["lr"])
    config = bkf.KalmanConfig(seed=seed, curvature=curvature(problem))
    posterior = bkf.fit(model, stream.batches(BATCH), config, start="trained", progress=False)
    return Learned(predictive(posterior), facts={"temperature": posterior.temperature})


def post_hoc_on(problem: QualityProblem, stream: Stream, seed: int, choice: Choice) -> Learned:
    """As :func:`post_hoc`, and then one pass of the mean toward the mode under that covariance."""
    model = problem.model(seed, 0.0)
    descend(model, stream, seed, choice["lr"])
    config = bkf.KalmanConfig(seed=seed, curvature=curvature(problem), mean_passes=1)
    posterior = bkf.fit(model, stream.batches(TOGETHER), config, start="trained", progress=False)
    return Learned(predictive(posterior), facts={"temperature": posterior.temperature})


def predictive(posterior: bkf.Posterior) -> Predict:
    """The posterior's default predictions."""

    def predict(given: Stream) -> Predicted:
        prediction = posterior.predict_loader([(inputs, None) for inputs, _ in given.batches(AHEAD)])
        assert prediction.probs is not None  # a classifier
        epistemic = prediction.epistemic
        return Predicted(prediction.probs.double(), None if epistemic is None else epistemic.double())

    return predict


ROWS: dict[str, tuple[str, Learn, str | None]] = {  # title, method, family whose rate is chosen on a part of the stream
    "adamw": ("AdamW", adamw(1), "adamw"),
    "adamw-more": ("AdamW, three passes", adamw(MORE), "adamw"),
    "temperature": ("AdamW + temperature scaling", temperature, "adamw"),
    "dropout": ("MC dropout", dropout, "adamw"),
    "ensemble": ("ensemble of 5", ensemble, "adamw"),
    "laplace-diag": ("Laplace, diagonal (laplace-torch)", laplace("diag"), "adamw"),
    "laplace-kron": ("Laplace, Kronecker (laplace-torch)", laplace("kron"), "adamw"),
    "ivon": ("IVON", ivon, "ivon"),
    "svi": ("Pyro SVI, AutoNormal", svi, "svi"),
    "loko": ("LoKO", kalman(bkf.KalmanConfig.loko, sampling=False), None),
    "diagonal": ("ours, diagonal", kalman(partial(bkf.KalmanConfig, covariance="diagonal")), None),
    "online": ("ours, one pass online", kalman(bkf.KalmanConfig), None),
    "default": ("**ours, default**", default, None),
    "sampled": ("ours, default with sampled curvature", default, None),  # today's default samples, the first did not
    "post-hoc": ("**ours, post hoc on AdamW**", post_hoc, "adamw"),
    "post-hoc-on": ("**ours, post hoc, the mean goes on**", post_hoc_on, "adamw"),
}
TUNED: dict[str, Learn] = {"adamw": adamw(1), "ivon": ivon, "svi": svi}


def tune(family: str, problem: QualityProblem, stream: Stream, seed: int) -> tuple[Choice, list[float]]:
    """The setting with the least log loss on the stream's last eighth after learning the rest, and all losses."""
    fitted, rest = validation(stream)
    losses = []
    for choice in RATES[family]:
        probs = TUNED[family](problem, fitted, seed, choice).predict(rest).probs
        loss = -probs.gather(1, rest.labels[:, None]).log().mean().item()
        losses.append(loss if math.isfinite(loss) else math.inf)
    return RATES[family][losses.index(min(losses))], losses


def validation(stream: Stream) -> tuple[Stream, Stream]:
    """The first seven eighths of a stream, and the rest."""
    cut = len(stream.labels) - len(stream.labels) // 8
    return stream.at(slice(cut)), stream.at(slice(cut, None))


def descend(model: nn.Module, stream: Stream, seed: int, rate: float, passes: int = 1) -> tuple[Tensor, Tensor]:
    """Correctness and log losses of the first pass of AdamW over the stream; ``model`` is changed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=1e-2)
    steps = passes * math.ceil(len(stream.labels) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    correct, losses = [], []
    for number, (inputs, labels) in enumerate(rounds(stream, seed, passes)):
        outputs = logits(model, inputs)
        loss = F.cross_entropy(outputs, labels, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimizer.step()
        schedule.step()
        if number < steps // passes:
            correct.append(outputs.detach().argmax(1) == labels)
            losses.append(loss.detach().double())
    return torch.cat(correct), torch.cat(losses)


def rounds(stream: Stream, seed: int, passes: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Batches of all passes; the first in order, the others in orders of their own."""
    generator = torch.Generator().manual_seed(seed)
    yield from stream.batches(BATCH)
    for _ in range(passes - 1):
        yield from stream.at(torch.randperm(len(stream.labels), generator=generator)).batches(BATCH)


@torch.no_grad()
def raw(model: nn.Module, given: Stream) -> Tensor:
    """Logits, (N, C), float64."""
    return torch.cat([logits(model, inputs) for inputs, _ in given.batches(AHEAD)]).double()


def softmax(model: nn.Module, given: Stream) -> Tensor:
    """Probabilities, (N, C), float64."""
    return raw(model, given).softmax(1)


def averaged(draws: Sequence[Tensor]) -> Predicted:
    """The mean of several predictions (N, C), whose disagreement is the epistemic part."""
    samples = torch.stack(list(draws))
    return Predicted(samples.mean(0), entropy_parts(samples).epistemic)


def substituted(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """Logits of the model with other values of some tensors."""
    tensors = dict(tensors)
    if isinstance(inputs, Tensor):
        outputs = torch.func.functional_call(model, tensors, (inputs,))
    else:
        outputs = torch.func.functional_call(model, tensors, kwargs=dict(inputs))
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def eager(model: nn.Module) -> None:
    """Switch transformers' models to eager attention."""
    change = getattr(model.get_base_model(), "set_attn_implementation", None)  # type: ignore[operator]
    if change is not None:
        change("eager")


class Outputs(nn.Module):
    """A model that returns its logits, also for texts as one mapping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        if isinstance(inputs, Tensor):
            return logits(self.model, inputs)
        return logits(self.model, {name: values for name, values in inputs.items() if name != "labels"})


class LaplaceLoader:
    """A stream as a loader for laplace-torch."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.dataset = stream, range(len(stream.labels))

    def __iter__(self) -> Iterator[Any]:
        for inputs, labels in self.stream.batches(BATCH):
            yield (inputs, labels) if isinstance(inputs, Tensor) else {**inputs, "labels": labels}

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / BATCH)


def _plain(inputs: Inputs) -> Any:
    return inputs if isinstance(inputs, Tensor) else copy.copy(inputs)
