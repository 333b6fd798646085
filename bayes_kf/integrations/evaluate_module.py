"""The scores as a module of the kind that Hugging Face's ``evaluate`` loads: ``add_batch`` and ``compute``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kf.evaluation import StreamingScores
from bayes_kf.evaluation.flattened_predictions import flattened
from bayes_kf.evaluation.inputs import as_probs, as_targets


class CalibrationModule:
    """Accuracy, log loss and calibration errors with their null bands, by the calls of ``evaluate``'s metrics.

    It needs no package, and ``evaluate.combine([CalibrationModule(), ...])`` takes it. Batches are not stored.

    Args:
        scores: names of scores to return; all by default. See :class:`bayes_kf.evaluation.StreamingScores`.

    Example:
        >>> module = CalibrationModule(["accuracy", "nll"])
        >>> module.add_batch(predictions=[[0.9, 0.1], [0.4, 0.6]], references=[0, 0])
        >>> {name: round(value, 3) for name, value in module.compute().items()}
        {'accuracy': 0.5, 'nll': 0.511}
    """

    name = "bayes_kf_calibration"
    description = "Accuracy, log loss and calibration errors of class probabilities, with null bands."

    def __init__(self, scores: Sequence[str] | None = None) -> None:
        self._chosen = scores
        self._stream: StreamingScores | None = None

    def _feature_names(self) -> list[str]:
        """What a batch holds; ``evaluate.combine`` asks."""
        return ["predictions", "references"]

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Add one example: its class probabilities (C,), and its class.

        Raises:
            ValueError: if they are malformed.
        """
        self.add_batch(predictions=torch.as_tensor(prediction).unsqueeze(0), references=[int(reference)])

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add a batch, in any form that ``evaluate_predictions`` takes.

        Args:
            predictions: class probabilities, (N, C) or of tokens (B, T, C).
            references: class indices, (N,) or (B, T) with −100 for what does not count.

        Raises:
            ValueError: if they are malformed, or have another number of classes than before.
        """
        flat = flattened(predictions, references)
        probs = as_probs(flat.probs)
        labels: Tensor = as_targets(flat.targets, probs)
        stream = self._stream or StreamingScores(probs.shape[1])
        stream.update(probs, labels)
        self._stream = stream

    def compute(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> dict[str, float]:
        """The scores of everything added, and of these examples; then nothing is left.

        Args:
            predictions: as in ``add_batch``, or None.
            references: as in ``add_batch``, or None.
            settings: of ``StreamingScores.scores``: ``num_simulations``.

        Raises:
            ValueError: if there is no example, or a score is unknown.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if self._stream is None:
            raise ValueError("`compute` needs at least one example, got none.")
        found = self._stream.scores(**settings)
        unknown = [name for name in self._chosen or () if name not in found]
        if unknown:
            raise ValueError(f"`scores` must be names of scores, got {unknown[0]!r}; there are {', '.join(found)}.")
        self._stream = None
        return found if self._chosen is None else {name: found[name] for name in self._chosen}
