"""Draws the pictures of concepts and architecture into docs/images: `python docs/_ext/figures.py [NAME ...]`."""

import dataclasses
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from torch import nn

import bayes_kf as bkf
from bayes_kf import evaluation as ev
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit

FOLDER = Path(__file__).parents[1] / "images"
BLUE, ORANGE, GREY, DARK = "#0072b2", "#d55e00", "#8a8a8a", "#222222"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def _save(figure, name):
    figure.savefig(FOLDER / name, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def _box(ax, x, y, width, height, title, text="", face="#eaf2f8"):
    style = "round,pad=0.0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=BLUE, linewidth=1.2))
    middle, size = x + width / 2, 10.5 if len(title) < 36 else 8.4
    if text:
        ax.text(middle, y + height * 0.66, title, ha="center", va="center", fontsize=size, weight="bold", color=DARK)
        ax.text(middle, y + height * 0.29, text, ha="center", va="center", fontsize=8.5, color=DARK)
    else:
        ax.text(middle, y + height / 2, title, ha="center", va="center", fontsize=10.5, weight="bold", color=DARK)


def _arrow(ax, start, end, text=""):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "linewidth": 1.2})
    if text:
        ax.text((start[0] + end[0]) / 2 + 0.12, (start[1] + end[1]) / 2, text, fontsize=9, va="center", color=ORANGE)


