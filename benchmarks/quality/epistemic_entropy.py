"""Epistemic entropy against Hamiltonian Monte Carlo, where it converges: three small classifiers under known priors.

Softmax regression on four features, a two-layer network on two, and a small random transformer with LoRA of rank 1 on
sequences of four tokens; 150 examples of three classes each. The filter, its passes of the mean, and the chains of HMC
share prior and likelihood. Columns: the filter's own covariance, that of ``covariance_pass`` at the final mean, and
that one at the size which 56 held-out examples choose. Where chains have not converged, with an R̂ of a parameter above
1.05, HMC's column shows it.

    python -m benchmarks.quality.epistemic_entropy             # everything; a stopped run continues
    python -m benchmarks.quality.epistemic_entropy --table     # the table from existing results
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes.covariance_pass import covariance_pass
from bayes_kf.inference.heldout.covariance_size import choose_size, with_size
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile, markdown_table

FITTED, HELDOUT = slice(0, 150), slice(150, 206)
TEST = slice(500, 1000)
BATCHES = (1, 16, 64)
LEAPFROGS, THINNING = 20, 4
MOST_RHAT = 1.05  # of chains that count as converged
DRAWS = 256


class Problem(NamedTuple):
    """A model, data (1000, d) and labels, and the outputs (K, N, 3) of parameter vectors (K, n)."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    outputs: Callable[[Tensor, Tensor], Tensor]
    chains: int = 32
    steps: int = 600  # of each chain; as many before them are warm-up
    logit_sd: float = 3.0  # of the prior


def regression(seed: int) -> Problem:
    """Softmax regression with labels from such a model."""
    torch.manual_seed(seed)
    model, generator = nn.Linear(4, 3), torch.Generator().manual_seed(seed)
    inputs = torch.randn(1000, 4, generator=generator)
    logits = inputs @ torch.randn(4, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)

    def outputs(theta: Tensor, given: Tensor) -> Tensor:
        return torch.einsum("nd,kcd->knc", given, theta[:, :12].view(-1, 3, 4)) + theta[:, 12:].unsqueeze(1)

    return Problem(model, inputs, labels, outputs)


