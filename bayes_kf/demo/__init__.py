"""The demo: a digit transformer trained on MNIST meets other people's handwriting, and learns it online.

Four ways of learning see the same stream once, one image at a time; the posterior of the package's default setting is
saved beside a report on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bayes_kf.demo.contenders import RATES, Row, best_adamw_row, frozen_row, kalman_row
from bayes_kf.demo.data import FULL, QUICK, DemoData, Size, demo_data, save_arrays
from bayes_kf.demo.figures import save_online_curves, save_reliability
from bayes_kf.demo.table import caption, markdown_table, save_table
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.posterior import Posterior

RANK = 4
OURS, ADAMW = "bayes_kf, one pass", "LoRA + AdamW"

__all__ = ["ADAMW", "FULL", "OURS", "QUICK", "RATES", "Row", "Size", "caption", "markdown_table", "run_demo"]


def run_demo(output: str | Path, size: Size = FULL, *, seed: int = 0, progress: bool = True) -> list[Row]:
    """The rows of the demo's table; the files are in ``output`` then.

    Written are ``report.html`` with its ``.json`` and ``.png``, ``demo.md`` and ``demo.json`` (the table),
    ``reliability.png``, ``online.png``, the saved ``posterior/``, and the arrays that ``bayes-kf fit`` and ``evaluate``
    read: ``stream.npz``, ``heldout.npz`` and ``corrupted.npz``.

    Args:
        output: folder for the files; made if missing.
        size: how many images to learn from and to hold out.
        seed: of the split, the order of the stream, and the adapter's start.
        progress: whether to show bars.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    data = demo_data(size, seed)
    with one_thread():
        frozen = frozen_row("frozen model", data, progress)
        adamw = best_adamw_row(ADAMW, data, RANK, seed, progress)
        loko, _ = kalman_row("LoRA + LoKO", KalmanConfig.loko(seed=seed), data, RANK, progress)
        ours, posterior = kalman_row(OURS, KalmanConfig(seed=seed), data, RANK, progress)
    rows = [frozen, adamw, loko, ours]
    _save(folder, rows, posterior, data, seed)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: the model is so small that threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(folder: Path, rows: list[Row], posterior: Posterior, data: DemoData, seed: int) -> None:
    """Everything the demo leaves behind."""
    posterior.save_pretrained(folder / "posterior")
    save_arrays(data, folder)
    save_table(rows, data.size, RANK, seed, folder)
    named = {row.name: row for row in rows}
    save_reliability([named[OURS], named[ADAMW]], folder / "reliability.png")
    save_online_curves(rows, folder / "online.png")
    named[OURS].report.save(folder / "report.html")