def architecture():
    """Left: the parts, each of which may import those below it. Right: a batch through one measurement update."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 6.6), width_ratios=(1.35, 1))
    for ax in (left, right):
        ax.set_axis_off()
        ax.set_ylim(-0.1, 8.75)
    left.set_xlim(0, 7.6)
    right.set_xlim(0, 5.6)
    left.text(0, 8.5, "Parts: arrows point to what is imported", weight="bold", fontsize=11.5)
    _box(left, 0, 7.3, 7.6, 0.8, "cli, integrations, distributed, data", face="#f6f6f6")
    inference = (
        ("fitting", "loops over loaders, selection, checkpoints"),
        ("posterior, saving, predictive", "a fitted Gaussian: predictions, draws, a folder"),
        ("filtering", "one predict and one measurement update"),
        ("measurement_model, covariance, linearization", "u = Mθ + ε;   P;   J = ∂η/∂θ"),
    )
    for number, (title, text) in enumerate(inference):
        _box(left, 0, 6.0 - 1.15 * number, 5.4, 0.9, title, text)
    _box(left, 0, 1.1, 5.4, 0.9, "models", "θ, prior, likelihood; PEFT, CLIP, language", "#fdf1e7")
    _box(left, 5.8, 1.1, 1.8, 5.8, "", face="#eef7ee")
    left.text(6.7, 6.4, "evaluation", ha="center", weight="bold", fontsize=10.5)
    parts = (
        "reports\nsections\nplots, report\nclassification\nregression\nonline\nrecalibration\ncalibration\nresampling"
    )
    left.text(6.7, 3.7, parts, ha="center", va="center", fontsize=9, linespacing=1.7)
    _box(left, 0, 0, 7.6, 0.7, "validation, files", face="#f6f6f6")
    for x, top, bottom in ((2.7, 7.3, 6.9), (6.7, 7.3, 6.9), (2.7, 1.1, 0.7), (6.7, 1.1, 0.7)):
        _arrow(left, (x, top), (x, bottom))
    for number in range(4):
        _arrow(left, (2.7, 6.0 - 1.15 * number), (2.7, 5.75 - 1.15 * number if number < 3 else 2.0))
    right.text(0, 8.5, "One measurement update", weight="bold", fontsize=11.5)
    steps = (
        ("batch of inputs and targets", "", "x, y"),
        ("linearizer", "outputs η at μ⁻ and J = ∂η/∂θ as an operator", "η, J"),
        ("noise and mode", "whitened residual u, factor W with WᵀW = V", "W, u"),
        ("observation", "u = M(θ − μ) + ε,  M = WJ,  ε ~ N(0, I)", "M, u"),
        ("gate", "optional: more noise where ν = uᵀS⁻¹u is large", "M, u"),
        ("GaussianBelief.condition", "μ, P  →  μ⁺, P⁺", "μ⁺, P⁺"),
        ("guard and relinearization", "steps that do not lower the objective are damped", ""),
    )
    for number, (title, text, _passed) in enumerate(steps):
        y = 7.3 - 1.2 * number
        _box(right, 0.2, y, 5.0, 0.85, title, text, "#fdf1e7" if number in (0, 3) else "#eaf2f8")
        if number:
            _arrow(right, (2.7, y + 1.2), (2.7, y + 0.85), steps[number - 1][2])
    _save(figure, "architecture.svg")


def kalman_filter():
    """The posterior predictive of a linear model in sine features after 0, 3 and 30 observations."""
    generator = torch.Generator().manual_seed(4)
    grid = torch.linspace(-3, 3, 200, dtype=torch.float64)
    places = torch.rand(30, generator=generator, dtype=torch.float64) * 4.0 - 2.6
    values = torch.sin(1.7 * places) + 0.15 * torch.randn(30, generator=generator, dtype=torch.float64)

    def features(x):
        centres = torch.linspace(-3, 3, 12, dtype=torch.float64)
        return torch.exp(-0.5 * ((x[:, None] - centres) / 0.55) ** 2)

    model = nn.Linear(12, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    settings = {"covariance": "full", "noise_variance": 0.15**2, "initial_variance": 1.0, "temperature": 1.0}
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(likelihood="gaussian", bound_prior=False, **settings))
    state, seen = kf.init(), 0
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.4), sharey=True)
    for ax, count in zip(axes, (0, 3, 30), strict=True):
        if count > seen:
            state, _ = kf.update(state, features(places[seen:count]), values[seen:count, None])
        seen = count
        predicted = bkf.Posterior(kf, state).predict(features(grid))
        mean, sd = predicted.mean.flatten(), predicted.variance.flatten().sqrt()
        ax.fill_between(grid, mean - 2 * sd, mean + 2 * sd, color=BLUE, alpha=0.2, label="mean ± 2 sd")
        ax.plot(grid, mean, color=BLUE)
        ax.plot(grid, torch.sin(1.7 * grid), color=GREY, linestyle="--", linewidth=1, label="truth")
        ax.plot(places[:count], values[:count], "o", color=ORANGE, markersize=4, label="observations")
        ax.set_title(f"after {count} observations" if count else "prior")
        ax.set_xlabel("x")
    axes[0].set_ylabel("y")
    axes[2].legend(frameon=False, fontsize=8.5, loc="lower right")
    _save(figure, "filter.png")


def covariance():
    """Correlations that each structure holds after the same 60 observations of correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    inputs = shared @ torch.randn(3, 8, generator=generator, dtype=torch.float64)
    inputs = inputs + 0.3 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    targets = torch.tanh(inputs[:, :1]) + 0.1 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.3))
    titles = {"diagonal": "diagonal\nn numbers", "block_diagonal": "block diagonal\nΣ n_b² numbers"}
    titles |= {"low_rank": "low rank (here rank 4)\nn · (rank + 1) numbers", "full": "full\nn² numbers"}
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        settings = {"likelihood": "gaussian", "noise_variance": 0.01, "initial_variance": 1.0, "bound_prior": False}
        kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance=name, rank=4, temperature=1.0, **settings))
        state, _ = kf.update(kf.init(inputs), inputs, targets)
        cov = bkf.Posterior(kf, state).covariance_matrix()
        sd = cov.diagonal().sqrt()
        image = ax.imshow(cov / sd / sd[:, None], cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(title, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.75, label="correlation")
    _save(figure, "covariance.png")


def curvature():
    """Which directions of 20 logits each curvature uses, for one prediction."""
    generator = torch.Generator().manual_seed(3)
    probs = (1.9 * torch.randn(20, generator=generator)).softmax(0).sort(descending=True).values
    label, classes = 3, torch.arange(20)
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.2), sharey=True)
    many = int((probs.cumsum(0) < 0.95).sum()) + 1
    used = {
        "exact: 19 passes": ([BLUE] * 20, "every class but one"),
        f"truncated: {many} passes": (
            [BLUE if c < many or c == label else GREY for c in range(20)],
            "grey: merged into one class",
        ),
        "sampled: 2 passes": ([ORANGE if c == label else GREY for c in range(20)], "label against the rest, one probe"),
    }
    for ax, (title, (colours, text)) in zip(axes, used.items(), strict=True):
        ax.bar(classes, probs, color=colours)
        ax.set_title(title)
        ax.text(0.97, 0.9, text, transform=ax.transAxes, ha="right", fontsize=9)
        ax.set_xlabel("class, by probability")
        ax.set_xticks([])
    axes[0].set_ylabel("probability")
    axes[0].annotate("label", (label, probs[label]), (label + 3, probs[label] + 0.1), arrowprops={"arrowstyle": "->"})
    _save(figure, "curvature.png")


