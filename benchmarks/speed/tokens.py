"""Cost and memory of a step on the tokens of a language model, in AdamW steps on the same batch.

The model is SmolLM2-135M-Instruct (30 layers, hidden 576, a vocabulary of 49,152; its packages as for
``language.run``), with LoRA of rank 8 on queries and values. It learns Python's own documentation, every token. Rounds
run every method once; the table has the medians of the rounds' ratios. Memory is the peak of a warm step above the
memory before it, in a process of its own (Linux). The cells go into ``results/speed.json``, the table is a section of
``results/speed.md``.

    python -m benchmarks.speed.tokens --batches 1 4
    python -m benchmarks.speed.run --table
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.defaults.default_likelihood import as_text
from bayes_kf.models.batch import split_batch
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile
from benchmarks.common.smollm2 import smollm2
from benchmarks.common.subprocesses import MIB, held, peak, run_in_process

TOKENS, ROUNDS = 128, 5
CPU = torch.device("cpu")
Batch = dict[str, Tensor]
Step = Callable[[Batch], None]


def language_model() -> nn.Module:
    """SmolLM2 with LoRA."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return get_peft_model(smollm2()[1], lora).eval()


@functools.cache
def text() -> Tensor:
    """Tokens of Python's documentation."""
    tokenizer, _ = smollm2()
    return torch.tensor(
        tokenizer("".join(topics.topics[name] for name in sorted(topics.topics))[:200_000])["input_ids"]
    )


def batch(size: int, seed: int) -> Batch:
    """Sequences of text, all learned."""
    starts = torch.randint(len(text()) - TOKENS, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = torch.stack([text()[start : start + TOKENS] for start in starts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def adamw(model: nn.Module) -> Step:
    """A step of AdamW with the model's own loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(given: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**given).loss.backward()
        optimizer.step()

    return step


def kalman(covariance: str) -> Callable[[nn.Module], Step]:
    """An update of the filter, with the prior of the default fit of text."""

    def make(model: nn.Module) -> Step:
        config = replace(as_text(bkf.KalmanConfig()), covariance=covariance)
        kf = bkf.KalmanFilter(model, config)
        state = kf.init(split_batch(batch(1, 7))[0])

        def step(given: Batch) -> None:
            nonlocal state
            state = kf.update(state, *split_batch(given))[0]

        return step

    return make


METHODS: Mapping[str, tuple[str, Callable[[nn.Module], Step]]] = {
    "adamw": ("AdamW", adamw),
    "diagonal": ("**ours**, diagonal", kalman("diagonal")),
    "low_rank": ("**ours**, low rank (default)", kalman("low_rank")),
}


def times(size: int) -> dict[str, Any]:
    """Medians of the rounds' ratios to AdamW."""
    warnings.simplefilter("ignore")
    model = language_model()
    steps = {name: make(model) for name, (_, make) in METHODS.items()}
    for step in steps.values():
        step(batch(size, 0))
    spans: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, ROUNDS + 1):
        given = batch(size, number)
        for name, step in steps.items():
            begun = time.perf_counter()
            step(given)
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
    step, given = METHODS[method][1](language_model()), batch(size, 1)
    step(batch(size, 0))
    before = held(CPU, reset=True)
    step(given)
    return {"mib": (peak(CPU) - before) / MIB}


class Large(NamedTuple):
    """The sizes of a language model: parameters, layers, hidden, and width of its keys and values."""

    parameters: float
    layers: int
    hidden: int
    values: int


LARGE = {
    "1 B (Llama 3.2)": Large(1.24e9, 16, 2048, 512),
    "8 B (Llama 3.1)": Large(8.03e9, 32, 4096, 1024),
    "70 B (Llama 3.1)": Large(70.6e9, 80, 8192, 1024),
}
LORA_RANK, BELIEF_RANK, SEEN, FLOPS = (
    8,
    20,
    8 * 1024,
    4e14,
)  # of the model below; tokens of a batch, bf16 operations a second


def predicted() -> list[list[str]]:
    """What large models take, by arithmetic: a row for each of ``LARGE``. Not measured.

    An AdamW step is a forward pass and a backward pass to the activations, 4 N operations a token; an update of the
    filter has a second backward pass and one forward pass to check the step, 8 N. The base is in bf16, 2 N bytes; a
    low-rank belief has 4 n (rank + 2) bytes, AdamW's moments 8 n; logits are read where a token is learned, and the
    activations that backward passes need are those of AdamW.
    """
    rows = []
    for name, sizes in LARGE.items():
        n = sizes.layers * LORA_RANK * (3 * sizes.hidden + sizes.values)  # queries and values
        belief, moments = 4 * n * (BELIEF_RANK + 2), 8 * n
        step = 8 * sizes.parameters * SEEN / FLOPS
        shown = [f"{2 * sizes.parameters / 2**30:.0f}", f"{moments / 2**30:.2f}", f"{belief / 2**30:.2f}"]
        rows.append([name, f"{n / 1e6:.1f} M", *shown, f"{step / 2:.2f}", f"{step:.2f}"])
    return rows


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
