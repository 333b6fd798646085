"""The progress bar of a pass, and the record of its updates."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bayes_kf.inference.filtering.update_info import UpdateInfo
from bayes_kf.inference.predictive.gaussian_posterior import as_training_series
from bayes_kf.models.likelihood import NUMERIC
from bayes_kf.processes import shared_work

SUMMARY_UPDATES = 100  # the latest updates, whose means stand beside the progress bar


def shows_progress(progress: bool | None) -> bool:
    """Whether to show progress bars; of several processes the first one does.

    Args:
        progress: True or False. None: only if standard error is a terminal, or in a notebook.
    """
    if not shared_work.is_first():
        return False
    if progress is not None:
        return progress
    if sys.stderr is None:
        return False
    from tqdm.auto import tqdm

    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class ProgressBar:
    """A progress bar over batches.

    Args:
        total: the number of batches; None if unknown.
        label: the text before the bar.
        shown: whether it is visible.

    Attributes:
        done: the number of batches so far.
    """

    def __init__(self, total: int | None = None, label: str = "", shown: bool = False) -> None:
        from tqdm.auto import tqdm

        self.done, self._bar = 0, tqdm(total=total, disable=not shown, desc=label, unit="batch")

    def advance(self, text: str) -> None:
        """Count one more batch and show a text beside the bar."""
        self.done += 1
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def skip(self, batches: int) -> None:
        """Count batches that an earlier call processed."""
        self.done += batches
        self._bar.update(batches)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class FitHistory:
    """The scores of a pass's updates: series by name, and a summary of the latest.

    Args:
        likelihood: of the targets.
        trained_on: whether the adapter was trained on these data. If so, no score is prequential, and the series have
            the names of :func:`~bayes_kf.inference.predictive.gaussian_posterior.as_training_series`.
    """

    def __init__(self, likelihood: str, trained_on: bool = False) -> None:
        self.likelihood, self.trained_on = likelihood, trained_on
        self._per_example: dict[str, list[Tensor]] = {"log_loss": [], "correct": []}
        self._per_update: dict[str, list[float]] = {name: [] for name in ("innovation", "dof", "damping", "seconds")}
        self._correct = self._examples = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether it has no update."""
        return not self._per_update["dof"]

    def add(self, info: UpdateInfo) -> None:
        """Add the scores of an update."""
        self._per_example["log_loss"].append(info.log_loss.detach().cpu())
        if info.correct is not None:
            self._per_example["correct"].append(info.correct.detach().cpu())
            self._correct += float(info.correct.sum())
        self._examples += len(info.log_loss)
        update = info._asdict() | {"dof": info.degrees_of_freedom}
        for name, values in self._per_update.items():
            values.append(float(update[name]))

    def summary(self) -> str:
        """The accuracy so far, and the latest log loss and normalized innovation; empty before the first update."""
        if self.is_empty:
            return ""
        log_loss = torch.cat(self._per_example["log_loss"][-SUMMARY_UPDATES:]).mean()
        prefix = "training " if self.trained_on else ""
        is_class = bool(self._per_example["correct"])
        accuracy = f"{prefix}accuracy {self._correct / self._examples:.3f}, " if is_class else ""
        if self.trained_on:
            return f"{accuracy}{prefix}log loss {log_loss:.3f}"
        dof = sum(self._per_update["dof"][-SUMMARY_UPDATES:])  # 0 if the only candidate of the only update diverged
        ratio = sum(self._per_update["innovation"][-SUMMARY_UPDATES:]) / max(dof, 1.0)
        return f"{accuracy}log loss {log_loss:.3f}, innovation {ratio:.2f}"

    def series(self) -> dict[str, Tensor]:
        """Every recorded series as a 1-D tensor, by name."""
        joined = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in self._per_example.items()}
        if self.likelihood in NUMERIC:
            del joined["correct"]
        joined |= {name: torch.tensor(values) for name, values in self._per_update.items()}
        return as_training_series(joined) if self.trained_on else joined

    def appended_to(self, earlier: dict[str, Tensor]) -> dict[str, Tensor]:
        """The series appended to those of an earlier pass."""
        if self.is_empty:
            return earlier
        series = self.series()
        return earlier | {k: torch.cat([earlier[k], v]) if k in earlier else v for k, v in series.items()}
