"""The effect of a gradient penalty on a filter: R-Kalman over a grid of ρ, transient and permanent.

The digit transformer adapts from MNIST to USPS by LoRA, and LeNet-5 learns MNIST from scratch, 300 examples one at a
time, under this package's default and under LoKO's setting. The table has accuracy and log loss on held-out examples,
the norm of the gradient of the mean loss of 200 fixed training examples along the path, and the mean of p over its
initial value. ρ is chosen after the fact by the score of held-out examples. Data is read from ../shared/data or
$BAYES_KF_DATA.

    python -m benchmarks.papers.gradient_penalty               # everything; a stopped run continues
    python -m benchmarks.papers.gradient_penalty --data usps   # one problem
    python -m benchmarks.papers.gradient_penalty --table       # the table and the figure from existing results
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import bayes_kf as bkf
from bayes_kf.evaluation.plots.style import BLUE, GREY, VERMILLION
from bayes_kf.inference.config import PENALTIES
from bayes_kf.inference.filtering.gradient_penalty import mean_gradient
from bayes_kf.models.zoo import lenet5, lora_digits_vit
from benchmarks.common.command import Command, run_cells
from benchmarks.common.data import mnist, usps
from benchmarks.common.learners import SCALE_EXAMPLES, Stream, quiet_bar
from benchmarks.common.result_files import ResultFile, markdown_table, mean_sd

DATA = {"usps": "LoRA on the digit transformer, MNIST to USPS", "mnist": "LeNet-5 on MNIST, from scratch"}
BASES = {"default": "our default", "loko": "LoKO's setting"}
PENALTY = (0.001, 0.01, 0.1, 1.0)  # ρ, beside 0
EXAMPLES, PROBED, HELD_OUT = 300, 200, 500
EVERY = 25  # updates between two measurements of the gradient

Cells = Mapping[str, dict[str, Any]]


class Cell(NamedTuple):
    """One pass; ``form`` has no effect if ``penalty`` is 0."""

    data: str
    base: str
    form: str
    penalty: float
    seed: int

    @property
    def key(self) -> str:
        """Key in the results file."""
        form = f"{self.form}/{self.penalty:g}" if self.penalty else "plain/0"
        return f"{self.data}/{self.base}/{form}/{self.seed}"

    @property
    def config(self) -> bkf.KalmanConfig:
        """The filter's settings."""
        make = bkf.KalmanConfig.loko if self.base == "loko" else bkf.KalmanConfig
        return make(gradient_penalty=self.penalty, gradient_penalty_form=self.form, seed=self.seed)


def problem(data: str, seed: int) -> tuple[nn.Module, Stream, Stream, Stream]:
    """A model at its start, its stream, the examples for its gradient, and held-out examples."""
    read = usps if data == "usps" else mnist
    train, test = read("train"), read("test")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    stream, probe = (
        Stream(train.images[order[where]], train.labels[order[where]])
        for where in (slice(EXAMPLES), slice(EXAMPLES, EXAMPLES + PROBED))
    )
    held_out = Stream(test.images, test.labels).at(
        torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(1))[:HELD_OUT]
    )
    model = lora_digits_vit(rank=4, seed=seed) if data == "usps" else lenet5(seed)
    return model, stream, probe, held_out


def measure(cell: Cell) -> dict[str, Any]:
    """The numbers of a pass, or the step at which it diverged."""
    model, stream, probe, held_out = problem(cell.data, cell.seed)
    kf = bkf.KalmanFilter(model, cell.config)
    state = kf.init(stream.first(SCALE_EXAMPLES).inputs)
    kf.linearize.prepare(state.belief.mean, probe.inputs)
    path: dict[str, list[float]] = {"gradient": [], "variance": [], "penalty": [], "correct": []}
    seconds = 0.0
    for step, (inputs, labels) in enumerate(quiet_bar(stream.batches())):
        if step % EVERY == 0:
            measure_gradient(kf, state, probe, path)
        begun = time.process_time()
        try:
            state, info = kf.update(state, inputs, labels)
        except bkf.DivergenceError as error:
            return {"diverged_at": error.step, "cause": error.cause}
        seconds += time.process_time() - begun
        path["penalty"].append(info.penalty)
        assert info.correct is not None  # a classifier
        path["correct"].append(float(info.correct))
    measure_gradient(kf, state, probe, path)
    posterior = bkf.Posterior(kf, state)
    scores = {name: score(posterior, held_out, name) for name in ("mean", "linearized")}
    return {
        "online_accuracy": sum(path["correct"]) / len(stream.labels),
        "accuracy": scores["mean"][0],
        "log_loss": scores["mean"][1],
        "linearized_log_loss": scores["linearized"][1],
        "penalty": sum(path["penalty"]) / len(stream.labels),
        "gradient": [round(g, 5) for g in path["gradient"]],
        "variance": [round(v, 6) for v in path["variance"]],
        "milliseconds": 1e3 * seconds / len(stream.labels),
    }


