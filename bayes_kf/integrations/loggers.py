"""Reports in TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import math
from typing import Any

from bayes_kf.evaluation import Report

SECTION = "calibration"


def log_report(report: Report, to: Any, *, step: int | None = None, name: str = SECTION) -> None:
    """Write a report's numbers, its page and its figures through the public calls of an experiment tracker.

    - TensorBoard (``SummaryWriter`` of torch or tensorboardX): every score as a scalar, every figure as an image, the
      headline as text.
    - Weights & Biases (a run, or the module ``wandb`` with one): every score, and the page as ``wandb.Html``.
    - MLflow (the module ``mlflow`` with an active run): every score as a metric, and the page as an artifact.

    Scores that are not finite are left out.

    Args:
        report: as ``bayes_kf.evaluate`` returns it.
        to: where to write.
        step: of the training.
        name: begins every name, ``name/score``.

    Raises:
        ValueError: if ``to`` is none of these.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from bayes_kf.evaluation import evaluate_predictions
        >>> import tempfile
        >>> report = evaluate_predictions([[0.9, 0.1], [0.4, 0.6]], [0, 0], num_simulations=39)
        >>> log_report(report, SummaryWriter(tempfile.mkdtemp()), step=100)
    """
    scores = {f"{name}/{score}": value for score, value in report.scores.items() if math.isfinite(value)}
    if hasattr(to, "add_scalar") and hasattr(to, "add_figure"):
        for key, value in scores.items():
            to.add_scalar(key, value, step)
        for title, figure in report.figures.items():
            to.add_figure(f"{name}/{title}", figure, step, close=False)
        to.add_text(f"{name}/headline", "\n\n".join([*report.headline, report.sections.lead]), step)
        return
    if hasattr(to, "log_metrics") and hasattr(to, "log_text"):
        to.log_metrics(scores, step=step)
        page = name if step is None else f"{name}-{step}"
        to.log_text(report.to_html(), f"{page}.html")
        return
    if getattr(to, "__name__", "") == "wandb" or type(to).__module__.partition(".")[0] == "wandb":
        import wandb

        to.log({**scores, f"{name}/report": wandb.Html(report.to_html())}, step=step)
        return
    raise ValueError(
        "`to` must be a SummaryWriter of TensorBoard, a run of Weights & Biases, or the module mlflow, "
        f"got {type(to).__name__}."
    )
