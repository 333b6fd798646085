"""A fit on several processes of which one is killed at random moments; ``torchrun`` starts them again, and they resume.

The processes share a pass with ``fit(checkpoint=..., every=1)``. One of them is killed (SIGKILL) after a random time,
``torchrun --max-restarts`` stops the others and starts all again, and the pass goes on from the last checkpoint. Every
checkpoint must open, none behind the one before; whole passes are compared, bit for bit, with one that was never
killed, and with one process. What the other processes said is counted.

    python -m benchmarks.reliability.kills.several_processes    # 100 kills, about ten minutes; process_kills.md
    python -m benchmarks.reliability.kills.several_processes --kills 5 --processes 3
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import bayes_kf as bkf
from bayes_kf.inference.saving.file_names import STATE_FILE
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.reliability.kills.one_process import CONFIG, network, stream

RESTARTS = 10_000
STARTED = "started-{rank}-{restarts}"  # a file of each process, with its number, once all are connected
LATEST_STEP = 60.0  # seconds without a new process, after which something hangs


def learn(folder: Path, length: int) -> None:
    """The pass in one of the processes, resumed from its checkpoint."""
    torch.set_num_threads(1)
    rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    mark = folder / STARTED.format(rank=rank, restarts=restarts)

    class Marked(list):  # type: ignore[type-arg]
        """Batches whose first one is read once the processes are connected."""

        def __iter__(self) -> Iterator[Any]:
            mark.with_suffix(".new").write_text(str(os.getpid()))
            mark.with_suffix(".new").rename(mark)
            return super().__iter__()

    try:
        bkf.fit(network(), Marked(stream(length)), CONFIG, checkpoint=folder / "pass", every=1, progress=False)
    except Exception as error:
        with (folder / "said").open("a") as said:
            said.write(f"{type(error).__name__}\n")
        raise


def launch(folder: Path, length: int, processes: int) -> subprocess.Popen[bytes]:
    """The processes, of which a failure starts all again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [
        f"--max-restarts={RESTARTS}",
        "-m",
        "benchmarks.reliability.kills.several_processes",
        "--learn",
        str(folder),
    ]
    with (folder / "output").open("ab") as output:
        return subprocess.Popen([*command, "--length", str(length)], stdout=output, stderr=output)  # noqa: S603 (our own)


def run(kills: int, length: int, processes: int, folder: Path, seed: int = 0, longest: float = 2.0) -> dict[str, Any]:
    """Counts and checks over ``kills`` kills.

    Args:
        kills: number of kills.
        length: batches of the pass; a pass that ends before the last kill is started again.
        processes: number of them.
        folder: for checkpoints and marks.
        seed: of the moments of the kills, and of who is killed.
        longest: seconds after all processes have started until one is killed.

    Raises:
        AssertionError: if the processes hang, or a checkpoint is behind the one before.
    """
    choice = random.Random(seed)  # noqa: S311
    killed = passes = early = partial = 0
    endings: list[bkf.Posterior] = []
    while killed < kills or not endings:
        own = folder / f"run-{passes}"
        own.mkdir()
        launched, restarts, step = launch(own, length, processes), 0, 0
        try:
            while True:
                pids = _started(own, restarts, processes, launched)
                if pids is None:
                    break  # the pass has ended
                time.sleep(choice.uniform(0.0, longest))
                if killed == kills:  # the rest without kills
                    launched.wait(600)
                    break
                if launched.poll() is not None:
                    break
                os.kill(choice.choice(pids), signal.SIGKILL)
                killed, restarts = killed + 1, restarts + 1
                if not (own / "pass" / STATE_FILE).is_file():
                    early += 1
                    continue
                partial += any(path.name.startswith(".bayes_kf-") for path in (own / "pass").iterdir())
                now = bkf.Posterior.from_pretrained(own / "pass", network()).state.step
                if now < step:
                    raise AssertionError(f"went back from update {step} to {now}")
                step = now
        except ProcessLookupError:  # it had just ended
            launched.wait(600)
        finally:
            launched.kill() if launched.poll() is None else None
        if launched.returncode:
            raise AssertionError(f"torchrun ended with {launched.returncode}: {(own / 'output').read_text()[-2000:]}")
        endings.append(bkf.Posterior.from_pretrained(own / "pass", network()))
        passes += 1
    calm = folder / "calm"
    calm.mkdir()
    if launch(calm, length, processes).wait(600):
        raise AssertionError((calm / "output").read_text()[-2000:])
    expected = bkf.Posterior.from_pretrained(calm / "pass", network())
    one = bkf.fit(network(), stream(length), CONFIG, progress=False)
    said = [line for path in folder.glob("run-*/said") for line in path.read_text().split()]
    return {
        "kills": killed,
        "killed while writing": partial,
        "killed before a checkpoint": early,
        "whole passes": passes,
        "equal to the bit": all(same(ending, expected) for ending in endings),
        "distance from one process": distance(expected, one),
        "others that said who was missing": said.count("OtherProcessError"),
        "others with another error": len(said) - said.count("OtherProcessError"),
    }


def _started(folder: Path, restarts: int, processes: int, launched: subprocess.Popen[bytes]) -> list[int] | None:
    """The numbers of the processes after so many restarts; None if the pass has ended before they started."""
    marks = [folder / STARTED.format(rank=rank, restarts=restarts) for rank in range(processes)]
    until = time.monotonic() + LATEST_STEP
    while not all(mark.is_file() for mark in marks):
        if launched.poll() is not None:
            return None
        if time.monotonic() > until:
            raise AssertionError(f"no new processes for {LATEST_STEP:.0f} seconds after restart {restarts}")
        time.sleep(0.02)
    return [int(mark.read_text()) for mark in marks]


def same(one: bkf.Posterior, other: bkf.Posterior) -> bool:
    """Whether two posteriors are equal to the bit, with their histories."""
    pairs = zip(one.state.belief, other.state.belief, strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(one.history["log_loss"], other.history["log_loss"])


def distance(one: bkf.Posterior, other: bkf.Posterior) -> float:
    """The largest difference of means and variances, in parts of their norms."""
    pairs = [(one.mean_vector, other.mean_vector), (one.variance_vector, other.variance_vector)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--kills", type=int, default=100, help="number of kills (%(default)s)")
    command.option("--length", type=int, default=400, help="batches of a pass (%(default)s)")
    command.option("--processes", type=int, default=2, help="of a fit (%(default)s)")
    args = command.option("--learn", type=Path, metavar="FOLDER", help="be one of the processes").parse()
    if args.learn:
        learn(args.learn, args.length)
        return
    file, begun = ResultFile("process_kills"), time.perf_counter()
    file.begin()
    with TemporaryDirectory() as folder:
        counts = run(args.kills, args.length, args.processes, Path(folder))
    file.put(f"{args.processes} {args.kills}", counts | {"seconds": time.perf_counter() - begun})
    write_page(file)
    print(counts)


def write_page(file: ResultFile) -> None:
    """The table of all cells."""
    names = list(next(iter(file.cells.values())))
    rows = [[name, *(_shown(cell[name]) for cell in file.cells.values())] for name in names if name != "seconds"]
    text = (
        "One of the processes was killed, torchrun started all again, and the fit resumed by itself. Every checkpoint "
        "opened, none behind the one before; whole passes were compared with one that was never killed. torchrun "
        "stopped the other ones before they could say anything."
    )
    heads = [f"{key.split()[0]} processes" for key in file.cells]
    file.write_markdown("Processes killed at random moments", [*markdown_table(["", *heads], rows), "", text])


def _shown(value: Any) -> str:
    return f"{value:.0e}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