def measure_gradient(kf: bkf.KalmanFilter, state: Any, probe: Stream, path: dict[str, list[float]]) -> None:
    """Append the norm of the probe's gradient, and the mean of p over its initial value."""
    gradient = mean_gradient(kf.config, kf.linearize, state, probe.inputs, probe.labels)
    path["gradient"].append(float(gradient.norm()))
    path["variance"].append(float((kf.marginal_variance(state) / state.prior.variance).mean()))


def score(posterior: bkf.Posterior, held_out: Stream, method: str) -> tuple[float, float]:
    """Accuracy and mean log loss of the posterior's predictions."""
    losses, right = [], []
    for inputs, labels in held_out.batches(100):
        prediction = posterior.predict(inputs, targets=labels, method=method)
        assert prediction.log_prob is not None  # targets were given
        losses.append(-prediction.log_prob)
        right.append(prediction.mean.argmax(-1) == labels)
    return torch.cat(right).double().mean().item(), torch.cat(losses).double().mean().item()


def cells(data: list[str], seeds: list[int]) -> Iterator[Cell]:
    """All passes, the plain ones first."""
    for seed, name, base in itertools.product(seeds, data, BASES):
        yield Cell(name, base, PENALTIES[0], 0.0, seed)
        yield from (Cell(name, base, form, rho, seed) for form, rho in itertools.product(PENALTIES, PENALTY))


def of(all_cells: Cells, data: str, base: str, form: str, penalty: float) -> list[dict[str, Any]]:
    """The cells of all seeds for one data set, base, form and penalty."""
    prefix = Cell(data, base, form, penalty, 0).key.rpartition("/")[0] + "/"
    return [cell for key, cell in all_cells.items() if key.startswith(prefix)]


def render(all_cells: Cells) -> list[str]:
    """Body of the Markdown file."""
    lines = [
        f"{EXAMPLES} examples one at a time; mean ± sd over seeds (order, adapter or network, prior). Held out:"
        f" {HELD_OUT} test examples, predicted by the mean and by the linearized model. ‖∇L‖: of the mean loss of"
        f" {PROBED} training examples that are not in the stream, over the path and at its end. p/p₀: mean over"
        " parameters at the end. a: mean of ρ‖g‖² over updates. ms: processor time of an update.",
        "",
        "![Gradient norm along the path, p along the path, and held-out log loss by ρ](gradient_penalty.png)",
    ]
    header = ["ρ", "form", "online acc.", "acc.", "NLL", "NLL, linearized", "‖∇L‖ path", "‖∇L‖ end", "p/p₀", "a", "ms"]
    for (data, title), (base, name) in itertools.product(DATA.items(), BASES.items()):
        rows = []
        for form, penalty in [("", 0.0), *itertools.product(PENALTIES, PENALTY)]:
            seeds = of(all_cells, data, base, form, penalty)
            if seeds:
                rows.append([f"{penalty:g}", form, *_row(seeds)])
        if rows:
            lines += ["", f"## {title}, {name}", "", *markdown_table(header, rows), "", _verdict(all_cells, data, base)]
    return lines


def _verdict(all_cells: Cells, data: str, base: str) -> str:
    """The gain of the best penalty over none, seed by seed, and the penalties that lower the gradient's norm."""
    plain = of(all_cells, data, base, "", 0.0)
    gains, lower = {}, []
    for form, penalty in itertools.product(PENALTIES, PENALTY):
        seeds = of(all_cells, data, base, form, penalty)
        if len(seeds) != len(plain) or any("cause" in cell for cell in [*plain, *seeds]):
            continue
        name = f"{form} ρ = {penalty:g}"
        gains[name] = [p["log_loss"] - c["log_loss"] for p, c in zip(plain, seeds, strict=True)]
        if all(sum(c["gradient"]) < sum(p["gradient"]) for p, c in zip(plain, seeds, strict=True)):
            lower.append(name)
    if not gains:
        return ""
    best = max(gains, key=lambda name: sum(gains[name]))
    better = sum(gain > 0 for gain in gains[best])
    return (
        f"Lowest held-out NLL of the mean among the penalties: {best}, {mean_sd(gains[best])} below that of no penalty"
        f" (mean ± sd of the differences by seed; lower on {better} of {len(plain)}). Mean ‖∇L‖ over the path below"
        f" that of no penalty on every seed: {', '.join(lower) or 'none'}."
    )


