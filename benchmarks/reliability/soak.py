"""A million updates: the covariance stays positive definite, the innovations consistent, and memory constant.

A linear model learns y = xᵀθ + noise, one example at a time. θ is a random walk with the variance that the filter is
configured with, so that the exact filter's squared innovations are χ² with one degree of freedom at every step. Some
inputs are duplicates, zeros, very large or very small. Every thousand updates the covariance must be finite, symmetric
and positive definite.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.soak                # about an hour; results/soak.md
    OMP_NUM_THREADS=1 python -m benchmarks.reliability.soak --scale 0.01   # a hundredth of the updates
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn
from tqdm.auto import tqdm

import bayes_kf as bkf
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table

PARAMETERS, NOISE, WALK, WINDOW = 6, 0.25, 1e-4, 1000
STEPS = {
    "full": 1_000_000,
    "low_rank": 50_000,
    "block_diagonal": 20_000,
    "diagonal": 20_000,
    "diagonal_information": 20_000,
    "diagonal_mixed": 20_000,
}
EXACT = ("full", "low_rank", "block_diagonal")  # the model is one block, and the rank is its size


def inputs(generator: torch.Generator, before: torch.Tensor) -> torch.Tensor:
    """One input, (1, n), in most cases standard normal."""
    x = torch.randn(1, PARAMETERS, generator=generator, dtype=torch.float64)
    kind = int(torch.randint(100, (), generator=generator))
    return {0: before, 1: torch.zeros_like(x), 2: 1e4 * x, 3: 1e-4 * x, 4: torch.ones_like(x)}.get(kind, x)


def run(covariance: str, steps: int, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Extremes of the covariance, innovations and memory over ``steps`` updates.

    Raises:
        AssertionError: if the covariance is not finite and positive definite.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(PARAMETERS, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    config = bkf.KalmanConfig(
        likelihood="gaussian",
        covariance=covariance,
        rank=PARAMETERS,
        noise_variance=NOISE,
        initial_variance=1.0,
        drift_variance=WALK,
        seed=seed,
    )
    kf = bkf.KalmanFilter(model, config)
    state, theta = kf.init(), torch.randn(PARAMETERS, generator=generator, dtype=torch.float64)
    x = torch.ones(1, PARAMETERS, dtype=torch.float64)
    squares: list[float] = []  # of the present window; no list here may grow with every update
    sums: list[float] = []
    memory: list[float] = []
    seen = {"least_variance": math.inf, "largest_variance": 0.0, "asymmetry": 0.0, "least_eigenvalue": math.inf}
    for step in tqdm(range(steps), desc=covariance, disable=not progress, mininterval=5):
        theta = theta + WALK**0.5 * torch.randn(PARAMETERS, generator=generator, dtype=torch.float64)
        x = inputs(generator, x)
        y = x @ theta.unsqueeze(1) + NOISE**0.5 * torch.randn(1, 1, generator=generator, dtype=torch.float64)
        state, info = kf.update(state, x, y)
        squares.append(float(info.innovation))
        if step % WINDOW == WINDOW - 1:
            sums.append(math.fsum(squares))
            squares.clear()
            cov = state.belief.covariance_matrix()
            assert bool(torch.isfinite(cov).all()), f"{covariance} is not finite after {step + 1} updates"
            variance, values = cov.diagonal(), torch.linalg.eigvalsh(cov)
            assert float(values.min()) > 0, f"{covariance} is not positive after {step + 1} updates"
            seen["least_variance"] = min(seen["least_variance"], float(variance.min()))
            seen["largest_variance"] = max(seen["largest_variance"], float(variance.max()))
            seen["asymmetry"] = max(seen["asymmetry"], float((cov - cov.T).abs().max() / variance.max()))
            seen["least_eigenvalue"] = min(seen["least_eigenvalue"], float(values.min()))
            memory.append(resident())
    low, high = stats.chi2.ppf((0.005, 0.995), WINDOW)
    return seen | {
        "steps": steps,
        "innovations": math.fsum([*sums, *squares]) / steps,
        "band_low": stats.chi2.ppf(0.005, steps) / steps,
        "band_high": stats.chi2.ppf(0.995, steps) / steps,
        "windows": len(sums),
        "windows_outside": sum(not low <= total <= high for total in sums),
        "mib_after_a_tenth": memory[len(memory) // 10],
        "mib_in_the_end": memory[-1],
    }


def resident() -> float:
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--scale", type=float, default=1.0, help="factor on the updates (%(default)s)")
    args = command.names("--structures", STEPS, text="covariance structures").parse()
    file = ResultFile("soak")
    file.begin()
    for covariance in args.structures:
        file.put(covariance, run(covariance, max(10 * WINDOW, int(args.scale * STEPS[covariance]))))
    rows = [
        [
            name,
            f"{c['steps']:,}",
            f"{c['innovations']:.4f} ({c['band_low']:.4f} to {c['band_high']:.4f})",
            f"{c['windows_outside']} of {c['windows']}",
            f"{c['least_variance']:.2g} to {c['largest_variance']:.2g}",
            f"{c['least_eigenvalue']:.2g}",
            f"{c['asymmetry']:.1g}",
            f"{c['mib_after_a_tenth']:.0f}, {c['mib_in_the_end']:.0f}",
        ]
        for name, c in ((name, file.cells[name]) for name in STEPS if name in file.cells)
    ]
    header = [
        "covariance",
        "updates",
        "mean squared innovation (99 % band)",
        "windows of 1,000 outside their 99 % band",
        "variances",
        "least eigenvalue",
        "asymmetry",
        "MiB after a tenth, in the end",
    ]
    text = (
        f"Exact here: {', '.join(EXACT)}, which should lie in the band, with one window of a hundred outside its own. "
        "The diagonal forms are approximations, whose innovations need not."
    )
    print(file.write_markdown("A million updates", [*markdown_table(header, rows), "", text]))


if __name__ == "__main__":
    main()
