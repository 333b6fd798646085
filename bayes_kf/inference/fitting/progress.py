"""What a pass over a loader shows while it lasts, and what it keeps of its updates."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bayes_kf.inference.filtering.update_info import UpdateInfo

WINDOW = 100  # updates behind the numbers in the progress bar
SEEN = "training_"  # before the names of series about data that the adapter had learned before the pass
OF_PREDICTIONS = ("log_loss", "correct", "innovation", "dof")  # prequential, where the data were new


def shows_bars(progress: bool | None) -> bool:
    """Whether to show progress bars.

    Args:
        progress: True or False; None: only where standard error is a terminal, or in a notebook.
    """
    if progress is not None:
        return progress
    if sys.stderr is None:
        return False
    from tqdm.auto import tqdm

    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class Bar:
    """Progress over batches; ``done`` of them."""

    def __init__(self, total: int | None, label: str, shown: bool) -> None:
        from tqdm.auto import tqdm

        self.done, self._bar = 0, tqdm(total=total, disable=not shown, desc=label, unit="batch")

    def advance(self, text: str) -> None:
        """One more batch, and what to say beside the bar."""
        self.done += 1
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def skip(self, batches: int) -> None:
        """Some batches are behind already."""
        self.done += batches
        self._bar.update(batches)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Record:
    """What the updates of a pass reported, and its running summary.

    Args:
        likelihood: of the targets.
        seen: whether the adapter had learned these data before. Then no score here is of a prediction that came before
            the example was learned, and the series have names of their own; see :func:`of_seen_data`.
    """

    def __init__(self, likelihood: str, seen: bool = False) -> None:
        self.likelihood, self.seen = likelihood, seen
        self.per_example: dict[str, list[Tensor]] = {"log_loss": [], "correct": []}
        self.per_update: dict[str, list[float]] = {name: [] for name in ("innovation", "dof", "damping", "seconds")}
        self._correct = self._seen = 0.0

    def add(self, info: UpdateInfo) -> None:
        """Take in an update."""
        self.per_example["log_loss"].append(info.log_loss.detach().cpu())
        if info.correct is not None:
            self.per_example["correct"].append(info.correct.detach().cpu())
            self._correct += float(info.correct.sum())
        self._seen += len(info.log_loss)
        update = info._asdict() | {"dof": info.degrees_of_freedom}
        for name, values in self.per_update.items():
            values.append(float(update[name]))

    def summary(self) -> str:
        """Accuracy so far; log loss and, of data that were new, innovation of late."""
        recent = torch.cat(self.per_example["log_loss"][-WINDOW:])
        if self.seen:
            accuracy = f"training accuracy {self._correct / self._seen:.3f}, " if self.per_example["correct"] else ""
            return f"{accuracy}training log loss {recent.mean():.3f}"
        dof = sum(self.per_update["dof"][-WINDOW:])  # 0 where the only update's candidate diverged in it
        ratio = sum(self.per_update["innovation"][-WINDOW:]) / max(dof, 1.0)
        accuracy = f"accuracy {self._correct / self._seen:.3f}, " if self.per_example["correct"] else ""
        return f"{accuracy}log loss {recent.mean():.3f}, innovation {ratio:.2f}"

    def history(self) -> dict[str, Tensor]:
        """Every recorded series as a tensor, by name."""
        joined = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in self.per_example.items()}
        if self.likelihood in ("gaussian", "poisson"):
            del joined["correct"]
        joined |= {name: torch.tensor(values) for name, values in self.per_update.items()}
        return of_seen_data(joined) if self.seen else joined


def of_seen_data(history: dict[str, Tensor]) -> dict[str, Tensor]:
    """The series under the names for data that the adapter had learned before: ``training_log_loss`` and so on.

    Whatever reads prequential scores (reports, comparisons, the command line) then finds none, also in what is saved.
    """
    return {SEEN + name if name in OF_PREDICTIONS else name: values for name, values in history.items()}