def _row(seeds: list[dict[str, Any]]) -> list[str]:
    stopped = [cell["diverged_at"] for cell in seeds if "cause" in cell]
    if stopped:
        return [f"div@{min(stopped)} ({len(stopped)}/{len(seeds)})", *[""] * 8]
    numbers = [[cell[name] for cell in seeds] for name in ("online_accuracy", "accuracy", "log_loss")]
    numbers.append([cell["linearized_log_loss"] for cell in seeds])
    numbers.append([sum(cell["gradient"]) / len(cell["gradient"]) for cell in seeds])
    numbers.append([cell["gradient"][-1] for cell in seeds])
    numbers.append([cell["variance"][-1] for cell in seeds])
    penalty = f"{sum(cell['penalty'] for cell in seeds) / len(seeds):.3g}"
    time = sorted(cell["milliseconds"] for cell in seeds)[len(seeds) // 2]
    return [*[mean_sd(values) for values in numbers], penalty, f"{time:.1f}"]


def draw(all_cells: Cells) -> Figure:
    """For each problem under our default: the gradient's norm and p along the path, and the held-out loss by ρ."""
    names = [data for data in DATA if of(all_cells, data, "default", "", 0.0)]
    figure = Figure(figsize=(11, 3.1 * len(names)), layout="constrained")
    lines = [("", 0.0, GREY, "-"), ("transient", 0.1, BLUE, "--"), ("permanent", 0.1, VERMILLION, "-.")]
    for axes, data in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        for form, penalty, colour, style in lines:
            seeds = [cell for cell in of(all_cells, data, "default", form, penalty) if "cause" not in cell]
            for ax, name in zip(axes, ("gradient", "variance"), strict=False):
                paths = torch.tensor([cell[name] for cell in seeds])
                steps = EVERY * torch.arange(paths.shape[1] if len(seeds) else 0)
                label = f"ρ = {penalty:g} {form}".strip()
                ax.plot(steps, paths.mean(0) if len(seeds) else [], style, color=colour, label=label)
        axes[0].set(xlabel="examples", ylabel="‖∇L‖", yscale="log", title=DATA[data])
        axes[1].set(xlabel="examples", ylabel="mean p/p₀", yscale="log")
        axes[0].legend(fontsize=7)
        for base, marker in zip(BASES, ("o", "s"), strict=True):
            for form, colour, style in (("transient", BLUE, "--"), ("permanent", VERMILLION, "-.")):
                places = [(0.0003, ""), *[(rho, form) for rho in PENALTY]]  # 0 stands left of the axis' break
                losses = [of(all_cells, data, base, f, rho if f else 0.0) for rho, f in places]
                known = [
                    (rho, sum(c["log_loss"] for c in seeds) / len(seeds))
                    for (rho, _), seeds in zip(places, losses, strict=True)
                    if seeds and not any("cause" in c for c in seeds)
                ]
                label = f"{BASES[base]}, {form}"
                axes[2].plot(*zip(*known, strict=True), style, marker=marker, color=colour, markersize=4, label=label)
        axes[2].set(xscale="log", xlabel="ρ (leftmost: 0)", ylabel="held-out NLL of the mean")
        axes[2].legend(fontsize=7)
    return figure


def main() -> None:
    """The command line."""
    args = Command(__doc__).names("--data", DATA, text="problems").seeds(3).redo().table().parse()
    file = ResultFile("gradient_penalty")
    if not args.table:
        work = {cell.key: partial(measure, cell) for cell in cells(args.data, args.seeds)}
        run_cells(file, work, args.redo, lambda cell: " ".join(_row([cell])))
    print(file.write_markdown("What a gradient penalty does", render(file.cells)))
    if file.cells:
        draw(file.cells).savefig(file.path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
