"""Streams that change: MNIST whose labels are permuted half-way, and MNIST that turns by 180 degrees.

The bundled digit transformer (trained on MNIST's training set) learns test images online by LoRA and its head. Rows:
the frozen model; AdamW at four constant rates (the best is chosen after the fact); the default filter, whose model of
the stream is stationary; and a bank of filters with different dynamics over the whole stream. The bank predicts each
example by the average of all candidates, weighted by their evidence so far, and chooses nothing after the fact. The
drift alarm uses the default filter's predictions. Data: ../shared/data or $BAYES_KF_DATA.

    python -m benchmarks.quality.drift --seeds 2      # a stopped run continues
    python -m benchmarks.quality.drift --table        # the table and the figure from existing results
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torchvision.transforms.functional import InterpolationMode, rotate

import bayes_kf as bkf
from bayes_kf.evaluation import drift_alarm, moving_average
from bayes_kf.inference.fitting.selection.filter_bank import candidates
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.common.command import Command, run_cells
from benchmarks.common.data import mnist
from benchmarks.common.learners import SCALE_EXAMPLES, Pass, Stream, check_finite, frozen_pass, gradient_pass, quiet_bar
from benchmarks.common.result_files import ResultFile, markdown_table, mean_sd

mpl.use("Agg")
import matplotlib.pyplot as plt

LENGTH, WINDOW, RANK = 2000, 100, 4
STREAMS = {"permuted": "labels permuted half-way", "rotating": "turning from 0 to 180 degrees"}
RATES = {f"adamw-{text}": float(text) for text in ("3e-4", "1e-3", "3e-3", "1e-2")}
ROWS = ("frozen", *RATES, "default", "bank")
GRID = {"forgetting": (1.0, 0.999, 0.997)}
TITLES = {"frozen": "frozen", "default": "default, static", "bank": "bank of dynamics"}
COLOURS = {"adamw": "0.45", "default": "#1b6ca8", "bank": "#c8553d"}


def stream(kind: str, seed: int) -> Stream:
    """2,000 test images; the seed sets their order."""
    data, generator = mnist("test"), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels), generator=generator)[:LENGTH]
    images, labels = data.images[order], data.labels[order]
    if kind == "permuted":
        shift = 1 + torch.arange(10)  # no class keeps its label
        late = torch.arange(LENGTH) >= LENGTH // 2
        return Stream(images, torch.where(late, (shift % 10)[labels], labels))
    angles = torch.linspace(0, 180, LENGTH).tolist()
    turned = [
        rotate(image, angle, InterpolationMode.BILINEAR, fill=[-1.0])
        for image, angle in zip(images, angles, strict=True)
    ]
    return Stream(torch.stack(turned), labels)


def learn(row: str, given: Stream, seed: int) -> tuple[Pass, dict[str, Any]]:
    """A row's pass over a stream, and further numbers for the results file."""
    model = lora_digits_vit(rank=RANK, seed=seed)
    if row == "frozen":
        return frozen_pass(model, given), {}
    if row in RATES:
        return gradient_pass(model, given, lambda parameters: torch.optim.AdamW(parameters, lr=RATES[row])), {}
    config = bkf.KalmanConfig(seed=seed)
    bank = bkf.Bank(model, candidates(config, GRID) if row == "bank" else [config])
    return bank_pass(bank, given)


def bank_pass(bank: bkf.Bank, given: Stream) -> tuple[Pass, dict[str, Any]]:
    """A pass of a bank, which predicts by the average of its candidates weighted by evidence."""
    state = bank.init(given.inputs[:SCALE_EXAMPLES])
    correct, losses, probs, leaders = [], [], [], []
    start = time.process_time()
    for inputs, labels in quiet_bar(given.batches()):
        leaders.append(bank.best(state))
        state, info = bank.update(state, inputs, labels)
        correct.append(info.correct)
        losses.append(info.log_loss)
        probs.append(info.outputs.softmax(1))
    seconds = (time.process_time() - start) / len(losses)
    check_finite("log_loss", torch.cat(losses))
    alarms = drift_alarm(torch.cat(probs), given.labels).alarms.tolist()
    settings = [{name: getattr(kf.config, name) for name in GRID} for kf in bank.filters]
    numbers = {
        "alarms": alarms,
        "leaders": leaders,
        "settings": settings,
        "own_passes": list(state.own_passes),
        "evidence": bank.evidence(state).tolist(),
    }
    return Pass(torch.cat(correct).bool(), torch.cat(losses), seconds), numbers


def measure(kind: str, row: str, seed: int) -> dict[str, Any]:
    """The numbers of a row that the results file keeps: means, and the moving accuracy for the figure."""
    result, extra = learn(row, stream(kind, seed), seed)
    halves = result.correct.double().view(2, -1).mean(1).tolist()
    return {
        "accuracy": result.correct.double().mean().item(),
        "first_half": halves[0],
        "second_half": halves[1],
        "log_loss": result.log_loss.double().mean().item(),
        "milliseconds": 1e3 * result.seconds,
        "moving": [round(value, 4) for value in moving_average(result.correct.double(), WINDOW)[::20].tolist()],
        **extra,
    }


