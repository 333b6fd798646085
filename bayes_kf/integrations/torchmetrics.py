"""Scores of class probabilities as a metric of torchmetrics, for Lightning and other training loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bayes_kf.evaluation.classification.streaming_scores import StreamingScores
from bayes_kf.validation import check_one_of

SCORES = ("accuracy", "nll", "brier", "ece", "ece_null_low", "ece_null_high", "ece_smooth")
STATE = "sum_"  # begins the names of the states; "state" alone would hide methods of Metric


class CalibrationMetrics(Metric):
    """Accuracy, log loss and calibration errors with their null bands, from sums over batches and processes.

    ``compute`` returns a dictionary, which ``MetricCollection`` and ``log_dict`` take. Sums are in float64 on the CPU
    or a GPU.

    Args:
        num_classes: C, at least two.
        scores: names of scores of :class:`bayes_kf.evaluation.StreamingScores`.
        num_bins: of the calibration errors.
        num_simulations: simulated data sets for each null band.
        ignore_index: a target that does not count.
        settings: further arguments of ``torchmetrics.Metric``, such as ``dist_sync_on_step``.

    Raises:
        ValueError: if an argument is malformed, or a score unknown.

    Example:
        >>> metric = CalibrationMetrics(num_classes=2, scores=["accuracy", "nll"])
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'accuracy': 0.5, 'nll': 0.511}
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        num_classes: int,
        *,
        scores: Sequence[str] = SCORES,
        num_bins: int = 15,
        num_simulations: int = 200,
        ignore_index: int = -100,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._stream = StreamingScores(num_classes, num_bins=num_bins, num_label_draws=0)
        known = [*_names(self._stream), "ece_null_mean"]
        for name in scores:
            check_one_of("scores", name, known)
        self.scores, self.num_simulations, self.ignore_index = tuple(scores), num_simulations, ignore_index
        for name, total in self._stream.state.items():
            self.add_state(STATE + name, default=total, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: probabilities or logits, (N, C) or (N, C, ...); they count as logits if one lies outside 0..1.
            target: class indices, (N,) or (N, ...).

        Raises:
            ValueError: if the shapes do not fit, or a target is out of range.
        """
        if preds.ndim > 2:
            preds, target = preds.movedim(1, -1).flatten(0, -2), target.flatten()
        counted = target != self.ignore_index
        preds, target = preds.detach()[counted].double(), target[counted]
        if not len(target):
            return
        if bool(((preds < 0) | (preds > 1)).any()):
            preds = preds.softmax(dim=1)
        stream = self._filled()
        stream.update(preds.cpu(), target.cpu())
        for name, total in stream.state.items():
            own = getattr(self, STATE + name)
            setattr(self, STATE + name, total.to(own))

    def compute(self) -> dict[str, Tensor]:
        """The scores, each a scalar.

        Raises:
            ValueError: if there is no example.
        """
        found = self._filled().scores(self.num_simulations)
        return {name: torch.tensor(found[name], dtype=torch.float64) for name in self.scores}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the scores, as metrics of torchmetrics do; the figure and the axes.

        Args:
            val: what ``compute`` or ``forward`` returned, or several of these; by default the present scores.
            ax: where to draw.
        """
        return self._plot(val, ax)

    def _filled(self) -> StreamingScores:
        """The stream with the present sums."""
        self._stream.load_state({name: getattr(self, STATE + name) for name in self._stream.state})
        return self._stream


def _names(stream: StreamingScores) -> list[str]:
    """The names of all scores."""
    trial = StreamingScores(stream.num_classes, num_bins=stream.num_bins, num_label_draws=0)
    probs = torch.full((1, stream.num_classes), 1.0 / stream.num_classes)
    trial.update(probs, torch.zeros(1, dtype=torch.int64))
    return list(trial.scores(39))
