"""Coverage of a report's 95 % intervals, and rates of false verdicts, by simulation.

Labels are drawn from the softmax of Gaussian logits. The predictions are that softmax; or over- or under-confident by a
factor of 1.5; or with the odds of one class tripled; or right for all but a tenth of the labels, which are random. The
true score is that of 200,000 examples. Calibrated predictions are drawn in all sizes and numbers of classes, the others
in some. For every score with an interval in a report, a cell holds the share of data sets in which the interval covers
the true score, and counts data sets in which an interval does not contain its own score. Verdicts: how often a report
says "Miscalibrated" (or that the error is too low), and how often at least one of its seven calibration scores lies
outside its band. "page" and "alarms" do the same for the other scores and verdicts of a report
(``page_simulation.py``): entropies of drawn predictions, out-of-distribution inputs, people's answers, conformal sets;
and how often each verdict reports an effect where there is none.

    python -m benchmarks.quality.interval_coverage                       # about 15 minutes of one core
    python -m benchmarks.quality.interval_coverage --only verdicts
    python -m benchmarks.quality.interval_coverage --table               # the table from existing results
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.calibration.confidence_profile import exact_profile, top_confidence
from bayes_kf.evaluation.calibration.intervals import difference_interval
from bayes_kf.evaluation.calibration.null_distribution import profile_tests
from bayes_kf.evaluation.calibration.score_summary import PRIMARY, STATISTICS
from bayes_kf.evaluation.calibration.spiegelhalter import spiegelhalter_test
from bayes_kf.evaluation.classification.scores import brier_scores, log_losses
from bayes_kf.evaluation.resampling.null_test import NullSettings
from bayes_kf.evaluation.score import Score, flatten_scores
from bayes_kf.evaluation.sections.classification import mean_scores
from bayes_kf.evaluation.sections.verdicts.calibration import calibration_verdict
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.quality import page_simulation

KINDS = ("calibrated", "over-confident", "under-confident", "one class", "label noise")
SIZES = (30, 100, 300, 1000, 5000)
CLASSES = (2, 10, 100)
SPREADS = (1.0, 4.0)  # of the logits
COVERED = 0.9
NUM_BINS = 15


def draw(rng: np.random.Generator, size: int, classes: int, kind: str, spread: float) -> tuple[Tensor, Tensor]:
    """Predicted probabilities (N, C) and labels (N,)."""
    logits = spread * torch.from_numpy(rng.normal(size=(size, classes)))
    probs = logits.softmax(1)
    uniform = torch.from_numpy(rng.random((size, 1)))
    targets = (probs.cumsum(1) < uniform).sum(1).clamp(max=classes - 1)
    if kind == "label noise":
        noisy = torch.from_numpy(rng.random(size) < 0.1)
        targets = torch.where(noisy, torch.from_numpy(rng.integers(classes, size=size)), targets)
    slope = {"over-confident": 1.5, "under-confident": 1 / 1.5}.get(kind, 1.0)
    shift = torch.zeros(classes, dtype=torch.float64)
    shift[0] = math.log(3) if kind == "one class" else 0.0
    return (slope * logits + shift).softmax(1), targets


def truth(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """Scores of a population."""
    confidence, hit = top_confidence(probs, targets, 1)
    correct, uncertainty = hit.bool(), ev.entropy(probs)
    sharper = (1.2 * probs.clamp(min=1e-300).log()).softmax(1)
    return {
        "accuracy": hit.mean().item(),
        "nll": log_losses(probs, targets).mean().item(),
        "brier": brier_scores(probs, targets).mean().item(),
        "rps": ev.ranked_probability_score(probs, targets),
        "confidence": confidence.mean().item(),
        "confidence_gap": (confidence - hit).mean().item(),
        "error_auroc": ev.error_detection(uncertainty, correct).auroc,
        "accuracy_at_80": ev.accuracy_at_coverage(confidence, correct, (0.8,)).item(),
        "accuracy_at_95": ev.accuracy_at_coverage(confidence, correct, (0.95,)).item(),
        "nll_difference": (log_losses(sharper, targets) - log_losses(probs, targets)).mean().item(),
    }


def intervals(probs: Tensor, targets: Tensor) -> dict[str, tuple[float, float, float]]:
    """Value, lower and upper end of every score that has an interval in this data set."""
    confidence, hit = top_confidence(probs, targets, 1)
    scores = flatten_scores(mean_scores(probs, targets, None, NUM_BINS, True))
    low, high = ev.calibration_interval(probs, targets)
    scores |= {
        "confidence_gap": (confidence - hit).mean().item(),
        "confidence_gap_low": low,
        "confidence_gap_high": high,
    }
    correct, uncertainty = hit.bool(), ev.entropy(probs)
    scores["error_auroc"] = ev.error_detection(uncertainty, correct).auroc
    scores["error_auroc_low"], scores["error_auroc_high"] = ev.error_detection_intervals(uncertainty, correct).auroc
    selective = ev.selective_intervals(confidence, correct, (0.8, 0.95)).accuracy
    for share, value, ends in zip(
        (80, 95), ev.accuracy_at_coverage(confidence, correct, (0.8, 0.95)), selective, strict=True
    ):
        scores |= {f"accuracy_at_{share}": value.item()}
        scores |= {f"accuracy_at_{share}_low": ends.low, f"accuracy_at_{share}_high": ends.high}
    sharper = (1.2 * probs.clamp(min=1e-300).log()).softmax(1)
    change = log_losses(sharper, targets) - log_losses(probs, targets)
    low, high = difference_interval(change, sharper, probs, 0.95)
    if math.isfinite(low):
        scores |= {"nll_difference": change.mean().item(), "nll_difference_low": low, "nll_difference_high": high}
    return {
        name: (value, scores[f"{name}_low"], scores[f"{name}_high"])
        for name, value in scores.items()
        if f"{name}_low" in scores and not math.isnan(scores[f"{name}_low"])
    }


def coverage(size: int, classes: int, kind: str, spread: float) -> dict[str, float]:
    """Shares of data sets whose interval covers, and the number of intervals that do not contain their own score."""
    repeats = 200 if size <= 1000 and classes < 100 else 100 if size <= 1000 else 60
    repeats = repeats if kind == "calibrated" else 100
    true = truth(*draw(np.random.default_rng(7), 200_000, classes, kind, spread))
    inside: dict[str, list[bool]] = {}
    without = 0
    for seed in range(repeats):
        measured = intervals(*draw(np.random.default_rng([seed, size, classes]), size, classes, kind, spread))
        for name, (value, low, high) in measured.items():
            inside.setdefault(name, []).append(low <= true[name] <= high)
            without += not low <= value <= high
    return {name: sum(hits) / len(hits) for name, hits in inside.items()} | {"repeats": repeats, "without": without}


def verdicts(size: int, classes: int, kind: str, spread: float) -> dict[str, float]:
    """Shares of data sets by verdict, and of those in which some calibration score lies outside its band."""
    repeats = 200 if kind == "calibrated" else 40
    counts = dict.fromkeys(("miscalibrated", "too low", "too few", "any of seven", "spiegelhalter", *STATISTICS), 0)
    for seed in range(repeats):
        probs, targets = draw(np.random.default_rng([seed, size, classes]), size, classes, kind, spread)
        confidence, hit = top_confidence(probs, targets, 1)
        tests = profile_tests(
            exact_profile(confidence, hit), tuple(STATISTICS.values()), NullSettings(NUM_BINS, 199, seed), 0.95
        )
        scores = {"confidence": Score(confidence.mean().item()), "accuracy": Score(hit.mean().item())}
        outside = []
        for name, test in zip(STATISTICS, tests, strict=True):
            scores[name] = test.score()
            outside.append(not test.null_low - 1e-9 <= test.value <= test.null_high + 1e-9)
            counts[name] += outside[-1]
        said = calibration_verdict(scores, size)
        counts["miscalibrated"] += said.startswith("Miscalibrated")
        counts["too few"] += said.startswith("Too few")
        counts["too low"] += "are the targets independent" in said
        counts["any of seven"] += any(outside)
        counts["spiegelhalter"] += spiegelhalter_test(probs, targets).p_value < 0.05
    return {name: count / repeats for name, count in counts.items()} | {"repeats": repeats}


def cases(what: str) -> Iterator[tuple[int, int, str, float]]:
    """Size, number of classes, kind and spread of every cell."""
    for kind in KINDS:
        calibrated = kind == "calibrated"
        if what == "intervals":
            sizes, classes_of = (SIZES, CLASSES) if calibrated else ((30, 100, 1000), CLASSES[:2])
        else:
            sizes, classes_of = SIZES[:4] if calibrated else (300,), CLASSES[:2]
        for size in sizes:
            for classes in classes_of:
                for spread in SPREADS:
                    yield size, classes, kind, spread


def render(cells: dict[str, dict[str, float]]) -> list[str]:
    """Body of the Markdown file."""
    part_cells = {key: cell for key, cell in cells.items() if key.startswith("intervals")}
    names = sorted({name for cell in part_cells.values() for name in cell} - {"repeats", "without"})
    rows = []
    for name in names:
        held = {key: cell for key, cell in part_cells.items() if name in cell}
        worst = min(held, key=lambda key: held[key][name])
        pooled = {
            (size, kind): _pooled(held, name, size, kind) for size in SIZES for kind in KINDS if _has(held, size, kind)
        }
        low = min(pooled, key=lambda key: pooled[key])
        mean = sum(cell[name] for cell in held.values()) / len(held)
        place = worst.split("/")
        where = f"{place[1]} examples, {place[2]} classes, {place[3]}, spread {place[4]}"
        lowest = f"{100 * pooled[low]:.1f} ({low[0]}, {low[1]})"
        of_cell = f"{100 * held[worst][name]:.0f} % of {held[worst]['repeats']:.0f} data sets ({where})"
        rows.append([name, f"{100 * mean:.1f}", lowest, of_cell])
    without = sum(cell["without"] for cell in part_cells.values())
    total = sum(cell["repeats"] for cell in part_cells.values())
    header = ["score", "mean, %", "lowest by size and kind, %", "lowest cell"]
    body = [
        "## Coverage of 95 % intervals",
        "",
        f"{total:,.0f} data sets in {len(part_cells)} cells; {without:.0f} intervals",
    ]
    body[-1] += " without their own value. Log losses have none of fewer than 50 examples."
    body += ["", *markdown_table(header, rows), "", "## Verdicts", ""]
    shown = ("miscalibrated", "too low", "too few", "any of seven", *STATISTICS, "spiegelhalter")
    lines = []
    for kind in KINDS:
        for size in SIZES[:4]:
            part = [c for key, c in cells.items() if key.startswith(f"verdicts/{size}/") and f"/{kind}/" in key]
            if part:
                lines.append([kind, str(size), *(f"{100 * sum(c[n] for c in part) / len(part):.1f}" for n in shown)])
    body += [f"The test is that of `{PRIMARY}`. Per cent of data sets, over 2 and 10 classes and both spreads.", ""]
    body += [*markdown_table(["predictions", "examples", *shown], lines), ""]
    return [*body, *_of_pages(cells)]


def _of_pages(cells: dict[str, dict[str, float]]) -> list[str]:
    """Tables of the other scores and verdicts of a report."""
    body: list[str] = []
    for what, title in (("page", "Coverage of the other intervals of a page"), ("alarms", "False verdicts of a page")):
        part = {key.removeprefix(f"{what}/"): cell for key, cell in cells.items() if key.startswith(f"{what}/")}
        part = dict(sorted(part.items(), key=lambda item: [int(number) for number in item[0].split("/")]))
        names = [n for n in dict.fromkeys(n for cell in part.values() for n in cell) if n not in ("repeats", "without")]
        rows = [[n, *(f"{100 * cell[n]:.1f}" if n in cell else "" for cell in part.values())] for n in names]
        columns = [f"{size} examples, {classes} classes" for size, classes in (key.split("/") for key in part)]
        counts = " or ".join(sorted({f"{cell['repeats']:.0f}" for cell in part.values()}))
        body += [f"## {title}", "", f"Per cent of {counts} data sets in each column.", ""]
        body += [*markdown_table(["score" if what == "page" else "verdict", *columns], rows), ""]
    return body


def _has(cells: dict[str, dict[str, float]], size: int, kind: str) -> bool:
    return any(key.startswith(f"intervals/{size}/") and f"/{kind}/" in key for key in cells)


def _pooled(cells: dict[str, dict[str, float]], name: str, size: int, kind: str) -> float:
    """Mean over classes and spreads, weighted by the numbers of data sets."""
    part = [c for key, c in cells.items() if key.startswith(f"intervals/{size}/") and f"/{kind}/" in key]
    return sum(c[name] * c["repeats"] for c in part) / sum(c["repeats"] for c in part)


def work(only: Iterable[str]) -> dict[str, Callable[[], dict[str, float]]]:
    """Key -> function that measures, for the chosen parts."""
    cells: dict[str, Callable[[], dict[str, float]]] = {}
    for what, measure in (("verdicts", verdicts), ("intervals", coverage)):
        for case in cases(what) if what in only else ():
            parts = [f"{part:g}" if isinstance(part, float) else str(part) for part in case]
            cells["/".join([what, *parts])] = partial(measure, *case)
    for what, simulate in (("page", page_simulation.coverage), ("alarms", page_simulation.alarms)):
        for size in page_simulation.SIZES if what in only else ():
            for classes in page_simulation.CLASSES:
                cells[f"{what}/{size}/{classes}"] = partial(simulate, size, classes)
    return cells


def main() -> None:
    """The command line."""
    args = Command(__doc__).names("--only", ("intervals", "verdicts", "page", "alarms")).redo().table().parse()
    file = ResultFile("interval_coverage")
    if not args.table:
        run_cells(file, work(args.only), args.redo)
    print(file.write_markdown("How often intervals cover and verdicts are wrong", render(file.cells)))


if __name__ == "__main__":
    main()
