"""Where a report comes from: fingerprints of its data and versions of its software."""

import hashlib
import platform

import numpy as np
import torch

from bayes_kf._version import __version__
from bayes_kf.evaluation.inputs import Array


def fingerprint(array: Array) -> str:
    """SHA-256 of an array: of its shape, then of its values as little-endian float64 (int64 if they are integers).

    The same numbers have the same fingerprint in torch and NumPy, and in every precision that represents them exactly.

    Args:
        array: Real numbers, of any shape.

    Raises:
        ValueError: If the numbers are complex.

    Example:
        >>> digest = fingerprint(torch.tensor([[0.5, 0.5]]))
        >>> digest[:16], digest == fingerprint(np.array([[0.5, 0.5]])), digest == fingerprint(np.array([0.5, 0.5]))
        ('9ae723c84fff86ca', True, False)
    """
    tensor = torch.as_tensor(array).detach().cpu()
    if tensor.is_complex():
        raise ValueError(f"`array` must hold real numbers, got {tensor.dtype}.")
    values = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64).contiguous().numpy()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the software that computed a report.

    Example:
        >>> list(versions())
        ['bayes_kf', 'torch', 'numpy', 'python']
    """
    packages = {"bayes_kf": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    return packages | {"python": platform.python_version()}
