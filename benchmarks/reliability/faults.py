"""Damaged files of a posterior, and full disks: an error in one sentence, or the posterior as it was saved.

In folders of three kinds (a PEFT adapter, a plain module, the output of ``bayes-kf fit``) a random file gets one of
eight faults, and the folder is loaded into a new base model. Either loading raises a ValueError of one sentence and the
base model is unchanged; or the fault has no effect: state, settings, classes and predictions are bit for bit those that
were saved. Then posteriors are saved over an older one with a limit on file sizes, as on a full disk; the older one
must remain.

    python -m benchmarks.reliability.faults                  # 3,000 faults, about ten minutes; results/faults.md
    python -m benchmarks.reliability.faults --faults 300
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import bayes_kf as bkf
from bayes_kf.cli.posterior_folder import Labels, read_labels, read_new_head, save_posterior
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import digits_vit, lora_digits_vit
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table

OUTCOMES = ("refused", "did not matter")
LABELS = Labels(tuple("0123456789"), 10)


class Kind(NamedTuple):
    """A kind of saved folder.

    Attributes:
        base: makes a new base model.
        save: writes a posterior into a folder.
        posteriors: two of the same base.
        inputs: to predict.
    """

    base: Callable[[], nn.Module]
    save: Callable[[bkf.Posterior, Path], None]
    posteriors: list[bkf.Posterior]
    inputs: Tensor


def module() -> nn.Module:
    """A plain module."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def kinds() -> dict[str, Kind]:
    """The kinds by name."""
    stream, _ = uci_digits_split()
    images, labels = stream.images, stream.labels
    parts = [list(zip(images[k : k + 24].split(8), labels[k : k + 24].split(8), strict=True)) for k in (0, 24)]
    adapters = [bkf.fit(lora_digits_vit(rank=2), part, bkf.KalmanConfig(rank=4), progress=False) for part in parts]
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(6)]
    plain = [bkf.fit(module(), some, bkf.KalmanConfig(rank=4), progress=False) for some in (data[:3], data[3:])]
    head = {"classifier.weight": torch.ones(10, 64)}

    def as_command(posterior: bkf.Posterior, folder: Path) -> None:
        save_posterior(posterior, folder, LABELS, head, {"stream.json": '{"lines": 24}'})

    def save(posterior: bkf.Posterior, folder: Path) -> None:
        posterior.save_pretrained(folder)

    return {
        "adapter": Kind(digits_vit, save, adapters, images[:4]),
        "module": Kind(module, save, plain, data[0][0]),
        "command": Kind(digits_vit, as_command, adapters, images[:4]),
    }


def _cut(file: Path, other: Path, rng: random.Random) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: rng.randrange(len(whole))])


def _flip(file: Path, other: Path, rng: random.Random) -> None:
    whole = bytearray(file.read_bytes())
    whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    file.write_bytes(whole)


def _rubbish(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(rng.randrange(1, 4096)))


def _block(file: Path, other: Path, rng: random.Random) -> None:
    whole = bytearray(file.read_bytes())
    start = rng.randrange(len(whole))
    whole[start : start + 512] = bytes(len(whole[start : start + 512]))
    file.write_bytes(whole)


FAULTS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "cut short": _cut,
    "one bit flipped": _flip,
    "emptied": lambda file, other, rng: file.write_bytes(b"") and None,
    "random bytes": _rubbish,
    "a block of zeros": _block,
    "removed": lambda file, other, rng: file.unlink(),
    "renamed": lambda file, other, rng: file.rename(file.with_name("old-" + file.name)) and None,
    "another posterior's": lambda file, other, rng: shutil.copy(other, file) and None,
}


