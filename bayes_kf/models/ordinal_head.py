"""A model of one score as a model of ordered classes, with cutpoints that are latent too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.models.forward import as_matrix
from bayes_kf.validation import check_whole


class OrdinalHead(nn.Module):
    """Outputs of the likelihood "ordinal" from one score s(x): (c_0 − s, log (c_1 − c_0), …), so P(y ≤ k) = σ(c_k − s).

    The larger the score, the higher the class. The cutpoints c are trainable: c_0 and the logs of the gaps are the bias
    of a Linear layer, in which outputs are linear.

    Args:
        model: returns one score an example, (B, 1), or an object that has it as ``logits``.
        num_classes: K, at least 3.
        frequencies: of the classes, K positive numbers that need not add up to 1. The cutpoints start where a score
            of 0 predicts them; None: equal ones.

    Raises:
        ValueError: for fewer than three classes, or frequencies that are not as many positive numbers.

    Example:
        >>> head = OrdinalHead(nn.Linear(2, 1), num_classes=4)
        >>> head.cutpoints()
        tensor([-1.0986,  0.0000,  1.0986])
        >>> head(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, num_classes: int, frequencies: Sequence[float] | None = None) -> None:
        check_whole("num_classes", num_classes, 3)
        given = [1.0] * num_classes if frequencies is None else [float(one) for one in frequencies]
        if len(given) != num_classes or not all(0.0 < one < float("inf") for one in given):
            raise ValueError(f"`frequencies` must be {num_classes} positive numbers, got {frequencies!r}.")
        super().__init__()
        self.model = model
        shares = torch.tensor(given, dtype=torch.float64).cumsum(0)
        cutpoints = (shares[:-1] / shares[-1]).logit()
        tensors = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        self.ordered = nn.Linear(1, num_classes - 1, dtype=dtype, device=tensors[0].device if tensors else None)
        with torch.no_grad():
            self.ordered.weight.zero_()[0] = -1.0
            self.ordered.bias.copy_(torch.cat([cutpoints[:1], cutpoints.diff().log()]))
        self.ordered.weight.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The outputs, (B, K − 1).

        Raises:
            ValueError: if the model does not return one score an example.
        """
        scores = as_matrix(self.model(*args, **kwargs))
        if scores.shape[1] != 1:
            raise ValueError(f"`model` must return one score an example, got {scores.shape[1]}.")
        outputs: Tensor = self.ordered(scores.to(self.ordered.weight.dtype))
        return outputs

    def cutpoints(self, bias: Tensor | None = None) -> Tensor:
        """c, ascending, (..., K − 1).

        Args:
            bias: of ``ordered``, as a posterior has it in ``mean["ordered.bias"]``, (..., K − 1); None: its own.
        """
        bias = self.ordered.bias.detach() if bias is None else bias
        return torch.cat([bias[..., :1], bias[..., 1:].exp()], -1).cumsum(-1)
