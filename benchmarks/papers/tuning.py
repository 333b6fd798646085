"""Whether evidence from a stream chooses as well as a held-out set does: ``KalmanConfig(tune=...)`` against its grid.

Three problems of ``posterior_quality.py``, one pass each, four examples at a time. Every cell of a grid (scale of the
prior, forgetting) learns the stream and predicts the held-out part, which picks the best cell by its log loss, after
the fact. ``tune`` sees no held-out data: its candidates learn the first examples side by side, and the one whose
predictions of the later half of those, or of all, had the least log loss goes on. Data and weights are read as
``posterior_quality.py`` reads them.

    python benchmarks/tuning.py            # everything; a stopped run goes on
    python benchmarks/tuning.py --table    # print what is there
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

import bayes_kf as bkf
from bayes_kf.evaluation import accuracy, expected_calibration_error, negative_log_likelihood
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.quality.problems import PROBLEMS

DATA = ("usps", "kmnist", "notmnist")
GRID: dict[str, tuple[float, ...]] = {"initial_logit_sd": (0.3, 1.0, 3.0, 10.0), "forgetting": (1.0, 0.999)}
CELLS = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
TUNED: dict[str, dict[str, Any]] = {  # by what a stream chooses: the examples whose log loss counts
    "later half of 500": {"tune": GRID},
    "500": {"tune": GRID, "tune_burn_in": 0.0},
}
BATCH, AHEAD = 4, 64
POINTS, SHARE = 0.005, 0.02  # of accuracy, and of the log loss, that the choice may lose


def measure(data: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A pass and what it predicts."""
    setting = PROBLEMS[data]
    given = setting.load(seed)
    begun = time.process_time()
    with warnings.catch_warnings(action="ignore"):
        config = bkf.KalmanConfig(seed=seed, **options)
        posterior = bkf.fit(setting.model(seed, 0.0), given.stream.batches(BATCH), config, progress=False)
    seconds = time.process_time() - begun
    found = posterior.predict_loader(given.heldout.batches(AHEAD))
    probs, labels = found.probs, given.heldout.labels
    assert probs is not None  # a classifier
    return {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "chosen": {name: getattr(posterior.config, name) for name in GRID},
        "seconds": seconds,
    }


def settings() -> dict[str, dict[str, Any]]:
    """All that learn, and what the file calls them."""
    return {_words(cell): cell for cell in CELLS} | {f"tune {name}": options for name, options in TUNED.items()}


def render(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Body of the Markdown file."""
    lines = [
        "Held-out accuracy and log loss. Best: the cell of the grid with the least held-out log loss, found after the "
        f"fact. Within: no more than {100 * POINTS:g} points of accuracy and {100 * SHARE:g} % of log loss behind it.",
    ]
    header = ["data", "seed", "best cell", "accuracy", "NLL", "chosen by", "chosen", "accuracy", "NLL", "within"]
    rows, within = [], []
    for data, seed in itertools.product(DATA, range(3)):
        grid = [cells.get(f"{data}/{_words(cell)}/{seed}") for cell in CELLS]
        if not all(grid):
            continue
        best = min((cell for cell in grid if cell), key=lambda cell: cell["nll"])
        for name in TUNED:
            found = cells.get(f"{data}/tune {name}/{seed}")
            if found is None:
                continue
            near = found["accuracy"] >= best["accuracy"] - POINTS and found["nll"] <= best["nll"] * (1 + SHARE)
            within.append((name, near))
            shown = [_words(best["chosen"]), f"{best['accuracy']:.3f}", f"{best['nll']:.3f}", name]
            shown += [
                _words(found["chosen"]),
                f"{found['accuracy']:.3f}",
                f"{found['nll']:.3f}",
                "yes" if near else "no",
            ]
            rows.append([data, str(seed), *shown])
    lines += ["", *markdown_table(header, rows), ""]
    for name in TUNED:
        seen = [near for other, near in within if other == name]
        lines.append(f"- {name}: within in {sum(seen)} of {len(seen)}.")
    return lines


def _words(options: Mapping[str, Any]) -> str:
    return f"sd {options['initial_logit_sd']:g}, forgetting {options['forgetting']:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--redo", action="store_true", help="measure again what is already there")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = ResultFile("tuning")
    if not args.table:
        file.begin()
        places = list(itertools.product(args.seeds, args.data, settings().items()))
        for seed, data, (name, options) in tqdm(places, unit="pass", disable=not sys.stderr.isatty()):
            key = f"{data}/{name}/{seed}"
            if args.redo or key not in file.cells:
                file.put(key, measure(data, options, seed))
                cell = file.cells[key]
                tqdm.write(f"{key}: {cell['accuracy']:.3f} {cell['nll']:.3f} {cell['chosen']}", file=sys.stderr)
    print(file.write_markdown("Choosing by evidence, and by held-out data", render(file.cells)))


if __name__ == "__main__":
    main()
