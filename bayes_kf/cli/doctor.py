"""``bayes-kf doctor``: what is installed here, and whether it works, tried on the bundled model."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bayes_kf._version import __version__
from bayes_kf.data import uci_digits_split
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.fit import fit
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.zoo import lora_digits_vit

REQUIRED = ("torch", "torchvision", "pyro-ppl", "peft", "transformers", "accelerate", "safetensors", "scipy", "arviz")
OPTIONAL = ("tensorboard", "posteriors", "laplace-torch", "bitsandbytes", "torchao")
NEEDED_BYTES = 100 * 2**20  # of free space, for a posterior and its report


def run_doctor(args: argparse.Namespace) -> None:
    """``bayes-kf doctor``.

    Raises:
        ValueError: when something that is needed does not work, after all lines are printed.
    """
    print(f"bayes_kf {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    print("required: " + ", ".join(f"{name} {_version(name)}" for name in REQUIRED))
    print("optional: " + ", ".join(f"{name} {_version(name)}" for name in OPTIONAL))
    devices = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    devices += ["mps"] * torch.backends.mps.is_available()
    print("accelerators: " + (", ".join(devices) or "none; everything runs on the CPU"))
    failed = [name for name, check in CHECKS.items() if not _passes(name, check)]
    if failed:
        raise ValueError(f"`doctor` found that this does not work here: {'; '.join(failed)}.")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _passes(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"ok      {name}: {check()}")
    except Exception as error:  # whatever is wrong here is what was asked for
        print(f"failed  {name}: {type(error).__name__}: {' '.join(str(error).split())}")
        return False
    return True


def _packages() -> str:
    missing = [name for name in REQUIRED if _version(name) == "not installed"]
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}")
    return "all there"


def _learning() -> str:
    """A posterior on some digits, on every device, saved and loaded."""
    found = []
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        images, labels = (part[:24] for part in uci_digits_split(1197)[0])
        model = lora_digits_vit(rank=2).to(device)
        posterior = fit(model, [(images, labels)], KalmanConfig(), progress=False)
        loss = posterior.history["log_loss"].mean().item()
        if not loss < 10:
            raise RuntimeError(f"log loss {loss} on {device}")
        with tempfile.TemporaryDirectory() as folder:
            posterior.save_pretrained(Path(folder) / "posterior")
            again = Posterior.from_pretrained(Path(folder) / "posterior", lora_digits_vit(rank=2).to(device))
        if not torch.equal(again.mean_vector, posterior.mean_vector):
            raise RuntimeError(f"a posterior on {device} is another one after it was saved and loaded")
        found.append(f"{device} {1e3 * posterior.history['seconds'].sum().item():.0f} ms for 24 digits")
    return ", ".join(found)


def _space() -> str:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < NEEDED_BYTES:
        raise RuntimeError(f"{free / 2**20:.0f} MiB free for temporary files")
    return f"{free / 2**30:.0f} GiB free for temporary files"


CHECKS: dict[str, Callable[[], str]] = {"packages": _packages, "disk": _space, "learn, save, load": _learning}
