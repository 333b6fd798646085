"""Random sequences of saves, loads, exports, merges and kills in folders that hold other people's files.

A sequence takes place in a few folders (with spaces and umlauts in their names, one inside another, one behind a link).
At random, posteriors of several kinds are saved there by every writer of the package, over nothing, over each other and
over files that somebody else put there: of any name, also of ours; links, also to nowhere; read-only ones; files of
ours that were edited or cut in half. Some saves are killed at a random change to the file system. After every step

- what was not written by the package is there, bit for bit, with its mode and its links;
- a save that was refused has changed nothing;
- every folder opens as the posterior that was saved last, or after a kill as that or the one before.

    python benchmarks/foreign_files.py                  # 500 sequences, a few minutes; results/foreign_files.md
    python benchmarks/foreign_files.py --sequences 20
"""

from __future__ import annotations

import argparse
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
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.reliability.folder_snapshots import Tree, killed_at, snapshot

STEPS = 12  # of a sequence
FOLDERS = ("p", "mein Ordner, ü", "p/inner", "link")
NAMES = (  # of files that somebody else puts into a folder; some are names of ours
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
    """Each with how to make its base model."""
    made: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
        "plain": (_plain, _plain),
        "adapter": (_adapted, _frozen),
        "named adapter": (lambda: _adapted("mine"), _frozen),
    }
    found: dict[str, tuple[bkf.Posterior, Callable[[], nn.Module]]] = {}
    for kind, (model, base) in made.items():
        for number in (1, 2):
            fitted = bkf.fit(model(), _data()[:number], CONFIG, progress=False)
            found[f"{kind} {number}"] = fitted, base
    found["pass"] = bkf.fit(_plain(), _data(), CONFIG, progress=False), _plain
    found["merged"] = bkf.merge([found["plain 1"][0], found["plain 2"][0]]), _plain
    found["trainer"] = _trainer().posterior, _bert
    return found


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
    """One sequence: what other people put where, and what every folder should open as."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.theirs: Tree = {}
        self.holds: dict[Path, set[str]] = {}  # a folder -> what it may open as
        self.spoiled: set[Path] = set()  # folders in which a file of ours was edited
        self.counts: Counter[str] = Counter()
        (root / "behind").mkdir()
        (root / "link").symlink_to("behind")
        self.theirs["link"] = "behind"

    def step(self) -> None:
        """One thing that a user does, and a look at everything."""
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
        self._look()

    def _save(self, folder: Path) -> None:
        """A posterior or draws, by one of the writers, which may be killed."""
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
            finished = any(COMMIT in path for path in changed)  # what a kill had left was completed first
            assert finished or all(".bayes_kf-save-" in path for path in changed), (refused, changed)
            return
        self.counts[way] += 1
        hidden = [path.name for path in real.glob(".bayes_kf-*") if path.name != NAMES[6]]
        assert not hidden, f"{hidden} was left"
        if name:
            self._now_holds(real, name)

    def _now_holds(self, folder: Path, name: str) -> None:
        """A posterior was saved; a merged one of as many batches passes for a pass that is done."""
        same = self.holds.get(folder, set()) & {"merged"} if name == "pass" else set()
        self.holds[folder] = {name} | same
        self.spoiled.discard(folder)

    def _writer(self, way: str, folder: Path) -> tuple[str, Callable[[], object]]:
        """The posterior that is there afterwards, "" for none, and what writes it."""
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
        """Only where no file of somebody else's has a name that Trainer itself overwrites."""
        real = folder.resolve()
        if any(os.path.lexists(real / name) and self._key(real / name) in self.theirs for name in TRAINERS):
            raise ValueError("`folder` has files that Trainer overwrites")
        _trainer().save_model(str(folder))

    def _start(self, folder: Path) -> None:
        """What a pass does before it goes on; refused where somebody put a file in the way of a save after a kill."""
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
        """A file or a link of somebody else's, where nothing is."""
        path = folder.resolve() / self.rng.choice(NAMES)
        if os.path.lexists(path) or any(os.path.lexists(p) and not p.is_dir() for p in path.parents):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = self.rng.choice(["file", "file", "read-only", "link", "dangling"])
        self.counts[f"put a {kind}" if kind != "dangling" else "put a dangling link"] += 1
        if kind in ("link", "dangling"):
            target = self.root / "outside"
            target.write_text("outside")
            self.theirs[self._key(target)] = (target.stat().st_mode, target.read_bytes())
            path.symlink_to(target if kind == "link" else "nowhere")
            self.theirs[self._key(path)] = str(path.readlink())
        else:
            path.write_bytes(self.rng.randbytes(20))
            path.chmod(0o444 if kind == "read-only" else 0o644)
            self.theirs[self._key(path)] = (path.stat().st_mode, path.read_bytes())

    def _edit(self, folder: Path) -> None:
        """A file of ours becomes somebody else's: edited, cut in half, or another posterior's."""
        files = [p for p in folder.glob("*") if p.is_file() and not p.is_symlink() and self._key(p) not in self.theirs]
        if not files:
            return
        path = self.rng.choice(sorted(files))
        whole = path.read_bytes()
        path.write_bytes(self.rng.choice([whole[: len(whole) // 2], whole + b" "]))
        if path.read_bytes() == whole:
            return
        if not path.name.startswith("report."):  # an earlier report is replaced, whoever edited it
            self.theirs[self._key(path)] = (path.stat().st_mode, path.read_bytes())
        self.spoiled.add(folder)
        self.counts["edit"] += 1

    def _look(self) -> None:
        now = snapshot(self.root)
        for name, what in self.theirs.items():
            assert now.get(name) == what, f"{name} is not as it was"
        for folder in list(self.holds):
            if folder not in self.spoiled:
                self._settle(folder)

    def _settle(self, folder: Path) -> None:
        """Find out which of what a folder may hold it does."""
        if folder in self.spoiled:
            return
        found = {name for name in self.holds[folder] if self._opens_as(folder, name)}
        assert found or "" in self.holds[folder], f"{folder.name} does not open as {self.holds[folder]}"
        self.holds[folder] = found or {""}
        self.counts["opened"] += bool(found)

    def _opens_as(self, folder: Path, name: str) -> bool:
        if not name:
            return False
        posterior, base = _posteriors()[name]
        try:
            found = bkf.Posterior.from_pretrained(folder, base())
        except ValueError:
            return False
        alike = zip(found.state.belief, posterior.state.belief, strict=False)
        return found.state.step == posterior.state.step and all(torch.equal(a, b) for a, b in alike)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def run(sequences: int, seed: int = 0, progress: bool = True) -> Counter[str]:
    """So many sequences, and what happened in them how often.

    Raises:
        AssertionError: for a file that is not as somebody left it, or a folder that opens as nothing it should.
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
            counts["files of other people"] += len(sequence.theirs)
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
