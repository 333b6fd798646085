"""Whether hooked modules may have got rows in another order than the examples, and a check that they did not.

The plan is checked on the first batch. A model that sorts its examples (by length, for example) or sends them to
experts may do so only on a later batch. Then its graph has an operation that can move rows: indexing, gathering,
packing. The graph is searched for these after every forward pass, which takes little time. If there is one, one more
backward pass carries a random weight for every row. Its gradient is the weighted sum of the rows of the Jacobian, and
with probability one no other order of rows gives the same sum. Products with permutation matrices are not recognized.
This check is our own.
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
JOINING = ("Cat", "Stack", "Split", "Unbind")  # move rows only along the first dimension
KEEPING = ("MatMul4Bit", "MatMul8bitLt", "RegisterPostBackwardFunction")  # bitsandbytes' products, FSDP's identity
HARMLESS = ("MaskedFill", "ConstantPad", "ReplicationPad", "ReflectionPad", "MaskedSoftmax")

_may_move: dict[str, bool] = {}  # by the name of an operation, whether a node of it has to be looked at


def may_move_rows(outputs: Tensor) -> bool:
    """Whether an operation in the graph of some outputs could change the order of rows."""
    ahead, seen = [outputs.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        suspect = _may_move.get(name)
        if suspect is None:
            kind = name.rpartition("::")[2]
            suspect = _may_move[name] = not kind.startswith(HARMLESS) and kind.startswith(MOVING + JOINING)
        if (suspect or isinstance(node, BackwardCFunction)) and _moves(node):
            return True
        for before, _ in node.next_functions:
            ahead.append(before)
    return False


def _moves(node: Any) -> bool:
    """Whether a node of the graph could change the order of rows."""
    if isinstance(node, BackwardCFunction):  # a custom function, about which nothing is known
        own = getattr(node, "_forward_cls", None)
        return not getattr(own, "keeps_rows", False) and not type(node).__name__.startswith(KEEPING)
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
    """Whether an indexing takes something from every row, in order: ``x[:, places]``, ``x[arange(len(x)), places]``."""
    if kind.startswith("IndexSelect"):
        return bool(getattr(node, "_saved_dim", 0) != 0)
    indices = getattr(node, "_saved_indices", ()) if kind.startswith("IndexBackward") else ()
    if [index is None for index in indices] == [True, False]:
        return True
    first, sizes = indices[0] if indices else None, getattr(node, "_saved_self_sym_sizes", ())
    if first is None or first.dtype == torch.bool or first.ndim != 1 or not sizes or len(first) != int(sizes[0]):
        return False
    return bool((first == torch.arange(len(first), device=first.device)).all())


def wrong_tensors(
    adapter: AdapterModel, jacobian: Jacobian, weights: Tensor, exact: dict[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """The tensors whose rows differ from autograd's, by more than float32's rounding.

    Some models compute parts in float32 whatever their dtype (Llama its norms), and rows in another order are far off.

    Args:
        adapter: the model.
        jacobian: of a batch, with c rows an example.
        weights: random numbers, (B, c).
        exact: the gradient of every checked tensor for these weights.
        dtype: of the outputs, which may be rounder than the tensors.
    """
    sums, slices = jacobian.rmatvec(weights), adapter.slices()
    wrong = []
    for name, gradient in exact.items():
        own = sums[slices[name]].to(gradient.dtype)
        relative = max(map(tolerance, (torch.float32, gradient.dtype, dtype)))
        allowed = relative * torch.maximum(gradient.norm(), own.norm())
        if not bool((own - gradient.flatten()).norm() <= allowed):
            wrong.append(name)
    return wrong
