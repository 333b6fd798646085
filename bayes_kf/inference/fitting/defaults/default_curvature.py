"""The curvature of a fit without a config. Exact curvature takes a backward pass for each output."""

from __future__ import annotations

from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, check_inputs, to_device

EXACT_IN_ONE_PASS = 32  # the most outputs of a stream or of a trained adapter whose curvature is exact
EXACT_IN_MIXTURE = 3  # of a mixture, which makes more passes


def default_curvature(adapter: AdapterModel, inputs: Inputs, most_exact: int) -> str:
    """The word "sampled" for more than ``most_exact`` outputs, else "exact".

    Args:
        adapter: the model.
        inputs: a batch of them.
        most_exact: the most outputs whose curvature is exact.

    Raises:
        ValueError: if the inputs do not fit.
    """
    check_inputs(inputs)
    outputs = adapter.outputs(adapter.vector(), to_device(inputs, adapter.device))
    return "sampled" if outputs.shape[1] > most_exact else "exact"
