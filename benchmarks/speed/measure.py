"""Times of interleaved steps, and peak memory in a process of its own, for ``run.py``."""

from __future__ import annotations

import copy
import gc
import math
import re
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from benchmarks.common.subprocesses import MIB, alarmed, held, peak, run_in_process, status
from benchmarks.speed.models import batch, build, to_device, train_head, trainable
from benchmarks.speed.peers import METHODS, Running

MIN_ROUNDS, MAX_ROUNDS = 3, 300
BRIEF = 1.0  # seconds; shorter steps are run once more, untimed, right before they are timed
UNTRAINED = 10_000  # outputs from which the last layer is not trained
START_UP = 20.0  # seconds that a method may take to import and start
STARTING = 10  # times a step's limit for the first batch, which also plans and scales: eight steps' work for exact


class Cell(NamedTuple):
    """A model and the size of its problem; ``rank`` None means the model's default."""

    model: str
    batch: int
    outputs: int
    rank: int | None = None

    @property
    def key(self) -> str:
        """Key in the results file, as ``bert-tiny/B16/m100``."""
        return f"{self.model}/B{self.batch}/m{self.outputs}" + (f"/rank{self.rank}" if self.rank else "")

    @classmethod
    def of(cls, key: str) -> Cell:
        """The cell of a key."""
        model, size, outputs, *rank = key.split("/")
        return cls(model, int(size[1:]), int(outputs[1:]), int(rank[0][4:]) if rank else None)


class Weights:
    """Trained models on disk, trained on first use, so that other processes can load them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def file(self, cell: Cell) -> Path:
        """The file of the trainable tensors of the cell's model, the same for every batch size."""
        path = self.folder / f"{cell.model}-m{cell.outputs}-rank{cell.rank}.safetensors"
        if not path.exists():
            model = build(cell.model, cell.outputs, cell.rank).to(self.device)
            if cell.outputs < UNTRAINED:
                train_head(cell.model, model, cell.outputs, self.device)
            save_file({name: p.detach().contiguous() for name, p in trainable(model).items()}, path)
        return path


def load(cell: Cell, weights: Path, device: torch.device) -> PeftModel:
    """The cell's model with trained weights."""
    model = build(cell.model, cell.outputs, cell.rank)
    model.load_state_dict(load_file(weights), strict=False)
    return model.to(device)


def start(cell: Cell, method: str, model: PeftModel, device: torch.device) -> Running:
    """A method on a copy of the model that shares its frozen tensors, with two batches, one of them measured."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    before, measured = (to_device(batch(cell.model, cell.outputs, cell.batch, seed=seed), device) for seed in (3, 4))
    torch.manual_seed(0)
    own = copy.deepcopy(model, frozen)
    if METHODS[method].eager:
        own.get_base_model().set_attn_implementation("eager")
    return METHODS[method].make(own, before, measured)


def first_step(method: str, running: Running) -> None:
    """Run a step and check that it changed the state.

    Raises:
        AssertionError: if the state did not change or is not finite.
    """
    before = running.state().clone()
    running.step()
    after = running.state()
    assert bool(torch.isfinite(after).all()), f"the state of {method} is not finite after a step"
    assert before.shape != after.shape or not torch.equal(before, after), f"a step of {method} changed nothing"


def time_cell(cell: Cell, methods: list[str], weights: Path, device: torch.device, seconds: float) -> dict[str, Any]:
    """Medians and quartiles of the rounds' ratios to AdamW, and facts of the steps; a round runs every method once.

    Short steps follow an untimed one of the same method, so that they start with their own caches. After the first
    rounds, which include all methods, the short ones continue alone for ``seconds``.
    """
    model = load(cell, weights, device)
    running = {method: start(cell, method, model, device) for method in methods}
    for method, one in running.items():
        first_step(method, one)
    spans = _rounds(running, device, seconds)
    facts = {method: one.facts() for method, one in running.items()}
    numbers = sum(p.numel() for p in trainable(model).values())
    return {
        "rounds": len(spans["adamw"]),
        "trainable": numbers,
        **_summary(spans),
        "facts": {k: v for k, v in facts.items() if v},
    }


def _rounds(running: Mapping[str, Running], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each method's steps, round by round; all methods in the first rounds, then the brief ones."""
    spans: dict[str, list[float]] = {method: [] for method in running}
    brief = {method: one for method, one in running.items() if _span(one.step, device) < BRIEF}
    gc.collect()
    gc.disable()
    end = math.inf
    for number in range(MAX_ROUNDS if "adamw" in brief else MIN_ROUNDS):
        for method, one in (running if number < MIN_ROUNDS else brief).items():
            if method in brief:
                one.step()
            spans[method].append(_span(one.step, device))
        if number + 1 == MIN_ROUNDS:
            end = time.perf_counter() + seconds
        if time.perf_counter() > end:
            break
    gc.enable()
    return spans


def _span(step: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    begun = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(spans: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = {m: [a / b for a, b in zip(taken, spans["adamw"], strict=False)] for m, taken in spans.items()}
    return {
        "milliseconds": {method: 1e3 * statistics.median(taken) for method, taken in spans.items()},
        "ratio": {method: statistics.median(values) for method, values in ratios.items()},
        "quartiles": {method: statistics.quantiles(values, n=4)[::2] for method, values in ratios.items()},
    }


def memory_in_process(cell: Cell, method: str, weights: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The result of :func:`memory_here` in a new process, or the reason that there is none."""
    result = run_in_process(
        memory_here, cell, method, weights, dict(options), threads=options["threads"], exact_memory=True
    )
    if isinstance(result, dict):
        return result
    if alarmed(result):
        return {"skipped": f"a step takes more than {options['cap']:g} s", "larger_too": True}
    reason = f"by {signal.Signals(-result).name}" if result < 0 else f"with {result}"
    return {"skipped": f"ended {reason}", "larger_too": result < 0}


def memory_here(cell: Cell, method: str, weights: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory of a warm step above the memory before it, in MiB, and memory held above that of the bare model.

    Args:
        cell: the model and the size of its problem.
        method: its name.
        weights: file of the trained tensors.
        options: ``device`` (CPU: resident memory, by the kernel's own high-water mark; CUDA: the allocator's), ``cap``
            (seconds that a step may take; SIGALRM ends this process if one takes longer) and ``memory_limit`` (GiB
            that may be allocated, on the CPU).
    """
    device, cap, limit_gib = torch.device(options["device"]), options["cap"], options["memory_limit"]
    warnings.simplefilter("ignore")
    model = load(cell, weights, device)
    bare = held(device)
    if device.type == "cpu":
        most = status("VmSize") + int(limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        signal.setitimer(signal.ITIMER_REAL, START_UP + STARTING * cap)
        running = start(cell, method, model, device)
        first_step(method, running)
        before = held(device, reset=True)
        signal.setitimer(signal.ITIMER_REAL, cap)
        seconds = _span(running.step, device)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Exception as error:  # an error of a peer is its result
        return _reason(error, limit_gib)
    return {"mib": (peak(device) - before) / MIB, "held_mib": (before - bare) / MIB, "seconds": seconds}


def _reason(error: Exception, limit_gib: float) -> dict[str, Any]:
    """The reason that a method could not run, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    asked = re.search(r"allocate (\d+) bytes", text)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or asked or "allocate memory" in text:
        wanted = f", it asked for {int(asked[1]) / 2**30:.2g} GiB at once" if asked else ""
        return {"skipped": f"out of memory at {limit_gib:g} GiB{wanted}", "larger_too": True}
    return {"skipped": f"{type(error).__name__}: {text}"[:200]}
