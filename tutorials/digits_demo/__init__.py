"""The demo: a digit transformer trained on MNIST learns the handwriting of other people from a stream.

Four ways of learning see the same stream once, one image at a time; the posterior of the package's default setting is
saved beside a report on it.
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
WRITTEN = (
    *(f"report.{suffix}" for suffix in ("html", "json", "png")),
    *("demo.md", "demo.json", "reliability.png", "online.png"),
    *(f"{name}.npz" for name in ("stream", "heldout", "corrupted")),
)
KIND = SaveKind(CHECKSUMS_FILE, re.compile("|".join(re.escape(name) for name in WRITTEN)))
OURS, ADAMW = "bayes_kf, one pass", "LoRA + AdamW"

__all__ = ["ADAMW", "FULL", "OURS", "QUICK", "RATES", "Row", "Size", "caption", "markdown_table", "run_demo"]


def run_demo(output: str | Path, size: Size = FULL, *, seed: int = 0, progress: bool | None = None) -> list[Row]:
    """The rows of the demo's table; the files are in ``output`` then.

    Written are ``report.html`` with its ``.json`` and ``.png``, ``demo.md`` and ``demo.json`` (the table),
    ``reliability.png``, ``online.png``, the saved ``posterior/``, and the arrays that ``bayes-kf fit`` and ``evaluate``
    read: ``stream.npz``, ``heldout.npz`` and ``corrupted.npz``. Those of an earlier run are replaced; ``SHA256SUMS``
    lists what was written.

    Args:
        output: folder for the files; made if missing.
        size: how many images to learn from and to hold out.
        seed: of the split, the order of the stream, and the adapter's start.
        progress: whether to show bars; None: only where standard error is a terminal, or in a notebook.

    Raises:
        ValueError: where files of these names are there that no earlier run wrote, or that were changed since.
    """
    folder = Path(output)
    recover(folder)
    check_target(folder, WRITTEN, KIND)
    check_folder(folder / "posterior", of_peft=True)
    data, shown = demo_data(size, seed), shows_progress(progress)
    with one_thread():
        frozen = frozen_row("frozen model", data, shown)
        adamw = best_adamw_row(ADAMW, data, RANK, seed, shown)
        loko, _ = kalman_row("LoRA + LoKO", KalmanConfig.loko(seed=seed), data, RANK, shown)
        ours, posterior = kalman_row(OURS, KalmanConfig(seed=seed), data, RANK, shown)
    rows = [frozen, adamw, loko, ours]
    _save(folder, rows, posterior, data, seed)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: in models as small as this, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(folder: Path, rows: list[Row], posterior: Posterior, data: DemoData, seed: int) -> None:
    """Writes the files of the demo."""
    named = {row.name: row for row in rows}

    def write(target: Path) -> None:
        save_arrays(data, target)
        save_table(rows, data.size, RANK, seed, target)
        save_reliability([named[OURS], named[ADAMW]], target / "reliability.png")
        save_online_curves(rows, target / "online.png")
        named[OURS].report.save(target / "report.html")
        write_checksums(target)

    posterior.save_pretrained(folder / "posterior")
    write_files(folder, write, KIND)
