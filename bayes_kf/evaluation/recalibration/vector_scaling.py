"""Vector scaling: a scale and a bias for each class."""

from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.recalibration.log_probs import (
    check_num_classes,
    describe_fit,
    log_probs,
    log_probs_and_labels,
    mean_cross_entropy,
)

BLOCK = 2**22  # probabilities per block of examples: bounds memory


@dataclass(frozen=True, eq=False)
class VectorScaling:
    """Softmax of w_c log p_c + b_c: a scale and a bias for each class. Create it with `fit`.

    Attributes:
        scale: w, (C,).
        bias: b, (C,), with mean zero.
        split: Name of the examples of the fit.
        num_examples: Their number.

    Reference: Guo et al., *On calibration of modern neural networks*, 2017.
    """

    scale: Tensor
    bias: Tensor
    split: str
    num_examples: int

    @classmethod
    def fit(cls, probs: Array, targets: Array, split: str = "calibration", penalty: float = 0.01) -> "VectorScaling":
        """The scales and biases that minimize Σ log loss + (penalty/2) Σ_c [(w_c − 1)² + b_c²], which is convex.

        The default penalty is a Gaussian prior with standard deviation 10 around the identity. A penalty of zero gives
        the maximum likelihood fit, which diverges if a class is absent or can be separated without an error.

        Args:
            probs: Class probabilities, (N, C).
            targets: Class indices, (N,).
            split: Name of these examples, for the report.
            penalty: Weight of the squared distance to the identity, not negative.

        Raises:
            ValueError: If an argument is malformed.

        Example:
            >>> probs, targets = torch.tensor([[0.5, 0.5]] * 8), torch.tensor([0, 0, 0, 1] * 2)
            >>> VectorScaling.fit(probs, targets, penalty=0.0)(probs[:1])
            tensor([[0.7500, 0.2500]], dtype=torch.float64)
        """
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"`penalty` must be finite and not negative, got {penalty!r}.")
        logs, labels = log_probs_and_labels(probs, targets)
        objective = _Objective(logs, labels, penalty)
        identity = np.repeat([1.0, 0.0], logs.shape[1])
        optimum = scipy.optimize.minimize(
            objective.value,
            identity,
            jac=objective.gradient,
            hess=objective.hessian,
            method="trust-exact",
            options={"gtol": 1e-10},
        )
        scale, bias = torch.from_numpy(optimum.x).chunk(2)
        if not mean_cross_entropy(scale * logs + bias, labels) <= mean_cross_entropy(logs, labels):  # rounding only
            scale, bias = torch.from_numpy(identity).chunk(2)
        return cls(scale.clone(), bias - bias.mean(), split, len(labels))

    def __call__(self, probs: Array) -> Tensor:
        """Recalibrated probabilities, (N, C), float64."""
        checked = check_num_classes(probs, len(self.scale))
        return (self.scale * log_probs(checked) + self.bias).softmax(dim=1)

    def describe(self) -> str:
        """One sentence for the report."""
        scale, bias = (f"{values.min():.2f} to {values.max():.2f}" for values in (self.scale, self.bias))
        where = describe_fit(self.split, self.num_examples)
        return f"Vector scaling, {where}: scales from {scale}, biases from {bias}.".replace("-", "−")


class _Objective:
    """Σ log loss + penalty at θ = (w, b), divided by N, with gradient and Hessian.

    A shift of all biases leaves the loss unchanged; the added term (Σ b)²/2 selects the biases with mean zero.
    """

    def __init__(self, logs: Tensor, labels: Tensor, penalty: float):
        rows = max(1, BLOCK // logs.shape[1])
        self.blocks = list(zip(logs.split(rows), labels.split(rows), strict=True))
        self.num_examples, self.num_classes = logs.shape
        self.identity = np.repeat([1.0, 0.0], self.num_classes)
        self.penalty = penalty

    def value(self, theta: np.ndarray) -> float:
        """The objective at θ."""
        losses = sum(len(y) * mean_cross_entropy(_logits(theta, z), y) for z, y in self.blocks)
        distance = self.penalty / 2 * np.square(theta - self.identity).sum()
        return float(losses + distance + theta[self.num_classes :].sum() ** 2 / 2) / self.num_examples

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """The gradient of the objective, (2C,)."""
        total = self.penalty * (theta - self.identity)
        total[self.num_classes :] += theta[self.num_classes :].sum()
        for z, y in self.blocks:
            residual = _logits(theta, z).softmax(dim=1)
            residual[torch.arange(len(y)), y] -= 1
            total += torch.cat([(residual * z).sum(dim=0), residual.sum(dim=0)]).numpy()
        return total / self.num_examples

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        """The Hessian of the objective, (2C, 2C)."""
        size = self.num_classes
        total = self.penalty * torch.eye(2 * size, dtype=torch.float64)
        total[size:, size:] += 1
        for z, _ in self.blocks:
            p = _logits(theta, z).softmax(dim=1)
            moments = torch.cat([p * z, p], dim=1)  # (n, 2C)
            total -= moments.T @ moments
            squares, mixed, plain = ((p * weight).sum(dim=0) for weight in (z * z, z, torch.ones_like(z)))
            total[:size, :size].diagonal().add_(squares)
            total[:size, size:].diagonal().add_(mixed)
            total[size:, :size].diagonal().add_(mixed)
            total[size:, size:].diagonal().add_(plain)
        return (total / self.num_examples).numpy()


def _logits(theta: np.ndarray, logs: Tensor) -> Tensor:
    """Logits w ⊙ log p + b, (N, C)."""
    scale, bias = torch.from_numpy(theta).chunk(2)
    return scale * logs + bias
