"""Scores of any number of predictions in bounded memory: sums that add up over batches and over processes."""

import hashlib
import math
from collections.abc import Mapping

import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.binning import class_cells, observed_hits, place, simulated_hits
from bayes_kf.evaluation.calibration_scores import (
    LEVEL,
    brier_part_scores,
    calibration_scores,
    tested,
    with_chance,
)
from bayes_kf.evaluation.null import check_simulation, compare, spiegelhalter_from, spiegelhalter_parts
from bayes_kf.evaluation.profile import Profile, narrow_edges, top_confidence
from bayes_kf.evaluation.scores import brier_parts, brier_scores, log_losses, ranked_probability_scores

ROWS = 2**20  # probabilities looked at together
MEANS = ("accuracy", "nll", "brier", "rps", "confidence", "entropy")


class StreamingScores:
    """Every score of class probabilities without holding them.

    Give it batches with `update`, read `scores()` whenever you like. All that it remembers are the float64 tensors of
    `state`, which are sums: two of them that saw different examples are put together by `merge`, and in several
    processes by `torch.distributed.all_reduce` of each tensor. What comes out is what the functions of this package
    give for all examples at once, but for this: bins of equal mass, the smooth and the KS error see confidences in
    about 4,000 narrow cells. The classwise band comes from `num_label_draws` simulated sets of labels, drawn from a
    seed that each batch's own numbers, labels and place in the stream are mixed into (so that processes need no seeds
    of their own unless they see the very same examples). Intervals of means are normal ones, that of the accuracy
    Wilson's, not the bootstrap's, and the classwise error has none.

    Args:
        num_classes: C, at least two.
        num_bins: Number of bins of all calibration errors.
        top_k: How many of the most probable classes count together, each an error of its own (`ece_top5`).
        ordered: Whether the classes have an order, for the ranked probability score.
        num_label_draws: Data sets simulated behind the classwise band, at least 39; 0 leaves the classwise error out.
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
        num_label_draws: int = 200,
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
        self._edges = narrow_edges(num_bins)
        sizes = {"examples": (), "sums": (len(MEANS),), "squares": (len(MEANS),), "spiegelhalter": (2,)}
        shapes: dict[str, tuple[int, ...]] = {**sizes}
        shapes |= {f"profile_{k}": (3, len(self._edges) - 1) for k in (1, *self.top_k)}
        shapes["classes"] = (5, num_classes * num_bins)
        shapes["class_draws"] = (num_label_draws, num_classes * num_bins)
        self.state: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
        }

    @property
    def num_examples(self) -> int:
        """Number of examples seen."""
        return round(self.state["examples"].item())

    def update(self, probs: Array, targets: Array) -> None:
        """Adds a batch; a batch that is refused leaves everything as it was.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).

        Raises:
            ValueError: If the probabilities or targets are malformed or of another number of classes.
        """
        given, labels = torch.as_tensor(probs), torch.as_tensor(targets)
        if given.ndim == 2 and given.shape[1] != self.num_classes:
            raise ValueError(f"`probs` must have {self.num_classes} classes, got {given.shape[1]}.")
        if given.ndim != 2 or len(given) == 0 or labels.shape != given.shape[:1]:
            as_targets(labels, as_probs(given))  # says what is wrong
        rows = max(1, ROWS // self.num_classes)
        added = {name: torch.zeros_like(total) for name, total in self.state.items()}
        for block, chosen in zip(given.split(rows), labels.split(rows), strict=True):
            checked = as_probs(block)
            self._add(added, checked, as_targets(chosen, checked))
        for name, total in self.state.items():
            total += added[name]

    def merge(self, other: "StreamingScores") -> None:
        """Adds what another one saw, which must have been made with the same settings.

        Raises:
            ValueError: If it was not.
        """
        self.load_state({name: total + other.state[name] for name, total in self._fitting(other).items()})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts a saved `state` in place of the present one.

        Raises:
            ValueError: If it does not belong to these settings.
        """
        wanted = {name: tuple(total.shape) for name, total in self.state.items()}
        got = {name: tuple(total.shape) for name, total in state.items()}
        if wanted != got:
            raise ValueError(f"`state` must hold tensors of shapes {wanted}, got {got}.")
        self.state = {name: total.detach().to("cpu", torch.float64, copy=True) for name, total in state.items()}

    def scores(self, num_simulations: int = 1000) -> dict[str, float]:
        """All scores by name, named as in `Report.scores`: beside each what chance alone would show, and its interval.

        Args:
            num_simulations: Number of simulated and of resampled data sets behind bands and intervals, at least 39.

        Raises:
            ValueError: If no example has been seen, or there are too few simulations.
        """
        if self.num_examples == 0:
            raise ValueError("`scores` needs at least one example, got none so far.")
        check_simulation(num_simulations, LEVEL)
        scores = self._mean_scores()
        scores |= brier_part_scores(brier_parts(self.num_examples, self.num_classes, *self.state["classes"]))
        for k in (1, *self.top_k):
            scores |= self._profile_scores(k, num_simulations)
        if self.num_label_draws:
            scores |= self._class_scores()
        return scores | tested("spiegelhalter", spiegelhalter_from(*self.state["spiegelhalter"].tolist()))

    def _add(self, state: dict[str, Tensor], probs: Tensor, labels: Tensor) -> None:
        """Adds checked examples to sums."""
        confidence, hit = top_confidence(probs, labels, 1)
        ranked = ranked_probability_scores(probs, labels) if self.ordered else torch.zeros_like(hit)
        entropy = torch.special.entr(probs).sum(dim=1).clamp(min=0)
        columns = (hit, log_losses(probs, labels), brier_scores(probs, labels), ranked, confidence, entropy)
        values = torch.stack(columns)
        state["examples"] += len(labels)
        state["sums"] += values.sum(dim=1)
        state["squares"] += values.square().sum(dim=1)
        state["spiegelhalter"] += torch.stack([part.sum() for part in spiegelhalter_parts(probs, labels)])
        self._add_profile(state["profile_1"], confidence, hit)
        for k in self.top_k:
            self._add_profile(state[f"profile_{k}"], *top_confidence(probs, labels, k))
        self._add_classes(state, probs, labels)

    def _add_profile(self, total: Tensor, confidence: Tensor, hit: Tensor) -> None:
        """Counts, sums and hits of the narrow cells."""
        index = place(confidence, self._edges)
        for row, weights in zip(total, (None, confidence, hit), strict=True):
            row += torch.bincount(index, weights, minlength=len(row))

    def _add_classes(self, state: dict[str, Tensor], probs: Tensor, labels: Tensor) -> None:
        """Sums over the cells of every class, and hits of drawn labels."""
        cells = class_cells(probs, self.num_bins, "equal_width")
        own = cells.index.gather(1, labels[:, None])[:, 0]
        chosen = probs.gather(1, labels[:, None])[:, 0]
        size = cells.num_cells
        state["classes"] += torch.stack(
            [
                cells.counts,
                cells.confidence_sum,
                torch.bincount(cells.index.flatten(), probs.square().flatten(), minlength=size),
                observed_hits(cells, labels),
                torch.bincount(own, chosen, minlength=size),
            ]
        )
        if self.num_label_draws:
            seen = self.num_examples + round(state["examples"].item())
            seed = _mixed_seed(self.seed, seen, probs, labels)
            state["class_draws"] += simulated_hits(cells, probs, self.num_label_draws, seed)

    def _mean_scores(self) -> dict[str, float]:
        """Means with their normal intervals, inside the values that there are; of the accuracy Wilson's."""
        number = self.state["examples"]
        mean = self.state["sums"] / number
        variance = (self.state["squares"] / number - mean.square()).clamp(min=0)
        spread = scipy.stats.norm.ppf((1 + LEVEL) / 2) * (variance / number).sqrt()
        scores: dict[str, float] = {}
        for name, value, half in zip(MEANS, mean.tolist(), spread.tolist(), strict=True):
            if name != "rps" or self.ordered:
                half = half if half == half else 0.0  # an infinite loss has no variance
                most = 1.0 if name == "confidence" else math.inf
                low, high = max(value - half, 0.0), min(value + half, most)
                if name == "accuracy":
                    found = scipy.stats.binomtest(round(self.state["sums"][0].item()), self.num_examples)
                    low, high = found.proportion_ci(LEVEL, method="wilson")
                scores |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return scores

    def _profile_scores(self, top_k: int, num_simulations: int) -> dict[str, float]:
        """Calibration errors of the top labels."""
        counts, confidence_sum, hits = self.state[f"profile_{top_k}"]
        used = counts > 0
        middle = (self._edges[1:] + self._edges[:-1]) / 2
        profile = Profile(middle[used], counts[used], confidence_sum[used], hits[used])
        return calibration_scores(profile, top_k, self.num_bins, num_simulations, self.seed)

    def _class_scores(self) -> dict[str, float]:
        """The classwise error and its band."""
        confidence_sum, hits = self.state["classes"][1], self.state["classes"][3]
        scale = self.num_examples * self.num_classes
        value = (confidence_sum - hits).abs().sum() / scale
        null = (confidence_sum - self.state["class_draws"]).abs().sum(dim=1) / scale
        return with_chance("ece_classwise", compare(value, value, null, LEVEL))

    def _fitting(self, other: "StreamingScores") -> dict[str, Tensor]:
        """The present state, if the other one has the same settings."""
        settings = [(s.num_classes, s.num_bins, s.top_k, s.ordered, s.num_label_draws) for s in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError(f"`other` must have the settings {settings[0]}, got {settings[1]}.")
        return self.state


def _mixed_seed(seed: int, seen: int, probs: Tensor, labels: Tensor) -> int:
    """A seed that differs from batch to batch, also where they repeat, whatever process sees them."""
    digest = hashlib.sha256(probs.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    digest.update(f"{seed} {seen}".encode())
    return int.from_bytes(digest.digest()[:7], "big")
