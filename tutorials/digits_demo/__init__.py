"""The demo: a digit transformer trained on MNIST learns the handwriting of other people from a stream.

Four methods learn the same stream once, one image at a time. The demo saves the posterior of the default settings and a
report on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bayes_kf.files.atomic_folder import check_target, recover, write_files
from bayes_kf.files.checksums import CHECKSUMS_FILE, write_checksums
from bayes_kf.files.ownership import SaveKind
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.progress import shows_progress
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.saving.pretrained import check_folder
from tutorials.digits_demo.data import FULL, QUICK, DemoData, Size, demo_data, save_arrays
from tutorials.digits_demo.figures import save_online_curves, save_reliability
from tutorials.digits_demo.methods import RATES, Row, best_adamw_row, frozen_row, kalman_row
from tutorials.digits_demo.table import caption, markdown_table, save_table

RANK = 4
FILES = (
    *(f"report.{suffix}" for suffix in ("html", "json", "png")),
    *("demo.md", "demo.json", "reliability.png", "online.png"),
    *(f"{name}.npz" for name in ("stream", "heldout", "corrupted")),
)
KIND = SaveKind(CHECKSUMS_FILE, re.compile("|".join(re.escape(name) for name in FILES)))
OURS, ADAMW = "bayes_kf, one pass", "LoRA + AdamW"

__all__ = ["ADAMW", "FULL", "OURS", "QUICK", "RATES", "Row", "Size", "caption", "markdown_table", "run_demo"]


def run_demo(output: str | Path, size: Size = FULL, *, seed: int = 0, progress: bool | None = None) -> list[Row]:
    """The rows of the table. The files of the demo are written to ``output``.

    The files are ``report.html`` with its ``.json`` and ``.png``, ``demo.md`` and ``demo.json`` (the table),
    ``reliability.png``, ``online.png``, the saved ``posterior/``, and the arrays for ``bayes-kf fit`` and ``evaluate``:
    ``stream.npz``, ``heldout.npz`` and ``corrupted.npz``. They replace those of an earlier run. ``SHA256SUMS`` lists
    them.

    Args:
        output: folder for the files; created if missing.
        size: numbers of images in the stream and held out.
        seed: seed of the split, the order of the stream, and the initial adapter.
        progress: whether to show progress bars; None: only in a terminal or a notebook.

    Raises:
        ValueError: if ``output`` holds files of these names that no earlier run wrote, or that changed since.
    """
    folder = Path(output)
    recover(folder)
    check_target(folder, FILES, KIND)
    check_folder(folder / "posterior", of_peft=True)
    data, show_bars = demo_data(size, seed), shows_progress(progress)
    with one_thread():
        frozen = frozen_row("frozen model", data, show_bars)
        adamw = best_adamw_row(ADAMW, data, RANK, seed, show_bars)
        loko, _ = kalman_row("LoRA + LoKO", KalmanConfig.loko(seed=seed), data, RANK, show_bars)
        ours, posterior = kalman_row(OURS, KalmanConfig(seed=seed), data, RANK, show_bars)
    rows = [frozen, adamw, loko, ours]
    _save(folder, rows, posterior, data, seed)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one torch thread; a model this small is slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(folder: Path, rows: list[Row], posterior: Posterior, data: DemoData, seed: int) -> None:
    """Write the files of the demo."""
    by_name = {row.name: row for row in rows}

    def write(target: Path) -> None:
        save_arrays(data, target)
        save_table(rows, data.size, RANK, seed, target)
        save_reliability([by_name[OURS], by_name[ADAMW]], target / "reliability.png")
        save_online_curves(rows, target / "online.png")
        by_name[OURS].report.save(target / "report.html")
        write_checksums(target)

    posterior.save_pretrained(folder / "posterior")
    write_files(folder, write, KIND)
