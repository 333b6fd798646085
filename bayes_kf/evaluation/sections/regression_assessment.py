"""Cards, findings and advice of a report on a regression."""

import math
from collections.abc import Sequence

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.report.contents import Advice, Card, Finding, Sections
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.advice import Calls
from bayes_kf.evaluation.sections.distrust import is_beyond_chance, neighbours, two_sided
from bayes_kf.evaluation.sections.regression import Forecast, pit_shape, pit_values
from bayes_kf.evaluation.sections.verdicts.phrases import minus, percent
from bayes_kf.evaluation.sections.verdicts.regression import pit_card, spread_card

LEVEL = 0.8  # of the intervals that findings and advice speak of
NUM_BINS = 5


def assessment_section(forecast: Forecast, scores: dict[str, Score], seed: int, calls: Calls) -> Sections:
    """The answers at the top of the page.

    Args:
        forecast: Predictions and targets.
        scores: Of the report.
        seed: Of randomized PIT values.
        calls: The code to name.
    """
    pit = pit_values(forecast, seed).flatten()
    spearman = spread_correlation(forecast)
    cards = [
        pit_card(scores["pit_ks"], *pit_shape(pit), scores["coverage_80"], forecast.num_targets),
        spread_card(spearman, forecast.num_targets),
    ]
    return Sections(
        lead=f"The root mean squared error over {forecast.num_targets:,} targets is {scores['rmse'].value:.4g}.",
        cards=cards,
        findings=_findings(forecast, pit),
        advice=_advice(forecast, pit, cards, calls),
        scores={} if math.isnan(spearman.value) else {"spread_spearman": spearman},
    )


def spread_correlation(forecast: Forecast) -> Score:
    """Spearman's correlation of predicted standard deviations and absolute errors, with Fisher's interval.

    The interval has the variance of Bonett and Wright (2000), (1 + r²/2)/(N − 3) on Fisher's scale.
    """
    spread, error = forecast.spread_var.flatten(), (forecast.targets - forecast.mean).abs().flatten()
    if len(spread) < 4 or spread.min() == spread.max() or error.min() == error.max():
        return Score(math.nan)
    r = float(scipy.stats.spearmanr(spread.numpy(), error.numpy()).statistic)
    half = 1.96 * math.sqrt((1 + r**2 / 2) / (len(spread) - 3))
    centre = math.atanh(min(max(r, -0.999999), 0.999999))
    return Score(r, Interval(math.tanh(centre - half), math.tanh(centre + half)))


def _findings(forecast: Forecast, pit: Tensor) -> list[Finding]:
    """Ranges of predicted standard deviation and of prediction in which intervals contain too few or too many."""
    is_inside = ((pit >= (1 - LEVEL) / 2) & (pit <= (1 + LEVEL) / 2)).numpy()
    findings = []
    for name, values in (
        ("predicted sd", forecast.spread_var.flatten().sqrt()),
        ("prediction", forecast.mean.flatten()),
    ):
        edges = np.unique(np.quantile(values.numpy(), np.linspace(0, 1, NUM_BINS + 1)))
        if len(edges) < 3:
            continue
        places = np.clip(np.searchsorted(edges, values.numpy(), side="right") - 1, 0, len(edges) - 2)
        counts = np.bincount(places, minlength=len(edges) - 1)
        hits = np.bincount(places, is_inside, minlength=len(edges) - 1)
        rejected = is_beyond_chance(two_sided(hits, counts, np.full(len(counts), LEVEL)))
        for sign, own in neighbours(np.sign(hits - LEVEL * counts) * rejected):
            low, high = (minus(f"{edges[end]:.3g}") for end in (own[0], own[-1] + 1))
            findings.append(
                Finding(
                    f"{'Too wide' if sign > 0 else 'Too narrow'} where the {name} is {low} to {high}",
                    f"{percent(hits[own].sum() / counts[own].sum())} of {counts[own].sum():,} targets lie in their "
                    f"{100 * LEVEL:.0f} % interval",
                )
            )
    return findings


def _advice(forecast: Forecast, pit: Tensor, cards: Sequence[Card], calls: Calls) -> list[Advice]:
    """Wider or narrower intervals by a factor that each half of the targets chooses for the other one."""
    if cards[0].answer != "no" or forecast.num_targets < 20 or bool((forecast.spread_var <= 0).any()):
        return []
    ratio = ((forecast.targets - forecast.mean).abs() / forecast.spread_var.sqrt()).flatten()
    order = torch.randperm(len(ratio), generator=torch.Generator().manual_seed(0))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    inside, factors = torch.zeros(len(ratio), dtype=torch.bool), []
    normal = float(scipy.stats.norm.ppf((1 + LEVEL) / 2))
    for fitted, other in (halves, halves[::-1]):
        factors.append(float(ratio[fitted].quantile(LEVEL)) / normal)
        inside[other] = ratio[other] <= factors[-1] * normal
    now = ((pit >= (1 - LEVEL) / 2) & (pit <= (1 + LEVEL) / 2)).double().mean().item()
    after = inside.double().mean().item()
    if abs(after - LEVEL) >= abs(now - LEVEL):
        return [
            Advice(
                "A factor on the intervals does not mend them",
                "the forecasts are wrong in their place or shape; see the PIT histogram",
            )
        ]
    factor = sum(factors) / 2
    return [
        Advice(
            f"Make the intervals {factor:.2f} times as wide, by calibration on held-out examples",
            f"fitted on each half of these targets and tested on the other, the {100 * LEVEL:.0f} % intervals contain "
            f"{percent(after)} instead of {percent(now)}",
            calls.intervals,
        )
    ]
