"""Does the covariance become diagonal? LoKO's Figure 5, with the full filter on small networks.

The paper shows the covariance of LeNet-5, dense at first and (block-)diagonal later. Here the full extended Kalman
filter (its equations 1 to 3, with the noise of equation 12 or our default noise) learns MNIST, averaged down to 7 x 7
pixels, in a small LeNet. A filter that starts from a diagonal prior cannot start dense. There are therefore two priors:
a diagonal one, and one of the same variances with random correlations. Two numbers say how diagonal a covariance is:
the share of the sum of squared correlations off the diagonal, and the share outside the blocks of one tensor each. Data
is read from ../shared/data or from $BAYES_KF_DATA.

    python -m benchmarks.papers.covariance             # about ten minutes a seed; a stopped run continues
    python -m benchmarks.papers.covariance --table     # the table and the figure from existing results
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

import bayes_kf as bkf
from benchmarks.common.command import Command, run_cells
from benchmarks.common.data import mnist
from benchmarks.common.result_files import ResultFile, markdown_table

STEPS = (0, 100, 1000, 3000, 10000)
NOISES = {"ema_taylor": "LoKO's noise, equation 12", "exponential_family": "exponential family, at the mode"}
STARTS = {"diagonal": "diagonal prior", "dense": "dense prior"}
VARIANCE = 0.05  # p₀
CELLS = 64  # pixels of a picture's side, at most


def small_lenet(seed: int) -> nn.Module:
    """A small LeNet: two convolutions with pooling, two linear layers; 1,082 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10),
        )  # fmt: skip


def dense_prior(size: int, seed: int) -> Tensor:
    """A covariance (n, n) with variances VARIANCE and correlations of root mean square 0.06 (300 random directions)."""
    factors = torch.randn(size, 300, generator=torch.Generator().manual_seed(seed))
    covariance = factors @ factors.mT + 1e-2 * torch.eye(size)
    scale = covariance.diagonal().rsqrt()
    return VARIANCE * scale[:, None] * covariance * scale


def shares(covariance: Tensor, sizes: list[int]) -> tuple[float, float]:
    """Shares of the sum of squared correlations off the diagonal, and outside diagonal blocks of these sizes."""
    scale = covariance.diagonal().rsqrt()
    squares = (scale[:, None] * covariance * scale).double().square()
    within = sum(float(block.sum()) for block in _blocks(squares, sizes))
    total = float(squares.sum())
    return 1.0 - len(covariance) / total, 1.0 - within / total


def _blocks(matrix: Tensor, sizes: list[int]) -> list[Tensor]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [matrix[end - size : end, end - size : end] for end, size in zip(ends, sizes, strict=True)]


def picture(covariance: Tensor) -> list[list[float]]:
    """Root mean square correlations in CELLS x CELLS cells, without the diagonal."""
    scale = covariance.diagonal().rsqrt()
    squares = (scale[:, None] * covariance * scale).square()
    squares.fill_diagonal_(0.0)
    pixels = F.adaptive_avg_pool2d(squares[None, None], CELLS)[0, 0].sqrt()
    return [[round(value, 3) for value in row] for row in pixels.tolist()]


