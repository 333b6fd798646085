"""The rows of ``run.py``: from a set of questions to predictions.

All start from the same adapter. AdamW: batches of 16, at most four epochs, three rates, early stopping on a held-out
eighth, which also chooses the temperature S; dropout, ensemble, TFB, Laplace and our post hoc row begin there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import bayes_kf as bkf
from benchmarks.common.learners import Stream, logits
from benchmarks.language.bayesian_lora import Blob, drawn, tfb
from benchmarks.language.kept_search import Search, adamw_search
from benchmarks.language.questions import LanguageProblem
from benchmarks.quality.rows import (
    AHEAD,
    DROPOUT,
    LaplaceLoader,
    Learned,
    Outputs,
    Predict,
    Predicted,
    averaged,
    eager,
    predictive,
    sampled_by,
    softmax,
    validation,
)
from benchmarks.quality.split.rows import stream_loader
from benchmarks.quality.split.strong import Plan, facts, fitted_temperature, more_members, scaled, train

PLAN = Plan(4, 2, F.cross_entropy, (3e-4, 1e-3, 3e-3))
DRAWS = 10
IVON_RATES = (0.03, 0.1, 0.3)
BLOB_RATES = (1e-3, 3e-3)

Learn = Callable[[LanguageProblem, Stream, int], Learned]


def zero_shot(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """The language model as it is."""
    model = problem.model(seed, 0.0)
    return Learned(lambda given: Predicted(softmax(model, given)))


def zero_shot_scaled(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """The same, at the temperature that the training questions choose."""
    model = problem.model(seed, 0.0)
    return _with_temperature(lambda given: Predicted(softmax(model, given)), stream, {})


def adamw(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """AdamW with early stopping and temperature scaling."""
    adamw, _, heldout = _searched(problem, stream, seed)
    return _with_temperature(lambda given: Predicted(softmax(adamw.best.model, given)), heldout, adamw.facts)


def dropout(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """AdamW with LoRA's dropout, also in predictions, at the rate that AdamW's search chooses."""
    adamw, fitted, heldout = _searched(problem, stream, seed)
    model = problem.model(seed, DROPOUT)
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    torch.manual_seed(seed)
    run = train(model, fitted, heldout, seed, adamw.best.rate, PLAN)

    def bare(given: Stream) -> Predicted:
        torch.manual_seed(seed)
        return averaged([softmax(run.model, given) for _ in range(DRAWS)])

    return _with_temperature(bare, heldout, adamw.facts | facts([run], adamw.runs))


def ensemble(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """Three runs of AdamW, averaged."""
    adamw, fitted, heldout = _searched(problem, stream, seed)
    make = partial(_model, problem)
    runs = [adamw.best, *more_members(make, fitted, heldout, seed, PLAN, adamw.best.rate)]
    return _with_temperature(
        lambda given: averaged([softmax(run.model, given) for run in runs]),
        heldout,
        adamw.facts | facts(runs, adamw.runs[1:]),
    )


def laplace(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """Laplace-LoRA: laplace-torch, Kronecker factors, on AdamW's adapter; prior precision by its evidence, probit."""
    with warnings.catch_warnings(action="ignore"):
        from laplace import Laplace
    adamw, fitted, _ = _searched(problem, stream, seed)
    model: Any = adamw.best.model
    eager(model.upper)  # its Jacobians vectorize backward passes, which SDPA with a mask does not support
    wrapped = Outputs(model)
    posterior = Laplace(wrapped, "classification", "all", "kron", dict_key_x="inputs_embeds")
    posterior.fit(LaplaceLoader(fitted))
    posterior.optimize_prior_precision(method="marglik", pred_type="glm", link_approx="probit")

    def predict(given: Stream) -> Predicted:
        probs = [posterior(x, pred_type="glm", link_approx="probit") for x, _ in given.batches(AHEAD // 8)]
        return Predicted(torch.cat(probs).double())

    return Learned(predict, facts=adamw.facts)


def ivon(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """IVON (its own package), four epochs, the rate of three with the least held-out loss; ten draws."""
    from ivon import IVON

    fitted, heldout = validation(stream)

    def run(rate: float) -> Predict:
        model = problem.model(seed, 0.0)
        torch.manual_seed(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        count = len(fitted.labels)
        optimizer = IVON(parameters, lr=rate, ess=count, hess_init=1.0, beta2=0.999, weight_decay=1e-4)
        total = PLAN.epochs * math.ceil(count / 16)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(PLAN.epochs):
            for inputs, labels in fitted.at(torch.randperm(count, generator=generator)).batches(16):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    F.cross_entropy(logits(model, inputs), labels).backward()
                optimizer.step()
                schedule.step()

        return sampled_by(optimizer, model, DRAWS)

    return _best_rate(run, IVON_RATES, heldout)


def blob(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """BLoB's recipe (``bayesian_lora.py``), four epochs, the rate of two with the least held-out loss; ten draws."""
    fitted, heldout = validation(stream)

    def run(rate: float) -> Predict:
        learner = Blob(problem.model(seed, 0.0), seed)
        learner.learn(fitted, seed, rate, PLAN.epochs)
        return lambda given: averaged([softmax(model, given) for model in learner.draws(seed)])

    return _best_rate(run, BLOB_RATES, heldout)


def training_free(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """TFB's recipe (``bayesian_lora.py``) on AdamW's adapter; ten draws."""
    adamw, _, heldout = _searched(problem, stream, seed)
    model = adamw.best.model
    means, deviations, sigma = tfb(model, heldout, seed)

    def predict(given: Stream) -> Predicted:
        return averaged([softmax(draw, given) for draw in drawn(model, means, deviations, seed)])

    return Learned(predict, facts={"sigma": sigma, **adamw.facts})


def one_pass(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """This package: one pass of the filter in batches of 8, its latest questions choose size and sharpness."""
    model, batches = problem.model(seed, 0.0), stream.batches(8)
    return _of_posterior(bkf.fit(model, batches, bkf.KalmanConfig(seed=seed), held_out="latest", progress=False))


def default(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """This package without settings."""
    return _of_posterior(bkf.fit(problem.model(seed, 0.0), stream_loader(stream, seed), progress=False))


def post_hoc(problem: LanguageProblem, stream: Stream, seed: int) -> Learned:
    """This package on AdamW's adapter, with size and sharpness by the held-out eighth, which is then learned."""
    adamw, fitted, heldout = _searched(problem, stream, seed)
    posterior = bkf.fit(
        adamw.best.model, fitted.batches(8), start="trained", held_out=heldout.batches(8), progress=False
    )
    learned = _of_posterior(posterior)
    return learned._replace(facts={**learned.facts, **adamw.facts})


ROWS: dict[str, tuple[str, Learn]] = {  # title, method
    "zero-shot": ("zero-shot", zero_shot),
    "zero-shot-ts": ("zero-shot, temperature scaling", zero_shot_scaled),
    "adamw": ("AdamW, early stopping, temperature scaling", adamw),
    "dropout": ("MC dropout", dropout),
    "ensemble": ("ensemble of three", ensemble),
    "laplace": ("Laplace-LoRA (laplace-torch, Kronecker)", laplace),
    "ivon": ("IVON", ivon),
    "blob": ("BLoB's recipe", blob),
    "tfb": ("TFB's recipe", training_free),
    "one-pass": ("**ours, one pass**", one_pass),
    "default": ("**ours, default**", default),
    "post-hoc": ("**ours, post hoc on AdamW**", post_hoc),
}


def _model(problem: LanguageProblem, seed: int) -> torch.nn.Module:
    return problem.model(seed, 0.0)


def _searched(problem: LanguageProblem, stream: Stream, seed: int) -> tuple[Search, Stream, Stream]:
    """AdamW's runs, the questions that they learned and the held-out eighth."""
    fitted, heldout = validation(stream)
    return adamw_search(problem, fitted, heldout, seed, PLAN), fitted, heldout


def _with_temperature(bare: Predict, heldout: Stream, numbers: dict[str, Any]) -> Learned:
    """Predictions at the temperature that held-out questions choose."""
    temperature = fitted_temperature(bare(heldout).probs, heldout.labels)

    def predict(given: Stream) -> Predicted:
        predicted = bare(given)
        return Predicted(scaled(predicted.probs, temperature), predicted.epistemic)

    return Learned(predict, facts={"temperature": temperature, **numbers})


def _best_rate(run: Callable[[float], Predict], rates: tuple[float, ...], heldout: Stream) -> Learned:
    """The predictions of the rate with the least held-out loss."""
    results = []
    for rate in rates:
        predict = run(rate)
        probs = predict(heldout).probs
        loss = -probs.gather(1, heldout.labels[:, None]).log().mean().item()
        results.append((loss if math.isfinite(loss) else math.inf, rate, predict))
    loss, rate, predict = min(results, key=lambda result: result[0])
    if math.isinf(loss):
        raise FloatingPointError("no learning rate has a finite held-out loss")
    return Learned(predict, facts={"rate": rate})


def _of_posterior(posterior: Any) -> Learned:
    """Predictions of a posterior or a mixture, and what it chose."""
    members = getattr(posterior, "members", [posterior])
    sizes = [member.history["size"].tolist() for member in members if "size" in member.history]
    chosen = {
        "temperature": posterior.softmax_temperature,
        "sizes": sizes,
        "covariance_temperature": posterior.temperature,
    }
    return Learned(predictive(posterior), facts=chosen)