def network(seed: int) -> Problem:
    """A two-layer network on labels that depend on angle and radius."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 3))
    generator = torch.Generator().manual_seed(seed)
    inputs = 1.5 * torch.randn(1000, 2, generator=generator)
    radius, angle = inputs.norm(dim=1), torch.atan2(inputs[:, 1], inputs[:, 0])
    logits = torch.stack([2 * torch.sin(2 * angle), 2 * (radius - 1.5), torch.zeros_like(radius)], 1)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)

    def outputs(theta: Tensor, given: Tensor) -> Tensor:
        first, bias = theta[:, :24].view(-1, 12, 2), theta[:, 24:36].unsqueeze(1)
        hidden = torch.tanh(torch.einsum("nd,khd->knh", given, first) + bias)
        return torch.einsum("knh,kch->knc", hidden, theta[:, 36:72].view(-1, 3, 12)) + theta[:, 72:].unsqueeze(1)

    return Problem(model, inputs, labels, outputs)


def transformer(seed: int) -> Problem:
    """A random transformer with LoRA on queries and values, and labels from such a model with other LoRA weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=12, max_position_embeddings=4, num_labels=3, initializer_range=0.4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager", **sizes,
    )  # fmt: skip
    lora = LoraConfig(r=1, lora_alpha=1, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapter = bkf.AdapterModel(get_peft_model(BertForSequenceClassification(config).eval(), lora))
    one = torch.func.vmap(lambda theta, given: adapter.call(adapter.tensors(theta), given), (0, None), chunk_size=40)

    def outputs(theta: Tensor, given: Tensor) -> Tensor:
        with adapter.eval_mode():
            return one(theta, given)

    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(12, (1000, 4), generator=generator)
    true = adapter.vector() + 0.7 * torch.randn(1, adapter.num_parameters, generator=generator)
    with torch.no_grad():
        logits = outputs(true, inputs)[0]
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return Problem(adapter.model, inputs, labels, outputs, chains=8, steps=300, logit_sd=1.0)  # a wider prior: R̂ of 1.3


PROBLEMS = {"softmax regression": regression, "two-layer network": network, "transformer with LoRA": transformer}


def measure(name: str, seed: int) -> dict[str, Any]:
    """Epistemic entropies (mean over test examples, nats) and log losses of one data set."""
    warnings.simplefilter("ignore")
    problem = PROBLEMS[name](seed)
    cell: dict[str, Any] = {}
    for batch in BATCHES:
        posterior = fitted(problem, batch)
        if not cell:
            cell["hmc"] = hmc(problem, posterior)
        state = covariance_pass(posterior.kf, posterior.state, batches(problem, FITTED, batch))
        at_mean = bkf.Posterior(posterior.kf, state)
        size = choose_size(at_mean, batches(problem, HELDOUT, 28))
        cell[str(batch)] = {
            "filter": scores(posterior, problem),
            "at_mean": scores(at_mean, problem),
            "sized": scores(with_size(at_mean, size.value), problem) | {"size": size.value},
        }
    return cell


def fitted(problem: Problem, batch: int) -> bkf.Posterior:
    """The filter's posterior after three passes of the mean."""
    config = bkf.KalmanConfig(
        rank=60, mean_passes=3, temperature=1.0, initial_spread="tensors", initial_logit_sd=problem.logit_sd
    )
    return bkf.fit(problem.model, batches(problem, FITTED, batch), config, progress=False)


def batches(problem: Problem, part: slice, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of a part of the data."""
    starts = range(part.start, part.stop, size)
    pieces = [slice(start, min(start + size, part.stop)) for start in starts]
    return [(problem.inputs[piece], problem.labels[piece]) for piece in pieces]


def scores(posterior: bkf.Posterior, problem: Problem) -> dict[str, float]:
    """Mean epistemic entropy and log loss on the test examples."""
    prediction = posterior.predict(problem.inputs[TEST], num_samples=DRAWS, targets=problem.labels[TEST])
    assert prediction.epistemic is not None  # a classifier
    assert prediction.log_prob is not None  # targets are given
    return {"epistemic": float(prediction.epistemic.mean()), "nll": -float(prediction.log_prob.mean())}


def hmc(problem: Problem, posterior: bkf.Posterior) -> dict[str, float]:
    """The same scores by HMC under the filter's prior, with the largest and the median R̂ of a parameter."""
    prior, labels = posterior.state.prior, problem.labels[FITTED]

    def log_density(theta: Tensor) -> Tensor:
        log_probs = problem.outputs(theta, problem.inputs[FITTED]).log_softmax(-1)
        likelihood = log_probs.gather(-1, labels.expand(len(theta), -1).unsqueeze(-1)).squeeze(-1).sum(1)
        return likelihood - 0.5 * ((theta - prior.mean).square() / prior.variance).sum(1)

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(problem.chains, len(prior.mean), generator=generator)
    start = prior.mean + 0.3 * prior.variance.sqrt() * normal
    scale = posterior.variance_vector.sqrt()
    draws = chains(log_density, start, scale, problem.steps, generator)  # (chains, draws, n)
    within, means = draws.var(1).mean(0), draws.mean(1)
    rhat = (1.0 - 1.0 / draws.shape[1] + means.var(0) / within).sqrt()
    probs = problem.outputs(draws.flatten(0, 1)[::8], problem.inputs[TEST]).softmax(-1)
    mean = probs.mean(0)
    total, aleatoric = torch.special.entr(mean).sum(-1), torch.special.entr(probs).sum(-1).mean(0)
    nll = -mean.gather(1, problem.labels[TEST][:, None]).log().mean()
    return {
        "epistemic": float((total - aleatoric).mean()),
        "nll": float(nll),
        "largest_rhat": float(rhat.max()),
        "median_rhat": float(rhat.median()),
    }


def chains(
    log_density: Callable[[Tensor], Tensor], start: Tensor, scale: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Draws of all chains in the steps after the warm-up, which adapts the step size to an acceptance of 0.8."""

    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = log_density(x)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    def normal() -> Tensor:
        return torch.randn(start.shape, generator=generator)

    x, step, kept = start, 0.3 / start.shape[1] ** 0.25, list[Tensor]()
    value, slope = gradient(x)
    for number in range(2 * steps):
        momentum, new, new_slope, new_value = normal(), x, slope, value
        energy = value - 0.5 * momentum.square().sum(1)
        length = step * (0.8 + 0.4 * torch.rand(len(start), 1, generator=generator))
        for _ in range(LEAPFROGS):
            momentum = momentum + 0.5 * length * scale * new_slope
            new = new + length * scale * momentum
            new_value, new_slope = gradient(new)
            momentum = momentum + 0.5 * length * scale * new_slope
        accepted = (new_value - 0.5 * momentum.square().sum(1) - energy).exp().clamp_max(1.0).nan_to_num(0.0)
        moves = torch.rand(len(start), generator=generator) < accepted
        x = torch.where(moves[:, None], new, x)
        value, slope = torch.where(moves, new_value, value), torch.where(moves[:, None], new_slope, slope)
        if number < steps:
            step *= float(torch.exp(0.1 * (accepted.mean() - 0.8)))
        elif number % THINNING == 0:
            kept.append(x)
    return torch.stack(kept, 1)


def render(cells: dict[str, Any]) -> list[str]:
    """The table: a line for each data set and batch size."""
    header = ["data", "seed", "batch", "HMC", "filter", "at the mean", "with the size", "size", "NLL: HMC", *NLL]
    lines = []
    for key, cell in cells.items():
        name, _, seed = key.rpartition("/")
        for batch in BATCHES:
            ours = cell[str(batch)]
            numbers = [cell["hmc"]["epistemic"], *(ours[kind]["epistemic"] for kind in ("filter", "at_mean", "sized"))]
            losses = [cell["hmc"]["nll"], *(ours[kind]["nll"] for kind in ("filter", "at_mean", "sized"))]
            shown = [f"{number:.3f}" for number in numbers]
            if cell["hmc"]["largest_rhat"] > MOST_RHAT:
                shown[0] += f" (R̂ {cell['hmc']['largest_rhat']:.2f})"
            lines.append(
                [name, seed, str(batch), *shown, f"{ours['sized']['size']:.2g}", *(f"{loss:.3f}" for loss in losses)]
            )
    converged = sum(cell["hmc"]["largest_rhat"] <= MOST_RHAT for cell in cells.values())
    ranges = []
    for kind in ("filter", "at_mean", "sized"):
        pairs = [(cell[str(batch)][kind], cell["hmc"]) for cell in cells.values() for batch in BATCHES]
        ratios = [ours["epistemic"] / exact["epistemic"] for ours, exact in pairs]
        ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
    note = (
        "Mean epistemic entropy in nats, and log loss, of 500 test examples under one prior and 150 training examples. "
        f"Ratio to HMC: the filter's covariance {ranges[0]}, at the final mean {ranges[1]}, with the size that 56 "
        f"held-out examples chose {ranges[2]}. The R̂ of all parameters is at most {MOST_RHAT} in {converged} of "
        f"{len(cells)} data sets; the column of HMC shows the largest R̂ of the others."
    )
    return [note, "", *markdown_table(header, lines)]


NLL = ("filter", "at the mean", "with the size")


def main() -> None:
    """The command line."""
    args = Command(__doc__).seeds(4).redo().table().parse()
    file = ResultFile("epistemic_entropy")
    if not args.table:
        work = {f"{name}/{seed}": partial(measure, name, seed) for name in PROBLEMS for seed in args.seeds}
        run_cells(file, work, args.redo, show, lambda key, measured: False)
    print(file.write_markdown("Epistemic entropy against HMC", render(file.cells)))


def show(measured: dict[str, Any]) -> str:
    """A measured cell in one line."""
    ours = [f"{measured[str(batch)]['sized']['epistemic']:.3f}" for batch in BATCHES]
    return f"HMC {measured['hmc']['epistemic']:.3f}, ours {', '.join(ours)}"


if __name__ == "__main__":
    main()
