"""A pass that is killed at random moments, also while it writes, and resumed: no example is lost or counted twice.

A process learns a stream with ``fit(checkpoint=..., every=1)``, so that it writes most of the time. It is killed
(SIGKILL) after a random time, its folder is opened, and another process resumes. At the end the posterior is compared,
bit for bit, with that of a pass that was never stopped, and the folder must contain no temporary files.

    python -m benchmarks.reliability.kills.one_process          # 200 kills, about three minutes; results/kills.md
    python -m benchmarks.reliability.kills.one_process --kills 20
"""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import bayes_kf as bkf
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table

CONFIG = bkf.KalmanConfig(rank=8, forgetting=0.999)
SIZE = 4
OURS = ("README.md", "SHA256SUMS", "kalman_config.json", "kalman_state.safetensors", "model.safetensors")


def network() -> nn.Module:
    """The model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))


def stream(length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(length * SIZE, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 5, generator=generator)).argmax(1)
    return list(zip(inputs.split(SIZE), labels.split(SIZE), strict=True))


def learn(folder: str, length: int) -> None:
    """The pass, resumed from its checkpoint."""
    torch.set_num_threads(1)
    bkf.fit(network(), stream(length), CONFIG, checkpoint=folder, every=1, progress=False)


def run(kills: int, length: int, folder: Path, seed: int = 0, longest: float = 0.6) -> dict[str, int | float | bool]:
    """Counts and checks over ``kills`` killed processes.

    Args:
        kills: number of kills.
        length: batches of the pass; a pass that ends before the last kill is started again.
        folder: for the checkpoints.
        seed: of the moments of the kills.
        longest: seconds that a process may run.
    """
    moments, context = random.Random(seed), get_context("forkserver")  # noqa: S311
    set_forkserver_preload(["bayes_kf", "peft", "transformers.modeling_utils"])
    opened = steps = passes = partial = new = 0
    whole = bkf.fit(network(), stream(length), CONFIG, progress=False)
    equal = True
    while opened < kills:
        worker = context.Process(target=learn, args=(str(folder), length))
        worker.start()
        worker.join(moments.uniform(0.02, longest))
        alive = worker.is_alive()
        if alive:
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()
        if not (folder / "kalman_state.safetensors").is_file():
            new += alive  # killed before there was a checkpoint
            continue
        opened += alive
        partial += any(path.name.startswith(".bayes_kf-") for path in folder.iterdir())
        (folder / "notes").touch()  # a user's file
        resumed = bkf.Posterior.from_pretrained(folder, network())
        if resumed.state.step < steps:
            raise AssertionError(f"went back from update {steps} to {resumed.state.step}")
        steps = resumed.state.step
        if steps == length:
            equal &= all(torch.equal(a, b) for a, b in zip(resumed.state.belief, whole.state.belief, strict=True))
            equal &= torch.equal(resumed.history["log_loss"], whole.history["log_loss"])
            passes, steps = passes + 1, 0
            folder.rename(folder.with_name(f"pass-{passes}"))
    resumed = bkf.fit(network(), stream(length), CONFIG, checkpoint=folder, progress=False)  # the rest, without kills
    equal &= all(torch.equal(a, b) for a, b in zip(resumed.state.belief, whole.state.belief, strict=True))
    equal &= torch.equal(resumed.history["log_loss"], whole.history["log_loss"])
    left = sorted(path.name for path in folder.iterdir() if path.name not in OURS)
    if left not in ([], ["notes"]):
        raise AssertionError(f"{left} was left")
    return {
        "kills": opened,
        "killed_while_writing": partial,
        "killed_before_a_checkpoint": new,
        "whole_passes": passes + 1,
        "equal_to_the_bit": equal,
    }


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--kills", type=int, default=200, help="number of kills (%(default)s)")
    args = command.option("--length", type=int, default=400, help="batches of a pass (%(default)s)").parse()
    file, begun = ResultFile("kills"), time.perf_counter()
    file.begin()
    with TemporaryDirectory() as folder:
        counts = run(args.kills, args.length, Path(folder) / "pass")
    file.put(str(args.kills), counts | {"seconds": time.perf_counter() - begun})
    rows = [[name.replace("_", " "), str(value)] for name, value in counts.items()]
    text = "Every folder opened, none behind the one before; whole passes were compared with one never stopped."
    file.write_markdown("Killed at random moments", [*markdown_table(["", "seen"], rows), "", text])
    print(counts)


if __name__ == "__main__":
    main()
