"""Tokens of texts with their log probability and entropy, and scores of them; tokens of one text are dependent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.score_summary import LEVEL
from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.resampling.sample_design import MIN_CLUSTERS, SampleDesign
from bayes_kf.evaluation.score import Interval, Score

NUM_BINS = 10
MIN_TEXTS = MIN_CLUSTERS  # of a test
ROUNDING = 1e-6  # by which a rounded entropy may be negative, relative to the largest


@dataclass(frozen=True)
class TokenScores:
    """N tokens of B texts; all tensors are (N,), in the order of the texts.

    Attributes:
        loss: −log p of the token that stands there, nats.
        entropy: Of the predicted distribution, nats: the loss to be expected if it is right.
        epistemic: The part that is disagreement, or None.
        places: The number of each token's text and its place in it, (N, 2).
        design: The clusters, one for each text.
        words: The tokens of each text as strings, or None.
    """

    loss: Tensor
    entropy: Tensor
    epistemic: Tensor | None
    places: Tensor
    design: SampleDesign | None
    words: Sequence[Sequence[str]] | None

    @classmethod
    def of(
        cls,
        log_prob: Array,
        entropy: Array,
        counted: Array | None,
        epistemic: Array | None,
        words: Sequence[Sequence[str]] | None,
    ) -> TokenScores:
        """Checked tokens, of arrays (B, T).

        Raises:
            ValueError: If shapes differ, a log probability is positive, an entropy negative, or no token counts.
        """
        shape = tuple(torch.as_tensor(log_prob).shape)
        if len(shape) != 2:
            raise ValueError(f"`log_prob` must have shape (B, T), texts and tokens, got {shape}.")
        chosen = torch.ones(shape, dtype=torch.float64) if counted is None else as_float(counted, "counted")
        logs = as_float(_where(chosen, log_prob), "log_prob", allow_infinite=True)
        columns = {"entropy": as_float(_where(chosen, entropy), "entropy")}
        if epistemic is not None:
            columns["epistemic"] = as_float(_where(chosen, epistemic), "epistemic")
        for name, values in {**columns, "counted": chosen}.items():
            if values.shape != logs.shape:
                raise ValueError(f"`{name}` must have shape {tuple(logs.shape)}, got {tuple(values.shape)}.")
        if words is not None and (len(words) != len(logs) or any(len(row) != logs.shape[1] for row in words)):
            raise ValueError(f"`words` must hold {logs.shape[1]} tokens for each of {len(logs)} texts, got others.")
        is_counted = chosen != 0
        if not bool(is_counted.any()):
            raise ValueError("`counted` must hold a token that counts, got none.")
        loss = -logs[is_counted]
        if not bool(loss.isfinite().all()) or loss.min() < -ROUNDING:
            raise ValueError(
                f"`log_prob` must be finite and at most 0, got values in {-loss.max():.3g}..{-loss.min():.3g}."
            )
        for name, values in columns.items():
            least = values[is_counted].min()
            if least < -ROUNDING * max(1.0, float(values.max())):
                raise ValueError(f"`{name}` must not be negative, got {least:.3g}.")
        places = is_counted.nonzero()
        texts = places[:, 0].unique()
        design = SampleDesign.of(None, places[:, 0], len(places)) if len(texts) > 1 else None
        own = {name: values[is_counted].clamp(min=0) for name, values in columns.items()}
        return cls(loss.clamp(min=0), own["entropy"], own.get("epistemic"), places, design, words)

    @property
    def num_texts(self) -> int:
        """Number of texts with a token that counts."""
        return len(self.places[:, 0].unique())

    def text_means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the texts, and the mean of values (N,) over the tokens of each."""
        texts, inverse = self.places[:, 0].unique(return_inverse=True)
        return texts, torch.bincount(inverse, values) / torch.bincount(inverse)


def _where(counted: Tensor, values: Array) -> Tensor:
    """The values (B, T), zero where a token does not count."""
    given = torch.as_tensor(values)
    return torch.where(counted != 0, given, torch.zeros_like(given)) if given.shape == counted.shape else given


