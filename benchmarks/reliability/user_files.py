"""Random sequences of saves, loads, exports, merges and kills in folders that also hold a user's own files.

A sequence uses a few folders (with spaces and umlauts in their names, one inside another, one behind a link). At
random, every writer of the package saves posteriors of several kinds there: into an empty folder, over each other, and
over a user's files, which may have any name, also one of the package's; may be links, also dangling ones; may be
read-only; or may be files of the package that were edited or cut in half. Some saves are killed at a random change to
the file system. After every step

- every file that the package did not write is unchanged, bit for bit, with its mode and its links;
- a refused save has changed nothing;
- every folder opens as the posterior that was saved last or, after a kill, as that one or the one before.

    python -m benchmarks.reliability.user_files                  # 500 sequences, a few minutes
    python -m benchmarks.reliability.user_files --sequences 20   # both write results/foreign_files.md
"""

from __future__ import annotations

import functools
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import bayes_kf as bkf
from bayes_kf.cli.posterior_folder import Labels, save_posterior
from bayes_kf.evaluation.report.contents import Sections
from bayes_kf.evaluation.report.report import Report
from bayes_kf.evaluation.score import Score
from bayes_kf.files.atomic_folder import COMMIT, recover
from bayes_kf.integrations import KalmanTrainer
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.reliability.folder_snapshots import Tree, killed_at, snapshot

STEPS = 12  # of a sequence
FOLDERS = ("p", "mein Ordner, ü", "p/inner", "link")
NAMES = (  # of a user's files; some are the package's own names
    "notes.md", "tokenizer.json", "Übersicht (1).txt", "checkpoint-500/optimizer.pt", "draw_0/notes", "draw_1",
    ".bayes_kf-save-mynotes_", "README.md", "SHA256SUMS", "SHA256SUMS.draws", "labels.json", "stream.json",
    "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "kalman_config.json",
    "kalman_state.safetensors", "report.json", "report.png",
)  # fmt: skip
TRAINERS = ("adapter_config.json", "adapter_model.safetensors", "model.safetensors", "training_args.bin", "config.json")


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def _frozen() -> nn.Module:
    return nn.Sequential(_plain()).requires_grad_(False)


def _adapted(name: str = "default") -> nn.Module:
    model: nn.Module = get_peft_model(_frozen(), LoraConfig(r=1, target_modules=["0"]), adapter_name=name)
    return model


def _bert() -> BertForSequenceClassification:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=9, **small))
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("classifier" in name)
    return model


def _data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, generator=generator), torch.tensor([0, 1])) for _ in range(3)]


CONFIG = bkf.KalmanConfig(covariance="diagonal", initial_variance=0.1, bound_prior=False)


@functools.cache
def _posteriors() -> dict[str, tuple[bkf.Posterior, Callable[[], nn.Module]]]:
    """Posteriors by name, each with a function that makes its base model."""
    made: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
        "plain": (_plain, _plain),
        "adapter": (_adapted, _frozen),
        "named adapter": (lambda: _adapted("mine"), _frozen),
    }
    posteriors: dict[str, tuple[bkf.Posterior, Callable[[], nn.Module]]] = {}
    for kind, (model, base) in made.items():
        for number in (1, 2):
            fitted = bkf.fit(model(), _data()[:number], CONFIG, progress=False)
            posteriors[f"{kind} {number}"] = fitted, base
    posteriors["pass"] = bkf.fit(_plain(), _data(), CONFIG, progress=False), _plain
    posteriors["merged"] = bkf.merge([posteriors["plain 1"][0], posteriors["plain 2"][0]]), _plain
    posteriors["trainer"] = _trainer().posterior, _bert
    return posteriors


@functools.cache
def _trainer() -> KalmanTrainer:
    data = [{"input_ids": torch.tensor([1, k]), "labels": k % 2} for k in range(4)]
    with TemporaryDirectory() as folder:
        args = TrainingArguments(folder, num_train_epochs=1, use_cpu=True, report_to="none", disable_tqdm=True)
        args.save_strategy = "no"
        trainer = KalmanTrainer(_bert(), args, kalman=CONFIG, train_dataset=data)
        trainer.train()
    return trainer


