"""The filter on 1 to 4 processes: examples per second, bytes sent and memory of each, and a model of more processes.

The text task: MiniLM with LoRA and a new head on SST-2 (../shared/data or $BAYES_KF_DATA; the encoder comes with the
extra ``bench``). Every process has one thread and its share of a global batch of fixed size. The fastest of several
rounds counts; forms and numbers of processes alternate. The model of `docs/distributed.md` is fitted to it.

    python -m benchmarks.speed.scaling                       # results/scaling.md and .png
    python -m benchmarks.speed.scaling --batch 64 --rounds 5
    python -m benchmarks.speed.scaling --forms shared --processes 1 2
    python -m benchmarks.speed.scaling --table               # the table and the figure from existing results
"""

from __future__ import annotations

import json
import os
import socket
import time
from multiprocessing import set_forkserver_preload
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, multiprocessing, nn

import bayes_kf as bkf
from bayes_kf.distributed import DataParallelFilter, Group, ShardedFilter
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.models.batch import Inputs
from bayes_kf.processes import shared_work
from benchmarks.common.command import Command
from benchmarks.common.data import data_folder
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.common.text import minilm, sentences
from benchmarks.speed.scaling_model import PLACES, WORLDS, step_model


class SharedWork:
    """The filter of ``bkf.fit`` on several processes: each has the whole belief and a part of the passes."""

    def __init__(self, model: nn.Module, config: bkf.KalmanConfig) -> None:
        self.kf, self.group = bkf.KalmanFilter(model, config), Group()
        self.adapter = self.kf.adapter

    def init(self, inputs: Inputs) -> FilterState:
        """The prior."""
        return self.kf.init(inputs)

    def update(self, state: FilterState, inputs: Inputs, targets: Tensor) -> tuple[FilterState, Any]:
        """The state after a batch that every process has."""
        with shared_work.shared(self.group if self.group.size > 1 else None):
            return self.kf.update(state, inputs, targets)


INFORMATION = {"covariance": "diagonal_information", "expansion": "mean"}
FORMS = {
    "sharded": ("sharded, low rank 20 (the default)", ShardedFilter, {}),
    "sharded diagonal": ("sharded, diagonal gain form", ShardedFilter, {"covariance": "diagonal"}),
    "shared": ("shared work, low rank 20 (`bkf.fit`)", SharedWork, {}),
    "data_parallel": ("data parallel, information form", DataParallelFilter, INFORMATION),
}
RANK, TIMED = 8, 6


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--batch", type=int, default=32, help="examples of a global batch (%(default)s)")
    command.numbers("--processes", (1, 2, 3, 4), "numbers of processes")
    command.names("--forms", tuple(FORMS), text="forms")
    args = command.option("--rounds", type=int, default=3, help="rounds (%(default)s)").table().parse()
    file = ResultFile("scaling")
    if not args.table:
        data_folder()  # raises before any process starts if data is missing
        file.begin()
        set_forkserver_preload(["transformers.models.bert.modeling_bert", "peft", "bayes_kf.distributed"])
        for round_ in range(args.rounds):
            for size in args.processes:
                for form in args.forms:
                    cell = measured(form, size, args.batch)
                    key = f"{args.batch}/{form}/{size}"
                    before = file.cells.get(key, {}) if round_ else {}
                    if not before or cell["seconds"] < before["seconds"]:
                        file.put(key, cell)
                    print(f"{key}: {args.batch / cell['seconds']:.1f} examples a second", flush=True)
    file.write_markdown("The filter on several processes", body(file.cells))
    draw(file.cells, file.path.with_suffix(".png"))
    print(f"table in {file.path.with_suffix('.md').name}")


def measured(form: str, size: int, batch: int) -> dict[str, Any]:
    """The largest numbers of any process in one run: seconds of its fastest step, bytes, memory."""
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        multiprocessing.start_processes(
            _process, (form, size, batch, port, folder), nprocs=size, start_method="forkserver"
        )
        cells = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
    best = {name: max(cell[name] for cell in cells) for name in cells[0]}
    return best | {"batch": batch, "processes": size}


