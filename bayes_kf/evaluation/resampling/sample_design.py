"""How examples count (weights), and which of them depend on each other (clusters).

Pixels of one image and tokens of one text are not independent, and the examples of a survey do not all count alike. An
estimate is then that of an equivalent sample: as many independent values, with such a variance and skewness, that their
mean has those of the weighted mean over clusters. Under calibration the residuals confidence − hit have mean zero given
the confidence. Their null distribution comes from one random sign for all residuals of a cluster (the wild cluster
bootstrap); that of independent weighted examples from labels that are drawn anew.

References: Cameron, Gelbach, Miller, *Bootstrap-based improvements for inference with clustered errors*, 2008; Kish,
*Survey sampling*, 1965.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import as_numpy, as_weights
from bayes_kf.evaluation.resampling.null_test import NullSettings

MIN_CLUSTERS = 8  # fewer give no p-value and no null band: with G of them a random sign each has p >= 2/2**G
MAX_DRAWS = 2 * 10**8  # signs or labels times examples; it bounds the time
MIN_SIMULATIONS = 200  # simulated even where they need more than that


class EquivalentSample(NamedTuple):
    """Number (not always whole) and sums of powers of independent values whose mean is distributed as the given one."""

    number: float
    total: float
    squares: float
    cubes: float

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(max(self.squares / self.number - (self.total / self.number) ** 2, 0.0) / self.number)


@dataclass(frozen=True)
class SampleDesign:
    """Weights and clusters of N examples.

    Attributes:
        weights: (N,), float64, with mean one.
        clusters: The cluster of each example, 0..G − 1, (N,).
        is_clustered: Whether a cluster may hold several examples.
    """

    weights: Tensor
    clusters: Tensor
    is_clustered: bool

    @classmethod
    def of(cls, weights: Any, clusters: Any, count: int) -> SampleDesign | None:
        """The design of `count` examples; None if all count alike and are independent.

        Raises:
            ValueError: If an argument has another length, a weight is negative or none is positive, or there are fewer
                than two clusters.
        """
        if weights is None and clusters is None:
            return None
        numbers = torch.ones(count, dtype=torch.float64)
        if weights is not None:
            numbers = as_weights(weights, count)
        codes = torch.arange(count) if clusters is None else _codes(clusters, count)
        return cls(numbers / numbers.mean(), codes, clusters is not None)

    @property
    def num_clusters(self) -> int:
        """G."""
        return int(self.clusters.max()) + 1

    @property
    def independent(self) -> tuple[int, str]:
        """The number of what is independent, and its name."""
        return (self.num_clusters, "clusters") if self.is_clustered else (len(self.weights), "examples")

    @property
    def has_bands(self) -> bool:
        """Whether there are clusters enough for null bands."""
        return not self.is_clustered or self.num_clusters >= MIN_CLUSTERS

    def cluster_sums(self, values: Tensor) -> Tensor:
        """Sums over the examples of each cluster, (N, ...) → (G, ...)."""
        return torch.zeros(self.num_clusters, *values.shape[1:], dtype=torch.float64).index_add_(
            0, self.clusters, values.double()
        )

    def mean(self, values: Tensor) -> float:
        """Weighted mean of values (N,)."""
        return float((self.weights * values).sum() / self.weights.sum())

    def equivalent(self, values: Tensor) -> EquivalentSample:
        """The sample of independent values with the mean, and its variance and skewness, of values (N,)."""
        mean, total = self.mean(values), self.weights.sum()
        parts = self.cluster_sums(self.weights * (values - mean)) / total
        shares = self.cluster_sums(self.weights) / total
        number, count = int((shares > 0).sum()), 1.0 / float(shares.square().sum())
        variance = float(parts.square().sum()) * number / max(number - 1, 1) * count
        third = float(parts.pow(3).sum()) * count**2
        squares, cubes = variance + mean**2, third + 3 * mean * variance + mean**3
        return EquivalentSample(count, count * mean, count * squares, count * max(cubes, 0.0))

    def two_sided(self, deviations: Tensor) -> np.ndarray:
        """p-values of deviations (N, K) with mean zero under the null hypothesis, by Student's t over clusters, (K,).

        NaN where fewer than `MIN_CLUSTERS` clusters deviate.
        """
        sums = self.cluster_sums(self.weights[:, None] * deviations)
        number = (sums != 0).sum(dim=0).numpy()
        error = sums.square().sum(dim=0).sqrt().numpy()
        statistic = np.divide(np.abs(sums.sum(dim=0).numpy()), error, out=np.zeros(len(error)), where=error > 0)
        p_values = 2 * scipy.stats.t.sf(statistic, np.maximum(number - 1, 1))
        return np.where(number >= MIN_CLUSTERS, p_values, np.nan)

    def simulated(self, confidence: Tensor, hit: Tensor, cells: Tensor, settings: NullSettings) -> Tensor:
        """Sums of hits − confidence over the examples of each cell under calibration, (R, K).

        Args:
            confidence: (N,).
            hit: Zero or one, (N,).
            cells: 0..K − 1, (N,).
            settings: Number of simulated data sets, which is reduced for many examples, and the seed.
        """
        size, number = len(confidence), int(cells.max()) + 1
        draws = min(settings.num_simulations, max(MIN_SIMULATIONS, MAX_DRAWS // size))
        if self.is_clustered:
            rng = np.random.default_rng(settings.seed)
            residuals = (self.weights * (hit - confidence)).numpy()
            where = (self.clusters.numpy(), cells.numpy())
            by_cluster = scipy.sparse.csr_array((residuals, where), shape=(self.num_clusters, number))
            signs = rng.choice([-1.0, 1.0], (draws, self.num_clusters))
            return torch.from_numpy(np.ascontiguousarray((by_cluster.T @ signs.T).T))
        generator = torch.Generator().manual_seed(settings.seed)
        sums = torch.empty(draws, number, dtype=torch.float64)
        for row in sums:
            drawn = torch.rand(size, generator=generator, dtype=torch.float64) < confidence
            row[:] = torch.bincount(cells, self.weights * (drawn.double() - confidence), minlength=number)
        return sums


def _codes(clusters: Any, count: int) -> Tensor:
    """The number of each example's cluster, (N,)."""
    values = as_numpy(clusters)
    if values.shape != (count,):
        raise ValueError(f"`clusters` must have shape ({count},), an entry for each example, got {values.shape}.")
    texts = values if values.dtype.kind in "biu" else np.array([str(value) for value in values.tolist()])
    found, codes = np.unique(texts, return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"`clusters` must hold at least two clusters, got {len(found)}.")
    return torch.from_numpy(codes.astype(np.int64))