class Sequence:
    """One sequence: the user's files by path, and the posteriors that each folder may open as."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.users: Tree = {}
        self.holds: dict[Path, set[str]] = {}  # folder -> names of the posteriors that it may open as
        self.spoiled: set[Path] = set()  # folders in which a file of the package was edited
        self.counts: Counter[str] = Counter()
        (root / "behind").mkdir()
        (root / "link").symlink_to("behind")
        self.users["link"] = "behind"

    def step(self) -> None:
        """One random action, and a check of all folders."""
        folder = self.root / self.rng.choice(FOLDERS)
        roll = self.rng.random()
        if roll < 0.25:
            self._put(folder)
        elif roll < 0.35:
            self._edit(folder.resolve())
        elif roll < 0.40:
            self._start(folder)
        elif roll < 0.45:
            self._report(folder)
        else:
            self._save(folder)
        self._check()

    def _save(self, folder: Path) -> None:
        """Save a posterior or draws by one of the writers, which may be killed."""
        way = self.rng.choice(["save", "save", "command", "draws", "pass", "merge", "trainer"])
        name, work = self._writer(way, folder)
        real, before, refused = folder.resolve(), snapshot(self.root), ""
        if self.rng.random() < 0.4:
            killed = killed_at(self.rng.randrange(1, 60), work)
            self.counts[f"{way}, killed" if killed else way] += 1
            if not name:
                return
            if killed or self._opens_as(real, name) is False:
                self.holds[real] = self.holds.get(real, {""}) | {name}  # the old one or the new one
                self._settle(real)
            else:
                self._now_holds(real, name)
            return
        try:
            work()
        except ValueError as error:
            self.counts[f"{way}, refused"] += 1
            refused = str(error)
        if refused:
            assert refused.startswith("`"), refused
            after = snapshot(self.root)
            changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
            finished = any(COMMIT in path for path in changed)  # the save that a kill interrupted was completed first
            assert finished or all(".bayes_kf-save-" in path for path in changed), (refused, changed)
            return
        self.counts[way] += 1
        hidden = [path.name for path in real.glob(".bayes_kf-*") if path.name != NAMES[6]]
        assert not hidden, f"{hidden} was left"
        if name:
            self._now_holds(real, name)

    def _now_holds(self, folder: Path, name: str) -> None:
        """Note a saved posterior. A merged one of as many batches also counts as a completed pass."""
        same = self.holds.get(folder, set()) & {"merged"} if name == "pass" else set()
        self.holds[folder] = {name} | same
        self.spoiled.discard(folder)

    def _writer(self, way: str, folder: Path) -> tuple[str, Callable[[], object]]:
        """The name of the posterior in the folder afterwards ("" for none), and the function that writes it."""
        posteriors = _posteriors()
        name = self.rng.choice([name for name in posteriors if name not in ("pass", "merged", "trainer")])
        posterior = posteriors[name][0]
        if way == "command":
            stream = {"stream.json": "{}"} if self.rng.random() < 0.5 else {}
            return name, lambda: save_posterior(posterior, folder, Labels(("a", "b"), 2), {}, stream)
        if way == "draws":
            named = posteriors[f"adapter {self.rng.choice((1, 2))}"][0]
            number = self.rng.randrange(1, 4)
            return "", lambda: named.export_adapters(folder, number)
        if way == "pass":
            return "pass", lambda: bkf.fit(_plain(), _data(), CONFIG, checkpoint=folder, every=3, progress=False)
        if way == "merge":
            return "merged", lambda: posteriors["merged"][0].save_pretrained(folder)
        if way == "trainer":
            return "trainer", lambda: self._save_trainer(folder)
        return name, lambda: posterior.save_pretrained(folder)

    def _save_trainer(self, folder: Path) -> None:
        """Save a trainer's model, unless a user's file has a name that Trainer itself overwrites."""
        real = folder.resolve()
        if any(os.path.lexists(real / name) and self._key(real / name) in self.users for name in TRAINERS):
            raise ValueError("`folder` has files that Trainer overwrites")
        _trainer().save_model(str(folder))

    def _start(self, folder: Path) -> None:
        """Recover a folder as a resumed pass does; refused if a user's file blocks a save that was killed."""
        before = snapshot(self.root)
        try:
            recover(folder)
            self.counts["start"] += 1
        except ValueError:
            self.counts["start, refused"] += 1
            assert snapshot(self.root) == before

    def _report(self, folder: Path) -> None:
        page = folder.resolve() / "report.html"
        try:
            Report("A report", {}, Sections(scores={"accuracy": Score(self.rng.random())})).save(page)
            self.counts["report"] += 1
        except ValueError:
            self.counts["report, refused"] += 1

    def _put(self, folder: Path) -> None:
        """Put a user's file or link at a free path."""
        path = folder.resolve() / self.rng.choice(NAMES)
        if os.path.lexists(path) or any(os.path.lexists(p) and not p.is_dir() for p in path.parents):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = self.rng.choice(["file", "file", "read-only", "link", "dangling"])
        self.counts[f"put a {kind}" if kind != "dangling" else "put a dangling link"] += 1
        if kind in ("link", "dangling"):
            target = self.root / "outside"
            target.write_text("outside")
            self.users[self._key(target)] = (target.stat().st_mode, target.read_bytes())
            path.symlink_to(target if kind == "link" else "nowhere")
            self.users[self._key(path)] = str(path.readlink())
        else:
            path.write_bytes(self.rng.randbytes(20))
            path.chmod(0o444 if kind == "read-only" else 0o644)
            self.users[self._key(path)] = (path.stat().st_mode, path.read_bytes())

    def _edit(self, folder: Path) -> None:
        """Edit a file of the package or cut it in half; it then counts as the user's."""
        files = [p for p in folder.glob("*") if p.is_file() and not p.is_symlink() and self._key(p) not in self.users]
        if not files:
            return
        path = self.rng.choice(sorted(files))
        whole = path.read_bytes()
        path.write_bytes(self.rng.choice([whole[: len(whole) // 2], whole + b" "]))
        if path.read_bytes() == whole:
            return
        if not path.name.startswith("report."):  # a report replaces an earlier one, edited or not
            self.users[self._key(path)] = (path.stat().st_mode, path.read_bytes())
        self.spoiled.add(folder)
        self.counts["edit"] += 1

    def _check(self) -> None:
        now = snapshot(self.root)
        for name, what in self.users.items():
            assert now.get(name) == what, f"{name} is not as it was"
        for folder in list(self.holds):
            if folder not in self.spoiled:
                self._settle(folder)

    def _settle(self, folder: Path) -> None:
        """Reduce the posteriors that a folder may open as to those that it does open as."""
        if folder in self.spoiled:
            return
        opened = {name for name in self.holds[folder] if self._opens_as(folder, name)}
        assert opened or "" in self.holds[folder], f"{folder.name} does not open as {self.holds[folder]}"
        self.holds[folder] = opened or {""}
        self.counts["opened"] += bool(opened)

    def _opens_as(self, folder: Path, name: str) -> bool:
        if not name:
            return False
        posterior, base = _posteriors()[name]
        try:
            loaded = bkf.Posterior.from_pretrained(folder, base())
        except ValueError:
            return False
        alike = zip(loaded.state.belief, posterior.state.belief, strict=False)
        return loaded.state.step == posterior.state.step and all(torch.equal(a, b) for a, b in alike)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def run(sequences: int, seed: int = 0, progress: bool = True) -> Counter[str]:
    """Counts of actions over ``sequences`` sequences.

    Raises:
        AssertionError: if a user's file was changed, or a folder opens as no posterior that it may.
    """
    counts: Counter[str] = Counter()
    _posteriors()
    for number in tqdm(range(seed, seed + sequences), disable=not progress):
        with TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sequence = Sequence(Path(scratch).resolve(), random.Random(number))  # noqa: S311 (no secrets)
            try:
                for _ in range(STEPS):
                    sequence.step()
            except AssertionError as error:
                raise AssertionError(f"sequence {number}: {error}") from error
            counts += sequence.counts
            counts["files of other people"] += len(sequence.users)
    return counts


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--sequences", type=int, default=500, help="number of sequences (%(default)s)")
    args = command.option("--seed", type=int, default=0, help="of the first sequence (%(default)s)").parse()
    file, begun = ResultFile("foreign_files"), time.perf_counter()
    file.begin()
    counts = run(args.sequences, args.seed)
    file.put(str(args.sequences), dict(sorted(counts.items())) | {"seconds": time.perf_counter() - begun})
    rows = [[name, f"{number:,}"] for name, number in sorted(counts.items())]
    text = "What the package did not write was there after every step, bit for bit, and every folder opened."
    print(
        file.write_markdown("Folders with other people's files", [*markdown_table(["", "how often"], rows), "", text])
    )


if __name__ == "__main__":
    main()
