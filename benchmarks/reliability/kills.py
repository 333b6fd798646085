"""A pass that is killed at random moments, checkpoints included, and goes on: nothing is lost, nothing counts twice.

A process learns a stream with ``fit(checkpoint=..., every=1)``, so that it writes most of the time, and is killed
(SIGKILL) after a random time; the folder is opened; another process goes on. In the end the posterior is compared, bit
for bit, with one of a pass that was never stopped, and nothing that a kill left is in the folder.

    python benchmarks/kills.py                  # 200 kills, about three minutes; results/kills.md
    python benchmarks/kills.py --kills 20
"""

from __future__ import annotations

import argparse
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
from benchmarks.common.result_files import ResultFile, markdown_table

CONFIG = bkf.KalmanConfig(rank=8, forgetting=0.999)
SIZE = 4
OURS = ("README.md", "SHA256SUMS", "kalman_config.json", "kalman_state.safetensors", "model.safetensors")


def network() -> nn.Module:
    """What learns."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))


def stream(length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same batches every time."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(length * SIZE, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 5, generator=generator)).argmax(1)
    return list(zip(inputs.split(SIZE), labels.split(SIZE), strict=True))


def learn(folder: str, length: int) -> None:
    """The pass, from where it was."""
    torch.set_num_threads(1)
    bkf.fit(network(), stream(length), CONFIG, checkpoint=folder, every=1, progress=False)


def run(kills: int, length: int, folder: Path, seed: int = 0, longest: float = 0.6) -> dict[str, int | float | bool]:
    """Kill, open, go on; what was seen.

    Args:
        kills: how often.
        length: batches of the pass; it starts anew where it comes to its end before the last kill.
        folder: for the checkpoints.
        seed: of the moments.
        longest: seconds that a process lives at most.
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
        (folder / "notes").touch()  # of somebody else
        found = bkf.Posterior.from_pretrained(folder, network())
        if found.state.step < steps:
            raise AssertionError(f"went back from update {steps} to {found.state.step}")
        steps = found.state.step
        if steps == length:
            equal &= all(torch.equal(a, b) for a, b in zip(found.state.belief, whole.state.belief, strict=True))
            equal &= torch.equal(found.history["log_loss"], whole.history["log_loss"])
            passes, steps = passes + 1, 0
            folder.rename(folder.with_name(f"pass-{passes}"))
    found = bkf.fit(network(), stream(length), CONFIG, checkpoint=folder, progress=False)  # the rest, in peace
    equal &= all(torch.equal(a, b) for a, b in zip(found.state.belief, whole.state.belief, strict=True))
    equal &= torch.equal(found.history["log_loss"], whole.history["log_loss"])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--length", type=int, default=400, help="batches of a pass (default: %(default)s)")
    args = parser.parse_args()
    file, begun = ResultFile("kills"), time.perf_counter()
    file.begin()
    with TemporaryDirectory() as folder:
        found = run(args.kills, args.length, Path(folder) / "pass")
    file.put(str(args.kills), found | {"seconds": time.perf_counter() - begun})
    rows = [[name.replace("_", " "), str(value)] for name, value in found.items()]
    text = "Every folder opened, none behind the one before; whole passes were compared with one never stopped."
    file.write_markdown("Killed at random moments", [*markdown_table(["", "seen"], rows), "", text])
    print(found)


if __name__ == "__main__":
    main()
