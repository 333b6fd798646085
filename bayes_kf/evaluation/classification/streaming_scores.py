"""Scores of any number of predictions in bounded memory, from sums over batches and processes."""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bayes_kf.evaluation.calibration.confidence_profile import Profile, stream_edges, top_confidence
from bayes_kf.evaluation.calibration.intervals import bounded_interval, loss_interval, runner_up_losses
from bayes_kf.evaluation.calibration.score_summary import LEVEL, calibration_scores
from bayes_kf.evaluation.calibration.spiegelhalter import spiegelhalter_from, spiegelhalter_parts
from bayes_kf.evaluation.classification.scores import (
    brier_part_scores,
    brier_parts,
    brier_scores,
    log_losses,
    ranked_probability_scores,
)
from bayes_kf.evaluation.inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.resampling.binning import bin_index, classwise_bins, observed_hits, simulate_hits
from bayes_kf.evaluation.resampling.null_test import NullSettings, check_simulation, compare_to_few
from bayes_kf.evaluation.score import Interval, Score, flatten_scores

BLOCK = 2**18  # probabilities per block of rows: bounds memory, and fits the caches of a processor
MEANS = ("accuracy", "nll", "brier", "rps", "confidence", "entropy")
SUMS = (*MEANS, "runner_up")  # the last is for the interval of the log loss


