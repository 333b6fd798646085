"""Sections on the stream that a posterior was fitted to, and on the variance of each tensor."""

from collections.abc import Mapping

import torch

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.online.innovations import innovation_health, innovation_whiteness
from bayes_kf.evaluation.online.prequential import moving_average, prequential_log_loss, running_accuracy
from bayes_kf.evaluation.plots.online import innovation_plot, online_curves
from bayes_kf.evaluation.plots.tensor_variance import output_variance_plot, variance_by_tensor
from bayes_kf.evaluation.report.contents import FigureSpec, Sections
from bayes_kf.evaluation.report.sortable_tables import Cell, Table, make_table
from bayes_kf.evaluation.score import Interval, Score
from bayes_kf.evaluation.sections.verdicts.online import innovation_verdict, whiteness_verdict

MAX_WINDOW = 100
MIN_WINDOWS = 5  # in a short stream the window is smaller, so that the curve has several independent points
LAGS = 10
MIN_WHITENESS_UPDATES = 100  # with 30 updates the test at 1 % is wrong in 5 % of streams
MAX_TENSORS = 40
TABLE_ROWS = 20


def stream_sections(
    history: Mapping[str, Array] | None,
    parameter_variance: Mapping[str, Array] | None,
    output_variance: Mapping[str, float] | None = None,
) -> Sections:
    """Scores and figures of the series and variances that are given."""
    recorded = {name: values for name, values in (history or {}).items() if len(values)}
    sections = _learning_section(recorded)
    has_dof = bool(torch.as_tensor(recorded.get("dof", torch.zeros(1))).any())  # sequences of tokens have none
    if "innovation" in recorded and has_dof:
        sections += _innovation_section(recorded["innovation"], recorded["dof"])
    if parameter_variance:
        sections += Sections(drawings={"variance": _variance_figure(parameter_variance)})
    if output_variance:
        sections += Sections(drawings={"output_variance": _output_variance_figure(output_variance)})
    return sections


def window_of(length: int) -> int:
    """Values in a moving mean over a series of ``length``."""
    return max(1, min(MAX_WINDOW, length // MIN_WINDOWS))


def even_steps(length: int) -> list[int]:
    """At most `TABLE_ROWS` evenly spaced indices of a series, including the last one."""
    rows = min(TABLE_ROWS, length)
    return [(k + 1) * length // rows - 1 for k in range(rows)]


def _learning_section(history: Mapping[str, Array]) -> Sections:
    """Running accuracy and log loss."""
    series = {name: history[name] for name in ("correct", "log_loss") if name in history}
    if not series:
        return Sections()
    scores: dict[str, Score] = {}
    results = []
    if "correct" in series:
        accuracy = running_accuracy(series["correct"])[-1].item()
        scores["online_accuracy"] = Score(accuracy)
        results.append(f"the final running accuracy is {accuracy:.3f}")
    if "log_loss" in series:
        loss = prequential_log_loss(series["log_loss"])[-1].item()
        scores["prequential_log_loss"] = Score(loss)
        results.append(f"the mean log loss is {loss:.3f} nats")
    length = min(len(values) for values in series.values())
    figure = FigureSpec(
        title="Learning online",
        alt=f"Curves over {length:,} examples: {', '.join(results)}.",
        draw=lambda ax: online_curves(series, window=window_of(length), ax=ax),
        table=_online_table(series, length),
    )
    return Sections(scores=scores, drawings={"online": figure})


def _innovation_section(nis: Array, dof: Array) -> Sections:
    """Innovation ratio of the whole stream, test of whiteness, and the ratio in windows."""
    length = len(nis)
    whole = innovation_health(nis, dof, window=length)
    ratio = Score(whole.ratio.item(), null_band=Interval(whole.low.item(), whole.high.item()))
    sentence = innovation_verdict(ratio)
    figure = FigureSpec(
        title="Innovation consistency",
        alt=f"Curve over the stream. {sentence}",
        draw=lambda ax: innovation_plot(nis, dof, window=window_of(length), ax=ax),
        table=_innovation_table(nis, dof, window_of(length)),
    )
    section = Sections(
        scores={"innovation_ratio": ratio},
        tested=["innovation_ratio"],
        verdict=[sentence],
        drawings={"innovation": figure},
    )
    if length >= MIN_WHITENESS_UPDATES:
        p_value = innovation_whiteness(nis, dof, LAGS).p_value
        section += Sections(scores={"innovation_whiteness_p": Score(p_value)}, verdict=[whiteness_verdict(p_value)])
    return section


def _variance_figure(variance: Mapping[str, Array]) -> FigureSpec:
    """Mean posterior variance of each tensor."""
    means = {name: as_float(values, "parameter_variance").mean().item() for name, values in variance.items()}
    return FigureSpec(
        title="Posterior variance by tensor",
        alt=f"Mean posterior variance of each of {len(means)} tensors on a logarithmic scale.",
        draw=lambda ax: variance_by_tensor(variance, max_tensors=MAX_TENSORS, ax=ax),
        height=_tensor_height(len(means)),
        table=_tensor_table("Mean posterior variance", means),
    )


def _output_variance_figure(contributions: Mapping[str, float]) -> FigureSpec:
    """Contribution of each tensor to the variance of the outputs."""
    total = sum(contributions.values())
    largest = max(contributions, key=lambda name: contributions[name])
    share = f", {100 * contributions[largest] / total:.0f} %" if total > 0 else ""
    return FigureSpec(
        title="Variance of the outputs by tensor",
        alt=f"Contributions of {len(contributions)} tensors to the variance of the outputs, {total:.3g} in total. The "
        f"largest is that of {largest}{share}.",
        draw=lambda ax: output_variance_plot(contributions, max_tensors=MAX_TENSORS, ax=ax),
        height=_tensor_height(len(contributions)),
        table=_tensor_table("Contribution to the variance of the outputs", {**contributions, "all tensors": total}),
    )


def _tensor_height(num_tensors: int) -> float:
    """Height of a figure with a row for each tensor, in inches."""
    return max(2.4, 1.4 + 0.24 * min(num_tensors, MAX_TENSORS))


def _online_table(series: Mapping[str, Array], length: int) -> Table:
    """The curves at even steps; the moving mean starts with its first full window."""
    columns = {}
    if "correct" in series:
        columns["Running accuracy"] = running_accuracy(series["correct"])
    if "log_loss" in series:
        window = window_of(length)
        full = moving_average(series["log_loss"], window)
        columns[f"Log loss, mean of {window}"] = torch.cat([full.new_full((window - 1,), torch.nan), full])
    rows = [(k + 1, *(column[k].item() for column in columns.values())) for k in even_steps(length)]
    return make_table("Learning online", ("Examples seen", *columns), rows)


def _innovation_table(nis: Array, dof: Array, window: int) -> Table:
    """The ratio and its null band at even steps."""
    health = innovation_health(nis, dof, window)
    rows = [
        (int(health.step[k]), health.ratio[k].item(), health.low[k].item(), health.high[k].item())
        for k in even_steps(len(health.ratio))
    ]
    return make_table("Innovation consistency", ("Updates", "Ratio", "Null band from", "to"), rows)


def _tensor_table(quantity: str, values: Mapping[str, float]) -> Table:
    """A number for each tensor."""
    rows = [(name, Cell(f"{value:.3g}", value)) for name, value in values.items()]
    return make_table(f"{quantity} by tensor", ("Tensor", quantity), rows)
