"""Cards, findings, figures and coloured examples of a report on texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayes_kf.evaluation.classification.ood_detection import detection_intervals, detection_scores, ood_scores
from bayes_kf.evaluation.classification.selective import risk_coverage
from bayes_kf.evaluation.inputs import Array, as_vector
from bayes_kf.evaluation.plots.style import BLUE, GREY, SKY, VERMILLION, add_tips
from bayes_kf.evaluation.report.contents import (
    Advice,
    Answer,
    Card,
    ColouredText,
    FigureSpec,
    Finding,
    Gallery,
    Sections,
)
from bayes_kf.evaluation.report.sortable_tables import Table, make_table, range_cell
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.distrust import is_beyond_chance, missed_inputs, neighbours
from bayes_kf.evaluation.sections.verdicts.phrases import decimal_range, minus, round_up
from bayes_kf.evaluation.sections.verdicts.selective import detection_card
from bayes_kf.evaluation.text.token_scores import (
    MIN_TEXTS,
    SurpriseBins,
    TokenScores,
    mean_with_interval,
    surprise_bins,
    surprise_correlation,
    surprise_gap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_EXPONENT = 700.0  # of a float64
DETECTABLE = 0.1  # nats a token: with texts too few to see such a gap there is no verdict
SLIGHT = 0.05  # nats a token
GOOD_CORRELATION, USELESS_CORRELATION = 0.5, 0.2
DARKEST = 5.0  # nats of entropy that have the full colour
NEARLY_ALL = 0.75  # of the ranges of entropy
SHOWN = 6  # texts of each kind
MAX_TOKENS = 160  # of a text that is shown


def text_sections(tokens: TokenScores, ood: Mapping[str, Array]) -> Sections:
    """Everything of the page; `ood` is the mean entropy a token of each text of another kind, (M,)."""
    scores = {"nll": mean_with_interval(tokens.loss, tokens.design)}
    scores["perplexity"] = Score(math.exp(min(scores["nll"].value, LARGEST_EXPONENT)))
    scores["surprise_gap"] = gap = surprise_gap(tokens)
    scores["surprise_spearman"] = correlation = surprise_correlation(tokens)
    scores["entropy"] = mean_with_interval(tokens.entropy, tokens.design)
    if tokens.epistemic is not None:
        scores["aleatoric"] = mean_with_interval(tokens.entropy - tokens.epistemic, tokens.design)
        scores["epistemic"] = mean_with_interval(tokens.epistemic, tokens.design)
    _, own = tokens.text_means(tokens.entropy)
    detected = {}
    for name, values in ood.items():
        others = as_vector(values, f"ood[{name!r}]")
        found = detection_scores(f"ood_{name}", ood_scores(own, others), detection_intervals(own, others))
        scores |= found
        detected[name] = found[f"ood_{name}_auroc"]
    bins = surprise_bins(tokens)
    cards = [_probabilities(gap, tokens), _errors(correlation), detection_card(detected)]
    lead = (
        f"{len(tokens.loss):,} tokens of {tokens.num_texts:,} texts, on average {scores['nll'].value:.3f} nats each "
        f"(perplexity {scores['perplexity'].value:.1f})."
    )
    sections = Sections(
        lead=lead,
        cards=cards,
        findings=[*_findings(bins), *missed_inputs(detected)],
        advice=_advice(tokens, cards),
        scores=scores,
        tested=["surprise_gap"],
        verdict=[_verdict(gap, tokens)],
        sizes={"texts": tokens.num_texts, "tokens": len(tokens.loss)},
        drawings={"surprise": _surprise(bins), "answered": _answered(tokens)},
        tables=[_worst(tokens)],
        galleries=_galleries(tokens),
    )
    return sections


def _probabilities(gap: Score, tokens: TokenScores) -> Card:
    """Whether the loss is what the entropy says."""
    question, value = "Are the probabilities right?", gap.value
    if gap.null_band is None:
        headline = f"{tokens.num_texts} texts are too few to tell whether its probabilities can be trusted."
        return Card("probabilities", question, "too few", f"A test needs {MIN_TEXTS} texts.", headline)
    said, lost = tokens.entropy.mean().item(), tokens.loss.mean().item()
    reason = f"It expects a loss of {said:.3f} nats a token and has {lost:.3f}"
    answer: Answer = "yes"
    if gap.null_position:
        answer, how = "no", "too high" if value > 0 else "too low"
        headline = (
            f"Do not trust its probabilities, they are {how}: a token costs {lost:.3f} nats, it expects {said:.3f}."
        )
        if abs(value) < SLIGHT:
            headline = f"Its probabilities are slightly {how}."
        reason += "."
    elif gap.null_band.high > DETECTABLE:
        answer = "too few"
        headline = f"{tokens.num_texts:,} texts are too few to tell whether its probabilities can be trusted."
        reason += f". About {_needed(gap, tokens):,} such texts would show a difference of {DETECTABLE:g}."
    else:
        headline = "Its probabilities can be trusted on texts like these."
        reason += f"; chance alone explains a difference up to {gap.null_band.high:.3f}."
    return Card("probabilities", question, answer, reason, headline)


def _needed(gap: Score, tokens: TokenScores) -> int:
    assert gap.null_band is not None
    return round_up(tokens.num_texts * (gap.null_band.high / DETECTABLE) ** 2)


def _errors(correlation: Score) -> Card:
    """Whether tokens that it is unsure of cost more."""
    question, value = "Does it know where it errs?", correlation.value
    if math.isnan(value):
        reason = "All entropies, or all losses, are equal."
        return Card("errors", question, "no", reason, "It does not know where it errs.")
    if correlation.interval is None:
        return Card("errors", question, "too few", f"A test needs {MIN_TEXTS} texts.", "")
    reason = f"Rank correlation of entropy and loss over the tokens: {value:.2f} (guessing: 0, sure: 1)."
    answer: Answer = "no"
    if correlation.interval.low > 0 and value >= USELESS_CORRELATION:
        answer = "yes" if value >= GOOD_CORRELATION else "partly"
    headline = {
        "yes": "It knows where it errs: tokens that it is unsure of cost more.",
        "partly": "It knows in part where it errs.",
        "no": "It does not know where it errs.",
    }[answer]
    return Card("errors", question, answer, reason, headline)


def _verdict(gap: Score, tokens: TokenScores) -> str:
    """The test in a sentence with its numbers."""
    size = f"the mean loss minus the mean entropy is {minus(f'{gap.value:+.3f}')} nats a token"
    if gap.null_band is None:
        return f"No test: {size}, of {tokens.num_texts} texts."
    side = {0: "inside", 1: "above", -1: "below"}[gap.null_position]
    word = {0: "No miscalibration detected", 1: "Over-confident", -1: "Under-confident"}[gap.null_position]
    return f"{word}: {size}, {side} its null band of {decimal_range(gap.null_band)} ({tokens.num_texts:,} texts)."


def _findings(bins: SurpriseBins) -> list[Finding]:
    """Ranges of entropy with another loss, beyond chance."""
    rejected = is_beyond_chance(bins.p_values)
    signs = (bins.loss > bins.high).int() - (bins.loss < bins.low).int()
    outside = abs(int(signs.sum()))
    if outside >= NEARLY_ALL * len(signs) and outside == int(signs.abs().sum()) and bool(rejected.any()):
        how = f"costs {'more' if int(signs.sum()) > 0 else 'less'} than it expects"
        return [Finding("Nearly everywhere", f"in {outside} of {len(signs)} ranges of entropy a token {how}")]
    findings = []
    for sign, own in neighbours(np.sign((bins.loss - bins.entropy).numpy()) * rejected):
        count = bins.counts[own].sum()
        said, lost = (float((bins.counts[own] * column[own]).sum() / count) for column in (bins.entropy, bins.loss))
        low, high = bins.edges[own[0], 0].item(), bins.edges[own[-1], 1].item()
        word = "Too sure" if sign > 0 else "Right more often than it says"
        findings.append(
            Finding(
                f"{word} at an entropy of {low:.2f} to {high:.2f}",
                f"{count:,} tokens cost {lost:.3f} nats each, it expects {said:.3f}",
                direction=sign,
            )
        )
    return findings


def _advice(tokens: TokenScores, cards: list[Card]) -> list[Advice]:
    """What to do."""
    if cards[0].answer == "no":
        return [
            Advice(
                "Calibrate on held-out texts",
                "size and sharpness of the posterior follow from their loss",
                "posterior = posterior.calibrate(held_out)",
            )
        ]
    if cards[0].answer == "too few":
        return [Advice("Evaluate more texts", "tokens of one text depend on each other, so texts count")]
    return []


def _surprise(bins: SurpriseBins) -> FigureSpec:
    """Mean loss against mean entropy in bins."""

    def draw(ax: Axes) -> Axes:
        end = 1.05 * float(torch.stack([bins.high.max(), bins.loss.max()]).max())
        ax.plot([0, end], [0, end], color=GREY, linestyle="--", linewidth=1, label="loss = entropy")
        ax.bar(
            bins.entropy,
            bins.high - bins.low,
            0.02 * end,
            bins.low,
            color=SKY,
            alpha=0.5,
            label="where 95 % of calibrated models fall",
        )
        is_outside = (bins.loss < bins.low) | (bins.loss > bins.high)
        for chosen, colour, marker, label in (
            (~is_outside, BLUE, "o", "loss, inside its band"),
            (is_outside, VERMILLION, "D", "loss, outside its band"),
        ):
            if not bool(chosen.any()):
                continue
            points = ax.scatter(
                bins.entropy[chosen], bins.loss[chosen], 45, color=colour, marker=marker, label=label, zorder=3,
                edgecolors="black", linewidths=0.6,
            )  # fmt: skip
            columns = (bins.entropy, bins.loss, bins.low, bins.high, bins.counts)
            add_tips(
                points,
                [
                    f"entropy {said:.3f}, loss {lost:.3f} (null band {low:.3f} to {high:.3f}), {count:,} tokens"
                    for said, lost, low, high, count in zip(*(c[chosen].tolist() for c in columns), strict=True)
                ],
            )
        corner: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 8, "color": GREY, "style": "italic"}
        ax.text(0.015, 0.98, "above the line: too sure", ha="left", va="top", **corner)
        ax.text(0.985, 0.02, "below: not sure enough", ha="right", va="bottom", **corner)
        ax.set(xlim=(0, end), ylim=(0, end), xlabel="entropy of the token (nats)", ylabel="mean loss (nats)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
        return ax

    rows = [
        (range_cell(*edges, decimals=3), int(count), said, lost, range_cell(low, high, decimals=3))
        for edges, count, said, lost, low, high in zip(
            *(c.tolist() for c in (bins.edges, bins.counts, bins.entropy, bins.loss, bins.low, bins.high)), strict=True
        )
    ]
    header = ("Entropy between", "Tokens", "Mean entropy", "Mean loss", "Null band")
    table = make_table("Loss and entropy, bin by bin", header, rows)
    alt = f"Mean loss against mean entropy of tokens in {len(rows)} bins of the entropy."
    return FigureSpec("Loss against entropy", alt, draw, 5.2, table)


def _answered(tokens: TokenScores) -> FigureSpec:
    """Mean loss of the texts that are read, if the least certain ones are left out."""
    _, entropies = tokens.text_means(tokens.entropy)
    _, losses = tokens.text_means(tokens.loss)
    curve, best = (risk_coverage(-order, loss=losses) for order in (entropies, losses))

    def draw(ax: Axes) -> Axes:
        ax.step(curve.coverage, curve.risk, where="post", color=BLUE, label="least entropy first")
        ax.step(best.coverage, best.risk, where="post", color=GREY, linestyle=":", label="best possible order")
        ax.axhline(losses.mean().item(), color=GREY, linestyle="--", linewidth=1, label="all texts")
        ax.set(xlim=(0, 1), xlabel="share of texts answered", ylabel="mean loss a token (nats)")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
        return ax

    half = curve.risk[(len(losses) - 1) // 2].item()
    alt = (
        f"The half of the texts with the least entropy has a loss of {half:.3f} nats a token, all {losses.mean():.3f}."
    )
    return FigureSpec("Loss of the texts that are answered", alt, draw)


def _worst(tokens: TokenScores) -> Table:
    """The texts with the largest loss beyond their entropy."""
    texts, losses = tokens.text_means(tokens.loss)
    _, entropies = tokens.text_means(tokens.entropy)
    counts = torch.bincount(tokens.places[:, 0])
    order = (losses - entropies).argsort(descending=True)[:10].tolist()
    rows = [
        (int(texts[k]), int(counts[texts[k]]), losses[k].item(), entropies[k].item(), (losses - entropies)[k].item())
        for k in order
    ]
    header = ("Text", "Tokens", "Loss a token", "Entropy a token", "Difference")
    return make_table(f"The {len(rows)} texts that surprised it most", header, rows, is_open=True)


def _galleries(tokens: TokenScores) -> list[Gallery]:
    """Texts with their tokens in the colour of their entropy."""
    if tokens.words is None:
        return []
    texts, losses = tokens.text_means(tokens.loss)
    _, entropies = tokens.text_means(tokens.entropy)
    surprised = texts[(losses - entropies).argsort(descending=True)[:SHOWN]].tolist()
    unsure = texts[entropies.argsort(descending=True)[:SHOWN]].tolist()
    note = (
        f"The darker a token, the higher its entropy (full colour from {DARKEST:g} nats). Underlined: a "
        "probability below one half."
    )
    return [
        Gallery("Texts that surprised it most", note, tuple(_coloured(tokens, text) for text in surprised)),
        Gallery("Texts that it is least sure of", note, tuple(_coloured(tokens, text) for text in unsure)),
    ]


def _coloured(tokens: TokenScores, text: int) -> ColouredText:
    """One text."""
    assert tokens.words is not None
    own = (tokens.places[:, 0] == text).nonzero()[:, 0].tolist()
    shown = {int(tokens.places[k, 1]): k for k in own}
    parts = []
    for place, word in enumerate(tokens.words[text][:MAX_TOKENS]):
        k = shown.get(place)
        if k is None:
            parts.append((word, 0.0, "", False))
            continue
        loss, entropy = tokens.loss[k].item(), tokens.entropy[k].item()
        more = "" if tokens.epistemic is None else f", of which epistemic {tokens.epistemic[k].item():.3f}"
        tip = f"probability {math.exp(-loss):.3f}, entropy {entropy:.2f} nats{more}"
        parts.append((word, min(entropy / DARKEST, 1.0), tip, loss > math.log(2.0)))
    if len(tokens.words[text]) > MAX_TOKENS:
        parts.append((" …", 0.0, "", False))
    loss, entropy = tokens.loss[own].mean().item(), tokens.entropy[own].mean().item()
    return ColouredText(text, tuple(parts), f"{len(own):,} tokens, loss {loss:.3f}, entropy {entropy:.3f} nats each")