def render(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table for each stream, and the figure."""
    grid = ", ".join(f"{name} {values}" for name, values in GRID.items())
    lines = [
        f"MNIST test images, {LENGTH:,} in each stream, one at a time, mean ± sd over seeds; every example is predicted"
        " before it is learned from. * best AdamW by mean accuracy, chosen after the fact. The bank holds every"
        f" combination of {grid}. Alarms: of the default filter's own"
        " predictions, by `drift_alarm` at one false alarm in 10,000 examples; the first one after the change (or at"
        " all), and how many came before it. Milliseconds compare only what one command of those below measured.",
        "",
    ]
    for kind, title in STREAMS.items():
        rows = [row for row in ROWS if of(cells, kind, row)]
        if not rows:
            continue
        best = best_rate(cells, kind)
        header = ["", "accuracy", "first half", "second half", "log loss", "ms a step"]
        columns = ("accuracy", "first_half", "second_half", "log_loss")
        table = [
            [
                TITLES.get(row, f"AdamW {row[6:]}") + (" *" if row == best else ""),
                *(mean_sd([cell[name] for cell in of(cells, kind, row)]) for name in columns),
                mean_sd([cell["milliseconds"] for cell in of(cells, kind, row)], 1),
            ]
            for row in rows
        ]
        lines += [f"## {kind}: {title}", "", *markdown_table(header, table), "", *notes(cells, kind), ""]
    return [*lines, "![Moving accuracy on both streams](drift.png)"]


def notes(cells: Mapping[str, Mapping[str, Any]], kind: str) -> list[str]:
    """When the alarm was raised, and which candidate had the most evidence at the end."""
    change = LENGTH // 2 if kind == "permuted" else 0
    lines = []
    for seed, cell in enumerate(of(cells, kind, "default")):
        after = [alarm for alarm in cell["alarms"] if alarm >= change]
        when = (
            f"{after[0] - change} examples after the change"
            if change and after
            else f"at {after[0]}"
            if after
            else "never"
        )
        lines.append(f"- Seed {seed}: alarm {when}; {len(cell['alarms']) - len(after)} before.")
    for seed, cell in enumerate(of(cells, kind, "bank")):
        ahead = cell["settings"][cell["leaders"][-1]]
        own = ", ".join(f"{count:,}" for count in cell["own_passes"])
        lines.append(f"- Seed {seed}: ahead in the end {ahead}; updates on passes of its own, by candidate: {own}.")
    return lines


def of(cells: Mapping[str, Mapping[str, Any]], kind: str, row: str) -> list[Mapping[str, Any]]:
    """A row's cells, by seed."""
    return [cell for key, cell in sorted(cells.items()) if key.startswith(f"{kind}/{row}/")]


def best_rate(cells: Mapping[str, Mapping[str, Any]], kind: str) -> str | None:
    """The AdamW row with the largest mean accuracy."""
    means = {
        row: sum(cell["accuracy"] for cell in of(cells, kind, row)) / len(of(cells, kind, row))
        for row in RATES
        if of(cells, kind, row)
    }
    return max(means, key=means.__getitem__) if means else None


def plot(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Moving accuracy of the best AdamW, the static filter and the bank; alarms as marks below."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for panel, (kind, title) in zip(panels, STREAMS.items(), strict=True):
        best = best_rate(cells, kind)
        for row, colour in ((best, "adamw"), ("default", "default"), ("bank", "bank")):
            measured = of(cells, kind, row) if row else []
            if not measured:
                continue
            mean = torch.tensor([cell["moving"] for cell in measured]).mean(0)
            steps = WINDOW + 20 * torch.arange(len(mean))
            label = f"AdamW {row[6:]}, best in hindsight" if colour == "adamw" else TITLES[row]
            panel.plot(steps, mean, color=COLOURS[colour], label=label)
        alarms = [alarm for cell in of(cells, kind, "default") for alarm in cell["alarms"]]
        if alarms:
            label = "alarms of the static filter"
            panel.plot(alarms, [0.03] * len(alarms), "|", color=COLOURS["default"], markersize=9, label=label)
        if kind == "permuted":
            panel.axvline(LENGTH // 2, color="0.3", linestyle=":", linewidth=1)
        panel.set(xlabel="examples seen", title=title, ylim=(0, 1.02))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(f"accuracy over {WINDOW} examples")
    panels[0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--streams", STREAMS).names("--rows", ROWS).seeds(2).redo().table()
    args = command.parse()
    file = ResultFile("drift")
    if not args.table:
        places = [(kind, row, seed) for seed in args.seeds for kind in args.streams for row in args.rows]
        work = {f"{kind}/{row}/{seed}": partial(measure, kind, row, seed) for kind, row, seed in places}
        run_cells(file, work, args.redo, show)
    plot(file.cells, file.path.with_suffix(".png"))
    print(file.write_markdown("Streams that change", render(file.cells)))


def show(cell: Mapping[str, Any]) -> str:
    """A measured cell in one line."""
    return f"{cell['accuracy']:.4f} ({cell['first_half']:.4f}, {cell['second_half']:.4f})"


if __name__ == "__main__":
    main()