def loaded(kind: Kind, folder: Path) -> dict[str, Any]:
    """The contents of a folder, loaded into a new base model.

    Raises:
        ValueError: for a refused folder.
        AssertionError: if the base model was changed by a refused folder.
    """
    model = kind.base()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        labels, head = read_labels(folder), read_new_head(folder)
        posterior = bkf.Posterior.from_pretrained(folder, model)
    except ValueError:
        after = model.state_dict()
        assert before.keys() == after.keys(), "the base model was changed"
        assert all(torch.equal(t, after[name]) for name, t in before.items()), "the base model was changed"
        raise
    tensors = {f"belief.{name}": t for name, t in posterior.state.belief._asdict().items()}
    tensors |= {f"prior.{name}": t for name, t in posterior.state.prior._asdict().items()} | head
    tensors |= {"probs": posterior.predict(kind.inputs).probs, "mean": posterior.adapter.vector()}
    tensors |= {f"history.{name}": t for name, t in posterior.history.items()}
    return {"tensors": tensors, "config": posterior.config, "labels": labels, "step": posterior.state.step}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two loaded folders are equal bit for bit."""
    one, two = first["tensors"], second["tensors"]
    alike = one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())
    return alike and all(first[name] == second[name] for name in ("config", "labels", "step"))


def damage(number: int, folder: Path, seed: int = 0, progress: bool = True) -> Counter[tuple[str, str]]:
    """Counts of (fault, outcome) over ``number`` random faults.

    Raises:
        AssertionError: if another posterior was loaded, an error is not a sentence, or the base was changed.
    """
    rng, counts = random.Random(seed), Counter[tuple[str, str]]()  # noqa: S311 (no secrets)
    ways, sound = kinds(), {}
    for name, kind in ways.items():
        for which, posterior in enumerate(kind.posteriors):
            kind.save(posterior, folder / f"{name}-{which}")
        sound[name] = loaded(kind, folder / f"{name}-0")
    for _ in tqdm(range(number), disable=not progress):
        name, fault = rng.choice(list(ways)), rng.choice(list(FAULTS))
        broken = folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder / f"{name}-0", broken)
        file = rng.choice(sorted(path.name for path in broken.iterdir()))
        FAULTS[fault](broken / file, folder / f"{name}-1" / file, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                here = loaded(ways[name], broken)
        except ValueError as error:
            if not str(error).startswith("`"):
                raise AssertionError(f"{fault} of {file}: {error}") from error
            outcome = "refused"
        else:
            assert same(here, sound[name]), f"{fault} of {file} in {name}: another posterior was loaded"
            outcome = "did not matter"
        counts[fault, outcome] += 1
    return counts


def no_room(folder: Path, tries: int, seed: int = 0) -> int:
    """The number of saves that failed for lack of space, over a posterior that must stay unchanged."""
    kind, rng, ended = kinds()["command"], random.Random(seed), 0  # noqa: S311 (no secrets)
    kind.save(kind.posteriors[0], folder / "kept")
    (folder / "kept" / "notes").write_text("a user's file")
    sound, names = loaded(kind, folder / "kept"), sorted(path.name for path in (folder / "kept").iterdir())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError then, as from a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(tries):
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(0, 60_000), limits[1]))
        try:
            kind.save(kind.posteriors[1], folder / "kept")
        except (OSError, ValueError):
            ended += 1
        else:
            kind.save(kind.posteriors[0], folder / "kept")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert same(loaded(kind, folder / "kept"), sound), "what was saved before is lost"
        assert [path.name for path in folder.iterdir()] == ["kept"], "something was left behind"
        assert sorted(path.name for path in (folder / "kept").iterdir()) == names, "something was left behind"
    return ended


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--faults", type=int, default=3000, help="number of faults (%(default)s)")
    args = command.option("--saves", type=int, default=100, help="saves without space (%(default)s)").parse()
    file = ResultFile("faults")
    file.begin()
    with TemporaryDirectory() as scratch:
        outcomes = damage(args.faults, Path(scratch))
    with TemporaryDirectory() as scratch:
        ended = no_room(Path(scratch), args.saves)
    counts = {fault: {outcome: outcomes[fault, outcome] for outcome in OUTCOMES} for fault in FAULTS}
    counts["all"] = {outcome: sum(outcomes[fault, outcome] for fault in FAULTS) for outcome in OUTCOMES}
    for fault, cell in counts.items():
        file.put(fault, cell)
    file.put("saves without room", {"tried": args.saves, "ended": ended})
    rows = [[fault, *(str(cell[outcome]) for outcome in OUTCOMES)] for fault, cell in counts.items()]
    text = (
        "No other posterior was ever loaded, no error was anything but a sentence, and no base model was changed. "
        f"Saves: {args.saves} over an older posterior, of which {ended} ended for want of room; the older one was "
        "there each time, to the bit, and nothing beside it."
    )
    print(file.write_markdown("Damaged folders", [*markdown_table(["fault", *OUTCOMES], rows), "", text]))


if __name__ == "__main__":
    main()
