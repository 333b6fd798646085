"""Whether rows of watched modules may have come in another order than the examples, and a check that they did not.

The plan is checked on the first batch. A model that sorts its examples (by length, say) or sends them to experts may do
so only on a later one. Such a model has an operation in its graph that can move rows: indexing, gathering, packing. The
graph is looked through for those after every forward pass, which takes no time beside it. Where there is one, one more
backward pass carries a random number for every row: its gradient is the rows of the Jacobian summed with these
numbers, and with probability one no other order of rows gives the same. Products with permutation matrices are not
recognized. Ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.linearization.rule_check import tolerance
from bayes_kf.models.adapter import AdapterModel

MOVING = ("Index", "Gather", "Scatter", "Sort", "Topk", "Take", "Masked", "Pack", "Pad", "Embedding", "CopySlices")
JOINING = ("Cat", "Stack", "Split", "Unbind")  # along the first dimension
OF_LINEAR = ("MatMul4Bit", "MatMul8bitLt")  # bitsandbytes' own functions
HARMLESS = ("MaskedFill", "ConstantPad", "ReplicationPad", "ReflectionPad", "MaskedSoftmax")


def may_move_rows(outputs: Tensor) -> bool:
    """Whether an operation behind some outputs could put rows into another order."""
    ahead, seen = [outputs.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _moves(node):
            return True
        ahead.extend(before for before, _ in node.next_functions)
    return False


def _moves(node: Any) -> bool:
    if isinstance(node, BackwardCFunction):  # somebody's own function: not known
        return not type(node).__name__.startswith(OF_LINEAR)
    kind = node.name().rpartition("::")[2]
    if kind.startswith(HARMLESS):
        return False
    if kind.startswith(JOINING):
        return getattr(node, "_saved_dim", 0) == 0
    if not kind.startswith(MOVING):
        return False
    sources = [before for before, _ in node.next_functions if before is not None]
    if kind.startswith(("Index", "Gather", "Embedding")) and len(sources) == 1:
        return sources[0].name().rpartition("::")[2] != "AccumulateGrad" and not _keeps_rows(node, kind)
    return True


def _keeps_rows(node: Any, kind: str) -> bool:
    """Whether an indexing takes something of every row, in order: ``x[arange(len(x)), places]``."""
    indices = getattr(node, "_saved_indices", ()) if kind.startswith("IndexBackward") else ()
    first, sizes = indices[0] if indices else None, getattr(node, "_saved_self_sym_sizes", ())
    if first is None or first.dtype == torch.bool or first.ndim != 1 or not sizes or len(first) != int(sizes[0]):
        return False
    return bool((first == torch.arange(len(first), device=first.device)).all())


def wrong_tensors(adapter: AdapterModel, jacobian: Jacobian, weights: Tensor, exact: dict[str, Tensor]) -> list[str]:
    """The tensors whose rows are not those of autograd.

    Args:
        adapter: the model.
        jacobian: of a batch, with c rows an example.
        weights: random numbers, (B, c).
        exact: the gradient of every checked tensor for those weights.
    """
    found, slices = jacobian.rmatvec(weights), adapter.slices()
    wrong = []
    for name, gradient in exact.items():
        own = found[slices[name]].to(gradient.dtype)
        allowed = tolerance(gradient.dtype) * torch.maximum(gradient.norm(), own.norm())
        if not bool((own - gradient.flatten()).norm() <= allowed):
            wrong.append(name)
    return wrong