class StreamingScores:
    """All scores of class probabilities, computed without storing the predictions.

    Add batches with `update` and read `scores()` at any time. The state consists of sums, the float64 tensors of
    `state`: `merge` adds the state of another instance, and several processes add theirs with
    `torch.distributed.all_reduce` of each tensor. Scores and intervals equal those that the functions of this package
    give for all examples at once, except for four calibration errors: equal-mass, debiased, smooth and KS. These use
    about 130,000 cells of confidence, at most 1/65,536 wide and narrower near zero and one, and replace the confidences
    of a cell by their mean. This is exact if the confidences of each cell are equal. Otherwise the KS error is off by
    at most the largest share of examples in a cell, and an equal-mass ECE by at most four times the share of examples
    in the cells where bins start.

    The null band of the classwise error comes from the mean and the spread of `num_label_draws` simulated sets of
    labels. The seed of each batch is mixed from the sums of its probabilities, its labels and its position in the
    stream, so processes need different seeds only if they get the same examples.

    Args:
        num_classes: C, at least two.
        num_bins: Number of bins of all calibration errors.
        top_k: Values of k for additional errors of the k most probable classes (`ece_top5`).
        ordered: Whether the classes have an order, for the ranked probability score.
        num_label_draws: Simulated data sets for the classwise null band, at least 39; 0 leaves the classwise error out.
        seed: Seed of the simulations.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> stream = StreamingScores(num_classes=2)
        >>> for _ in range(3):
        ...     stream.update(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> stream.num_examples, stream.scores()["accuracy"], round(stream.scores()["ece"], 3)
        (6, 0.5, 0.35)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        num_bins: int = 15,
        top_k: tuple[int, ...] = (),
        ordered: bool = False,
        num_label_draws: int = 40,
        seed: int = 0,
    ):
        check_positive_int(num_bins, "num_bins")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"`num_classes` must be an integer of at least 2, got {num_classes!r}.")
        for k in top_k:
            if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= num_classes:
                raise ValueError(f"`top_k` must hold integers from 2 to the number of classes, got {k!r}.")
        if num_label_draws != 0:
            check_simulation(num_label_draws, LEVEL, "num_label_draws")
        self.num_classes, self.num_bins, self.top_k = num_classes, num_bins, tuple(top_k)
        self.ordered, self.num_label_draws, self.seed = ordered, num_label_draws, seed
        self._edges = stream_edges(num_bins)
        powers = {name: (len(SUMS),) for name in ("sums", "squares", "cubes")}
        sizes = {"examples": (), **powers, "spiegelhalter": (2,)}
        shapes: dict[str, tuple[int, ...]] = {**sizes}
        shapes |= {f"profile_{k}": (3, len(self._edges) - 1) for k in (1, *self.top_k)}
        shapes["classes"] = (5, num_classes * num_bins)
        shapes["class_draws"] = (num_label_draws, num_classes * num_bins)
        self.state: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
        }

    @property
    def num_examples(self) -> int:
        """Number of examples so far."""
        return round(self.state["examples"].item())

    def update(self, probs: Array, targets: Array) -> None:
        """Adds a batch; if a ValueError is raised, the state is unchanged.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).

        Raises:
            ValueError: If the probabilities or targets are malformed or have another number of classes.
        """
        given, labels = torch.as_tensor(probs), torch.as_tensor(targets)
        if given.ndim == 2 and given.shape[1] != self.num_classes:
            raise ValueError(f"`probs` must have {self.num_classes} classes, got {given.shape[1]}.")
        if given.ndim != 2 or len(given) == 0 or labels.shape != given.shape[:1]:
            as_targets(labels, as_probs(given))  # raises the specific error
        rows = max(1, BLOCK // self.num_classes)
        added = {name: torch.zeros_like(total) for name, total in self.state.items()}
        for block, block_labels in zip(given.split(rows), labels.split(rows), strict=True):
            checked = as_probs(block)
            self._add(added, checked, as_targets(block_labels, checked))
        for name, total in self.state.items():
            total += added[name]

    def merge(self, other: "StreamingScores") -> None:
        """Adds the examples of another instance with the same settings.

        Raises:
            ValueError: If the settings differ.
        """
        self.load_state({name: total + other.state[name] for name, total in self._compatible_state(other).items()})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the state by a saved one.

        Raises:
            ValueError: If its tensors do not have the names and shapes of these settings.
        """
        expected = {name: tuple(total.shape) for name, total in self.state.items()}
        got = {name: tuple(total.shape) for name, total in state.items()}
        if expected != got:
            raise ValueError(f"`state` must hold tensors of shapes {expected}, got {got}.")
        self.state = {name: total.detach().to("cpu", torch.float64, copy=True) for name, total in state.items()}

    def scores(self, num_simulations: int = 1000) -> dict[str, float]:
        """All scores with null bands and known intervals, under the keys of `Report.scores`.

        Args:
            num_simulations: Number of simulated data sets for each null band, at least 39.

        Raises:
            ValueError: If there is no example, or `num_simulations` is too small.
        """
        if self.num_examples == 0:
            raise ValueError("`scores` needs at least one example, got none so far.")
        check_simulation(num_simulations, LEVEL)
        scores = self._mean_scores()
        scores |= brier_part_scores(brier_parts(self.num_examples, self.num_classes, *self.state["classes"]))
        for k in (1, *self.top_k):
            scores |= self._profile_scores(k, num_simulations)
        if self.num_label_draws:
            scores["ece_classwise"] = self._classwise_score()
        test = spiegelhalter_from(*self.state["spiegelhalter"].tolist())
        scores["spiegelhalter"] = Score(test.statistic, p_value=test.p_value)
        return flatten_scores(scores)

    def _add(self, state: dict[str, Tensor], probs: Tensor, labels: Tensor) -> None:
        """Adds checked examples to the sums of `state`."""
        confidence, hit = top_confidence(probs, labels, 1)
        ranked = ranked_probability_scores(probs, labels) if self.ordered else torch.zeros_like(hit)
        entropy = torch.special.entr(probs).sum(dim=1).clamp(min=0)
        losses, brier = log_losses(probs, labels), brier_scores(probs, labels)
        values = torch.stack([hit, losses, brier, ranked, confidence, entropy, runner_up_losses(probs)])
        state["examples"] += len(labels)
        state["sums"] += values.sum(dim=1)
        state["squares"] += values.square().sum(dim=1)
        state["cubes"] += values.pow(3).sum(dim=1)
        state["spiegelhalter"] += torch.stack([part.sum() for part in spiegelhalter_parts(probs, labels)])
        self._add_profile(state["profile_1"], confidence, hit)
        for k in self.top_k:
            self._add_profile(state[f"profile_{k}"], *top_confidence(probs, labels, k))
        self._add_classes(state, probs, labels)

    def _add_profile(self, total: Tensor, confidence: Tensor, hit: Tensor) -> None:
        """Adds counts, confidence sums and hits to the cells of a profile."""
        index = bin_index(confidence, self._edges)
        for row, weights in zip(total, (None, confidence, hit), strict=True):
            row += torch.bincount(index, weights, minlength=len(row))

    def _add_classes(self, state: dict[str, Tensor], probs: Tensor, labels: Tensor) -> None:
        """Adds the sums over the classwise bins, and the hits of simulated labels."""
        bins = classwise_bins(probs, self.num_bins, "equal_width")
        label_bins = bins.index.gather(1, labels[:, None])[:, 0]
        label_probs = probs.gather(1, labels[:, None])[:, 0]
        size = bins.num_bins_total
        state["classes"] += torch.stack(
            [
                bins.counts,
                bins.confidence_sum,
                torch.bincount(bins.index.flatten(), probs.square().flatten(), minlength=size),
                observed_hits(bins, labels),
                torch.bincount(label_bins, label_probs, minlength=size),
            ]
        )
        if self.num_label_draws:
            position = self.num_examples + round(state["examples"].item())
            seed = _mixed_seed(self.seed, position, probs, labels)
            state["class_draws"] += simulate_hits(bins, probs, self.num_label_draws, seed)

    def _mean_scores(self) -> dict[str, Score]:
        """Mean scores with their intervals."""
        count = self.num_examples
        bounds = {"brier": 2.0, "rps": self.num_classes - 1.0, "entropy": math.log(self.num_classes)}
        powers = torch.stack([self.state[name] for name in ("sums", "squares", "cubes")], dim=1)
        runner_up = powers[-1, 0].item() / count
        scores: dict[str, Score] = {}
        for name, (total, squares, cubes) in zip(MEANS, powers[:-1].tolist(), strict=True):
            interval: Interval | None
            if name == "nll":
                interval = loss_interval(total, squares, cubes, count, runner_up, LEVEL)
            else:
                interval = bounded_interval(total, squares, count, 0.0, bounds.get(name, 1.0), LEVEL)
            if name != "rps" or self.ordered:
                scores[name] = Score(total / count, interval)
        return scores

    def _profile_scores(self, top_k: int, num_simulations: int) -> dict[str, Score]:
        """Calibration errors of the top labels."""
        counts, confidence_sum, hits = self.state[f"profile_{top_k}"]
        used = counts > 0
        counts, confidence_sum, hits = counts[used], confidence_sum[used], hits[used]
        low, high = self._edges[:-1][used], self._edges[1:][used]
        mean = (confidence_sum / counts).maximum(low).minimum(high.nextafter(low))  # inside its cell despite rounding
        profile = Profile(mean, counts, confidence_sum, hits)
        return calibration_scores(profile, top_k, NullSettings(self.num_bins, num_simulations, self.seed))

    def _classwise_score(self) -> Score:
        """The classwise ECE with its null band."""
        confidence_sum, hits = self.state["classes"][1], self.state["classes"][3]
        scale = self.num_examples * self.num_classes
        value = (confidence_sum - hits).abs().sum() / scale
        null = (confidence_sum - self.state["class_draws"]).abs().sum(dim=1) / scale
        return compare_to_few(value, null, LEVEL).score()

    def _compatible_state(self, other: "StreamingScores") -> dict[str, Tensor]:
        """The state; raises a ValueError unless the other instance has the same settings."""
        settings = [(s.num_classes, s.num_bins, s.top_k, s.ordered, s.num_label_draws) for s in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError(f"`other` must have the settings {settings[0]}, got {settings[1]}.")
        return self.state


def _mixed_seed(seed: int, position: int, probs: Tensor, labels: Tensor) -> int:
    """A seed that depends on the batch and its position, but not on the process."""
    digest = hashlib.sha256(probs.sum(dim=0).numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    digest.update(f"{seed} {position}".encode())
    return int.from_bytes(digest.digest()[:7], "big")
