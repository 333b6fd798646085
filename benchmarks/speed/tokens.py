"""Cost and memory of a step on the tokens of a language model, in AdamW steps on the same batch.

The model has SmolLM2-135M's sizes (30 layers, hidden 576, a vocabulary of 49,152) and random weights, with LoRA of rank
8 on queries and values; every token of the batch is learned. Rounds run every method once; the table has the medians of
the rounds' ratios. Memory is the peak of a warm step above the memory before it, in a process of its own (Linux). The
cells go into ``results/speed.json``, the table is a section of ``results/speed.md``.

    python -m benchmarks.speed.tokens --batches 1 4
    python -m benchmarks.speed.run --table
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bayes_kf as bkf
from bayes_kf.models.batch import split_batch
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile
from benchmarks.common.subprocesses import MIB, held, peak, run_in_process

TOKENS, ROUNDS = 128, 5
CPU = torch.device("cpu")
Batch = dict[str, Tensor]


def language_model() -> nn.Module:
    """A causal language model of SmolLM2-135M's sizes, with LoRA."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora).eval()


def batch(size: int, seed: int) -> Batch:
    """Random tokens, all learned."""
    ids = torch.randint(49_152, (size, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def adamw(model: nn.Module, given: Batch) -> Callable[[], None]:
    """A step of AdamW with the model's own loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**given).loss.backward()
        optimizer.step()

    return step


def kalman(covariance: str) -> Callable[[nn.Module, Batch], Callable[[], None]]:
    """An update of the filter."""

    def make(model: nn.Module, given: Batch) -> Callable[[], None]:
        config = bkf.KalmanConfig(likelihood="tokens", curvature="sampled", covariance=covariance)
        kf = bkf.KalmanFilter(model, config)
        state = kf.init(split_batch(batch(1, 7))[0])

        def step() -> None:
            nonlocal state
            state = kf.update(state, *split_batch(given))[0]

        return step

    return make


METHODS: Mapping[str, tuple[str, Callable[[nn.Module, Batch], Callable[[], None]]]] = {
    "adamw": ("AdamW", adamw),
    "diagonal": ("**ours**, diagonal", kalman("diagonal")),
    "low_rank": ("**ours**, low rank (default)", kalman("low_rank")),
}


def times(size: int) -> dict[str, Any]:
    """Medians of the rounds' ratios to AdamW."""
    warnings.simplefilter("ignore")
    model, given = language_model(), batch(size, 1)
    steps = {name: make(model, given) for name, (_, make) in METHODS.items()}
    for step in steps.values():
        step()
    spans: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            spans[name].append(time.perf_counter() - begun)
    ratios = {name: [a / b for a, b in zip(taken, spans["adamw"], strict=True)] for name, taken in spans.items()}
    return {
        "rounds": ROUNDS,
        "milliseconds": {name: 1e3 * statistics.median(taken) for name, taken in spans.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
    }


def memory(size: int, method: str) -> dict[str, Any]:
    """Peak of a warm step above the memory before it, in MiB."""
    warnings.simplefilter("ignore")
    step = METHODS[method][1](language_model(), batch(size, 1))
    step()
    before = held(CPU, reset=True)
    step()
    return {"mib": (peak(CPU) - before) / MIB}


def key(size: int, what: str) -> str:
    """The key of a cell."""
    return f"text/B{size}/T{TOKENS}/{what}"


def measured(size: int, method: str, threads: int) -> dict[str, Any]:
    """:func:`memory` in a process of its own."""
    result = run_in_process(memory, size, method, threads=threads, exact_memory=True)
    return result if isinstance(result, dict) else {"skipped": f"ended with {result}"}


def main() -> None:
    """The command line."""
    command = Command(__doc__, threads=1).numbers("--batches", (1, 4), "sequences of a batch").redo()
    args = command.parse()
    file = ResultFile("speed")
    work = {key(size, "time"): partial(times, size) for size in args.batches}
    for size in args.batches:
        for method in METHODS:
            work[key(size, f"memory/{method}")] = partial(measured, size, method, args.threads)
    run_cells(file, work, args.redo, show)


def show(cell: dict[str, Any]) -> str:
    """A measured cell in one line."""
    if "ratio" in cell:
        return "  ".join(f"{name} {ratio:.2f}" for name, ratio in cell["ratio"].items())
    return cell.get("skipped") or f"{cell['mib']:.0f} MiB"


if __name__ == "__main__":
    main()