def temperature():
    """Held-out log loss and epistemic entropy of one posterior by temperature, for three prior widths."""
    stream, held_out = uci_digits_split()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.6))
    grid = [10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5)]
    for spread, colour in ((1.0, GREY), (3.0, BLUE), (10.0, ORANGE)):
        config = bkf.KalmanConfig(initial_logit_sd=spread)
        batches = zip(stream.images[:400].split(8), stream.labels[:400].split(8), strict=True)
        fitted = bkf.fit(lora_digits_vit(rank=4), batches, config, progress=False)
        losses, epistemic = [], []
        for factor in grid:
            settings = dataclasses.replace(config, temperature=factor)
            posterior = bkf.Posterior(bkf.KalmanFilter(fitted.adapter, settings), fitted.state)
            predicted = posterior.predict(held_out.images, targets=held_out.labels)
            losses.append(float(-predicted.log_prob.mean()))
            epistemic.append(float(predicted.epistemic.mean()))
        name = f"prior of {spread:g} logit{'s' if spread > 1 else ''}"
        left.plot(grid, losses, "o-", color=colour, markersize=4, label=name)
        right.plot(grid, epistemic, "o-", color=colour, markersize=4, label=name)
        chosen = min(range(len(grid)), key=lambda place: abs(grid[place] / fitted.temperature - 1))
        left.plot(fitted.temperature, losses[chosen], "*", color=colour, markersize=15)
    left.set_ylabel("log loss held out, nats")
    right.set_ylabel("mean epistemic entropy, nats")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xlabel("temperature: factor on P in predictions")
    left.plot([], [], "*", color=DARK, markersize=12, linestyle="none", label="chosen by the stream")
    left.legend(frameon=False, fontsize=9)
    _save(figure, "temperature.png")


def null_band():
    """The ECE of a perfectly calibrated model and of an over-confident one, by the number of examples."""
    generator = torch.Generator().manual_seed(0)
    sizes, bands, over = (50, 100, 200, 500, 1000, 2000, 5000, 10000), [], []
    for size in sizes:
        logits = 1.5 * torch.randn(size, 4, generator=generator)
        probs = logits.softmax(-1)
        bands.append(ev.calibration_null(probs, "ece"))
        errors = []
        for _ in range(30):
            drawn = torch.multinomial(probs, 1, generator=generator).squeeze(1)
            errors.append(float(ev.expected_calibration_error((1.3 * logits).softmax(-1), drawn)))
        over.append(sum(errors) / len(errors))
    figure, ax = plt.subplots(figsize=(7.5, 3.8))
    lows, highs = [band.low for band in bands], [band.high for band in bands]
    ax.fill_between(sizes, lows, highs, color=BLUE, alpha=0.2, label="null band: perfectly calibrated, 95 %")
    ax.plot(sizes, [band.mean for band in bands], color=BLUE, label="mean of a perfectly calibrated model")
    ax.plot(sizes, over, "o-", color=ORANGE, markersize=4, label="logits times 1.3: over-confident (mean)")
    ax.set_xscale("log")
    ax.set_xlabel("examples")
    ax.set_ylabel("ECE, 15 bins")
    ax.set_ylim(0, None)
    ax.legend(frameon=False, fontsize=9)
    _save(figure, "null_band.png")


FIGURES = (architecture, kalman_filter, covariance, curvature, temperature, null_band)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for draw in FIGURES:
        if not sys.argv[1:] or draw.__name__ in sys.argv[1:]:
            draw()
