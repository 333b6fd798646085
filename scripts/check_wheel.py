"""Uses an installed wheel: `python check_wheel.py FOLDER`, with the package imported from below that folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import bayes_kf as bkf
from bayes_kf.evaluation import evaluate_predictions
from bayes_kf.models.zoo import digits_vit


def main(site: Path) -> None:
    """Weights, templates, type marker and command line are there and work."""
    package = Path(bkf.__file__).resolve().parent
    if package.parent != site.resolve():
        raise SystemExit(f"bayes_kf must come from {site}, got {package}.")
    if not (package / "py.typed").is_file():
        raise SystemExit("The wheel must hold py.typed, got none.")
    probs = digits_vit()(torch.zeros(4, 1, 28, 28)).logits.softmax(-1).detach()
    with tempfile.TemporaryDirectory() as scratch:
        page = evaluate_predictions(probs, torch.arange(4)).save(Path(scratch) / "report.html")
        print(f"report: {page.stat().st_size:,} bytes")
    subprocess.run([sys.executable, "-m", "bayes_kf", "--version"], check=True)
    print(f"bayes_kf {bkf.__version__} from the wheel works")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