def mean_with_interval(values: Tensor, design: SampleDesign | None) -> Score:
    """Mean of token values (N,) with Student's interval over the texts; none for fewer than `MIN_TEXTS` texts."""
    if design is None or design.num_clusters < MIN_TEXTS:
        return Score(values.mean().item())
    mean, half = values.mean().item(), interval_half(values, design)
    return Score(mean, Interval(mean - half, mean + half))


def interval_half(values: Tensor, design: SampleDesign) -> float:
    """Half of the width of Student's interval of a mean over clusters."""
    return float(scipy.stats.t.ppf((1 + LEVEL) / 2, design.num_clusters - 1)) * design.equivalent(values).error


def surprise_gap(tokens: TokenScores) -> Score:
    """Mean loss minus mean entropy: zero for right probabilities, positive if the model is too sure.

    The null band is that of right probabilities with as many texts, by the variance between them.
    """
    gap = tokens.loss - tokens.entropy
    score = mean_with_interval(gap, tokens.design)
    if score.interval is None or tokens.design is None:
        return score
    sums = tokens.design.cluster_sums(gap)
    error = float(sums.square().sum().sqrt()) / len(gap)
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, tokens.design.num_clusters - 1)) * error
    p_value = float(tokens.design.two_sided(gap[:, None])[0])
    return Score(score.value, score.interval, Interval(-half, half), 0.0, p_value)


def surprise_correlation(tokens: TokenScores) -> Score:
    """Rank correlation of entropy and loss over the tokens, with an interval by the influence of each text."""
    columns = (tokens.entropy, tokens.loss)
    if any(column.min() == column.max() for column in columns):
        return Score(math.nan)
    first, second = (torch.from_numpy(scipy.stats.rankdata(column.numpy())) / len(column) for column in columns)
    value = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    if tokens.design is None or tokens.design.num_clusters < MIN_TEXTS:
        return Score(value)
    influence = 12 * (first * second + _mean_from(second, first) + _mean_from(first, second))  # ranks are estimates too
    half = interval_half(influence, tokens.design)
    return Score(value, Interval(max(value - half, -1.0), min(value + half, 1.0)))


def _mean_from(values: Tensor, by: Tensor) -> Tensor:
    """Of each token, the mean over all N of the values where `by` is at least its own, and zero elsewhere, (N,)."""
    order = by.argsort()
    sums = values[order].flip(0).cumsum(0).flip(0) / len(values)
    return torch.empty_like(sums).index_copy_(0, order, sums)


@dataclass(frozen=True)
class SurpriseBins:
    """Bins of the entropy with about as many tokens each: (K,) numbers, and ends of the null band of the mean loss."""

    edges: Tensor  # (K, 2)
    counts: Tensor
    entropy: Tensor
    loss: Tensor
    low: Tensor
    high: Tensor
    p_values: np.ndarray


def surprise_bins(tokens: TokenScores) -> SurpriseBins:
    """Mean loss against mean entropy."""
    levels = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
    ordered = tokens.entropy.sort().values
    edges = ordered[(levels * (len(ordered) - 1)).round().long()].unique()
    if len(edges) < 2:
        edges = torch.stack([edges[0], edges[0] + 1])
    place = (torch.searchsorted(edges, tokens.entropy, right=True) - 1).clamp(0, len(edges) - 2)
    number = len(edges) - 1
    counts = torch.bincount(place, minlength=number)
    inside = torch.nn.functional.one_hot(place, number).double()
    gap = inside * (tokens.loss - tokens.entropy)[:, None]
    means = [torch.bincount(place, column, minlength=number) / counts for column in (tokens.entropy, tokens.loss)]
    design = tokens.design  # None for a single text, whose tokens count as independent
    sums = gap if design is None else design.cluster_sums(gap)
    error = sums.square().sum(dim=0).sqrt() / counts
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, max(len(sums) - 1, 1))) * error
    low = (means[0] - half).clamp(min=0)
    ends = torch.stack([edges[:-1], edges[1:]], dim=1)
    p_values = np.full(number, np.nan) if design is None else design.two_sided(gap)
    return SurpriseBins(ends, counts, means[0], means[1], low, means[0] + half, p_values)
