"""Scores and verdicts of a whole report under known truths, for ``interval_coverage.py``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bayes_kf import evaluation as ev

MEMBERS, PEOPLE = 8, 20
SIMULATIONS = 39
POPULATION = 100_000
SIZES, CLASSES = (30, 100, 1000), (3, 10)
REPEATS = 100
ALARMS = {  # verdict -> beginnings of the sentences that would be false
    "foreign inputs of the same kind": ("The model is less certain of", "The model is more certain of"),
    "errors that doubt says nothing of": ("Uncertainty detects errors", "Uncertainty is lower for errors"),
    "people whose doubt is another": ("The model is uncertain where", "The model is most certain where"),
    "consistent innovations": ("The filter was over-confident", "The filter was under-confident"),
    "independent innovations (1 %)": ("The squared innovations are autocorrelated",),
}


def population(rng: np.random.Generator, size: int, classes: int) -> dict[str, Tensor]:
    """Draws of class probabilities (S, N, C), people's shares, labels, and flatter foreign probabilities."""
    logits = torch.from_numpy(2.0 * rng.normal(size=(size, classes)))
    draws = (logits + torch.from_numpy(0.7 * rng.normal(size=(MEMBERS, size, classes)))).softmax(-1)
    mean = draws.mean(0)
    uniform = torch.from_numpy(rng.random((size, PEOPLE)))
    answers = (mean.cumsum(1).unsqueeze(-1) < uniform.unsqueeze(1)).sum(1).clamp(max=classes - 1)  # (N, people)
    human = torch.nn.functional.one_hot(answers, classes).double().mean(1)
    targets = (mean.cumsum(1) < torch.from_numpy(rng.random((size, 1)))).sum(1).clamp(max=classes - 1)
    foreign = torch.from_numpy(1.2 * rng.normal(size=(size, classes))).softmax(-1)
    return {"draws": draws, "human": human, "targets": targets, "foreign": foreign}


def page(drawn: dict[str, Tensor], sets: ev.ConformalSets) -> ev.Report:
    """The report on a :func:`population`."""
    return ev.evaluate_predictions(
        drawn["draws"].mean(0),
        drawn["targets"],
        uncertainty=ev.entropy_parts(drawn["draws"]),
        ood={"foreign": drawn["foreign"]},
        human=drawn["human"],
        conformal=sets,
        num_simulations=SIMULATIONS,
    )


def coverage(size: int, classes: int) -> dict[str, float]:
    """Shares of data sets in which the interval of a score of the page covers its true value."""
    known = population(np.random.default_rng(11), 500, classes)
    sets = ev.ConformalSets.fit(known["draws"].mean(0), known["targets"])
    true = page(population(np.random.default_rng(7), POPULATION, classes), sets).scores
    inside: dict[str, list[bool]] = {}
    without = 0
    for seed in range(REPEATS):
        scores = page(population(np.random.default_rng([seed, size, classes]), size, classes), sets).scores
        for name, value in scores.items():
            if f"{name}_low" in scores:
                low, high = scores[f"{name}_low"], scores[f"{name}_high"]
                inside.setdefault(name, []).append(low <= true[name] <= high)
                without += not low <= value <= high
    return {name: sum(hits) / len(hits) for name, hits in inside.items()} | {"repeats": REPEATS, "without": without}


def alarms(size: int, classes: int) -> dict[str, float]:
    """Shares of data sets in which a verdict is false."""
    counts = dict.fromkeys([*ALARMS, "right forecasts", "equal models"], 0)
    for seed in range(2 * REPEATS):
        rng = np.random.default_rng([seed, size, classes, 1])
        drawn, other = population(rng, size, classes), population(rng, size, classes)
        probs, top = drawn["draws"].mean(0), drawn["draws"].mean(0).argmax(1)
        right = torch.from_numpy(rng.random(size) < 0.7)
        targets = torch.where(right, top, (top + 1) % classes)
        history = {"innovation": torch.from_numpy(rng.chisquare(1, size)), "dof": torch.ones(size)}
        extra = {"ood": {"same": other["draws"].mean(0)}, "human": other["human"], "history": history}
        said = ev.evaluate_predictions(probs, targets, num_simulations=SIMULATIONS, **extra).sections.verdict
        for name, beginnings in ALARMS.items():
            counts[name] += any(sentence.startswith(beginnings) for sentence in said)
        mean = torch.from_numpy(rng.normal(size=size))
        values = mean + torch.from_numpy(rng.normal(size=size))
        forecast = ev.evaluate_regression(mean, values, variance=torch.ones(size), num_simulations=SIMULATIONS)
        uniform = ("No deviation of the PIT values", "Too few targets")
        counts["right forecasts"] += not any(sentence.startswith(uniform) for sentence in forecast.sections.verdict)
        blurred = torch.from_numpy(0.3 * rng.normal(size=(2, size, classes)))
        models = {f"model {k}": (probs.log() + blurred[k]).softmax(1) for k in range(2)}
        compared = ev.compare_predictions(models, drawn["targets"])
        counts["equal models"] += any(
            difference.is_clear for score in compared.values() for difference in score.differences
        )
    return {name: count / (2 * REPEATS) for name, count in counts.items()} | {"repeats": 2 * REPEATS}