def _process(rank: int, form: str, size: int, batch: int, port: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    _, make, settings = FORMS[form]
    kf = make(minilm(0, RANK, 2), bkf.KalmanConfig(**settings))
    stream = sentences("sst2", "train", torch.arange((TIMED + 2) * batch))
    state, seconds, sent = kf.init(stream.first(32).inputs), [], []
    each = -(-batch // size)
    for number in range(TIMED + 2):
        low = number * batch + rank * each
        if form == "shared":
            low, each = number * batch, batch
        mine = stream.at(torch.arange(low, min(low + each, (number + 1) * batch)))
        dist.barrier()
        before, begun = kf.group.bytes_sent, time.perf_counter()
        state, _ = kf.update(state, mine.inputs, mine.labels)
        dist.barrier()
        seconds.append(time.perf_counter() - begun)
        sent.append(kf.group.bytes_sent - before)
    belief = sum(t.numel() * t.element_size() for t in (*state.belief, *state.prior))
    linear = _linearizing(kf, stream.first(-(-batch // size)))
    cell = {
        "seconds": min(seconds[2:]),
        "sent": max(sent[2:]),
        "belief": belief,
        "resident": psutil.Process().memory_info().rss,
        "linearizing": linear,
        "parameters": kf.adapter.num_parameters,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(cell), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _linearizing(kf: Any, some: Any) -> float:
    """Seconds that this process's forward and backward passes take by themselves."""
    mean, seconds = kf.adapter.vector(), []
    for _ in range(3):
        begun = time.perf_counter()
        kf.kf.linearize(mean, some.inputs).softmax_jacobian()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def body(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Body of the Markdown file."""
    lines: list[str] = []
    for batch in sorted({cell["batch"] for cell in cells.values()}):
        rows = []
        for form, (title, _, _) in FORMS.items():
            alone = cells.get(f"{batch}/{form}/1")
            for size in range(1, 65):
                cell = cells.get(f"{batch}/{form}/{size}")
                if cell is None or alone is None:
                    continue
                rows.append(
                    [
                        title,
                        str(size),
                        f"{batch / cell['seconds']:.1f}",
                        f"{alone['seconds'] / cell['seconds']:.2f}",
                        f"{1e3 * cell['linearizing']:.0f}",
                        f"{1e3 * cell['seconds']:.0f}",
                        f"{cell['sent'] / 2**20:.2f}",
                        f"{cell['belief'] / 2**20:.2f}",
                        f"{cell['resident'] / 2**20:,.0f}",
                    ]
                )
        head = ["", "processes", "examples/s", "times one process", "passes, ms", "step, ms", "MiB sent a step"]
        head += ["belief, MiB", "resident, MiB"]
        lines += [f"## A global batch of {batch}", "", *markdown_table(head, rows), ""]
    lines += ["Each process has one thread; sent, belief and resident memory are the most of any process.", ""]
    lines += ["![Speed and what is held and sent](scaling.png)", "", "## What the model says of more", ""]
    rows = []
    for place in PLACES:
        for size in WORLDS:
            step = step_model(place, size)
            shares = {name: seconds / step.total for name, seconds in step.parts.items()}
            most = max(shares, key=lambda name: shares[name])
            numbers = f"{step.sent / 2**20:,.0f}", f"{step.held / 2**30:,.2f}"
            line = f"{step.total * 1e3:,.1f}", f"{most} ({shares[most]:.0%})"
            rows.append([place.name, str(size), *line, *numbers])
    head = ["base, adapter", "GPUs", "step, ms", "most of it", "MiB sent a GPU and step", "belief and rows a GPU, GiB"]
    return [*lines, *markdown_table(head, rows), "", "Not measured: formulas and figures are in `docs/distributed.md`."]


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed relative to one process, and memory of every process."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    batch = max(cell["batch"] for cell in cells.values())
    for (form, (title, _, _)), colour, marker in zip(
        FORMS.items(), ("#0072B2", "#009E73", "#CC79A7", "#D55E00"), "osD^", strict=True
    ):
        by_size = {c["processes"]: c for k, c in cells.items() if k.startswith(f"{batch}/{form}/")}
        sizes = sorted(by_size)
        if 1 not in by_size:
            continue
        left.plot(
            sizes,
            [by_size[1]["seconds"] / by_size[s]["seconds"] for s in sizes],
            marker=marker,
            color=colour,
            label=title,
        )
        right.plot(sizes, [by_size[s]["belief"] / 2**20 for s in sizes], marker=marker, color=colour, label=title)
    left.axhline(1.5, color="0.6", linewidth=1, linestyle=":")
    left.set(
        xlabel="processes (on two cores)", ylabel="examples a second, over one process", xticks=[1, 2, 3, 4], ylim=0
    )
    right.set(xlabel="processes", ylabel="belief and prior a process, MiB", xticks=[1, 2, 3, 4], ylim=0)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