def measure(noise: str, start: str, seed: int) -> dict[str, Any]:
    """The shares at each of STEPS of a pass, and for the first seed pictures of the correlations."""
    images = mnist("train")
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))[: STEPS[-1]]
    inputs, labels = F.avg_pool2d(images.images[order], 4), images.labels[order]
    model = small_lenet(seed)
    sizes = [parameter.numel() for parameter in model.parameters()]
    expansion = "mean" if noise == "ema_taylor" else "mode"
    config = bkf.KalmanConfig(
        covariance="full",
        noise=noise,
        expansion=expansion,
        initial_variance=VARIANCE,
        bound_prior=False,
        temperature=1.0,
    )
    kf = bkf.KalmanFilter(model, config)
    state = kf.init()
    if start == "dense":
        dense = dense_prior(len(state.belief.mean), seed)
        state = state._replace(belief=state.belief._replace(covariance=dense))
    cell: dict[str, Any] = {"off_diagonal": [], "off_blocks": [], "variance": [], "pictures": []}
    correct = 0.0
    for step in tqdm(range(STEPS[-1] + 1), leave=False, disable=not sys.stderr.isatty(), position=1):
        if step in STEPS:
            covariance = state.belief.covariance_matrix()
            for name, value in zip(("off_diagonal", "off_blocks"), shares(covariance, sizes), strict=True):
                cell[name].append(value)
            cell["variance"].append(float(covariance.diagonal().mean()))
            if seed == 0:
                cell["pictures"].append(picture(covariance))
        if step < STEPS[-1]:
            state, info = kf.update(state, inputs[step : step + 1], labels[step : step + 1])
            assert info.correct is not None  # a classifier
            correct += float(info.correct.double().sum())
    return cell | {"accuracy": correct / STEPS[-1], "parameters": sum(sizes)}


def render(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Body of the Markdown file."""
    lines = ["Share of the squared correlations off the diagonal (outside the tensors' blocks), mean of the seeds.", ""]
    rows = []
    for noise, title in NOISES.items():
        for start, kind in STARTS.items():
            of_seeds = [cell for key, cell in cells.items() if key.startswith(f"{noise}/{start}/")]
            if of_seeds:
                means = [
                    f"{_mean(of_seeds, 'off_diagonal', i):.3f} ({_mean(of_seeds, 'off_blocks', i):.3f})"
                    for i in range(len(STEPS))
                ]
                accuracy = sum(cell["accuracy"] for cell in of_seeds) / len(of_seeds)
                rows.append([title, kind, *means, f"{accuracy:.3f}", str(len(of_seeds))])
    head = ["noise", "start", *[f"step {step:,}" for step in STEPS], "online accuracy", "seeds"]
    return [*lines, *markdown_table(head, rows), "", "![Correlations by step](covariance.png)"]


def _mean(cells: list[dict[str, Any]], name: str, index: int) -> float:
    return sum(cell[name][index] for cell in cells) / len(cells)


def draw(cells: dict[str, dict[str, Any]]) -> Figure:
    """Root mean square correlations of the first seed by step, a row for each filter."""
    shown = [(n, s) for n in NOISES for s in STARTS if f"{n}/{s}/0" in cells]
    figure = Figure(figsize=(2.1 * len(STEPS) + 1.2, 2.25 * len(shown) + 0.3), layout="constrained")
    axes = figure.subplots(len(shown), len(STEPS), squeeze=False)
    image = None
    for row, (noise, start) in zip(axes, shown, strict=True):
        cell = cells[f"{noise}/{start}/0"]
        for ax, step, pixels, share in zip(row, STEPS, cell["pictures"], cell["off_diagonal"], strict=True):
            image = ax.imshow(pixels, cmap="Greys", vmin=0.0, vmax=0.2, interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=f"step {step:,}: {share:.0%} off")
            ax.title.set_fontsize(8)
        row[0].set_ylabel(f"{NOISES[noise].split(',')[0]}\n{STARTS[start]}", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.6, label="root mean square correlation")
    return figure


def main() -> None:
    """The command line."""
    args = Command(__doc__).seeds(3).redo().table().parse()
    file = ResultFile("covariance")
    if not args.table:
        places = [(noise, start, seed) for seed in args.seeds for noise in NOISES for start in STARTS]
        work = {f"{noise}/{start}/{seed}": partial(measure, noise, start, seed) for noise, start, seed in places}
        run_cells(file, work, args.redo, lambda cell: str([round(x, 3) for x in cell["off_diagonal"]]))
    print(file.write_markdown("Does the covariance become diagonal?", render(file.cells)))
    draw(file.cells).savefig(file.path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
