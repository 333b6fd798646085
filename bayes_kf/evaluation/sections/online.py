"""What a report says about the stream a posterior learned from and about the belief itself."""

from collections.abc import Mapping

import torch

from bayes_kf.evaluation.inputs import Array, as_float
from bayes_kf.evaluation.online.innovations import innovation_health, innovation_whiteness
from bayes_kf.evaluation.online.prequential import moving_average, prequential_log_loss, running_accuracy
from bayes_kf.evaluation.plots.online import innovation_plot, online_curves, output_variance_plot, variance_by_tensor
from bayes_kf.evaluation.report.html_page import table_text
from bayes_kf.evaluation.report.report import FigureSpec, Sections, Table
from bayes_kf.evaluation.sections.verdicts import innovation_verdict, whiteness_verdict

WINDOW = 100  # of a long stream
WINDOWS = 5  # at least so many windows in a stream: with one of all its values there is no course to draw
LAGS = 10
FEWEST_WHITE = 100  # updates for the test of whiteness: with 30 it was wrong in 5 % of streams, not in 1 %
MAX_TENSORS = 40
TABLE_ROWS = 20


def stream_sections(
    history: Mapping[str, Array] | None,
    parameter_variance: Mapping[str, Array] | None,
    output_variance: Mapping[str, float] | None = None,
) -> Sections:
    """Scores and figures of whatever series are there."""
    sections = Sections()
    recorded = {name: values for name, values in (history or {}).items() if len(values)}
    _add_online(sections, recorded)
    if "innovation" in recorded and "dof" in recorded:
        _add_innovations(sections, recorded["innovation"], recorded["dof"])
    if parameter_variance:
        height = 1.4 + 0.24 * min(len(parameter_variance), MAX_TENSORS)
        sections.drawings["variance"] = FigureSpec(
            title="Posterior variance by tensor",
            alt=f"Points: mean posterior variance of each of {len(parameter_variance)} tensors, logarithmic scale.",
            draw=lambda ax: variance_by_tensor(parameter_variance, max_tensors=MAX_TENSORS, ax=ax),
            height=max(2.4, height),
            table=_tensor_table(
                "Mean posterior variance",
                {name: as_float(v, "parameter_variance").mean().item() for name, v in parameter_variance.items()},
            ),
        )
    if output_variance:
        _add_output_variance(sections, output_variance)
    return sections


def _add_output_variance(sections: Sections, contributions: Mapping[str, float]) -> None:
    """What each tensor contributes to the variance of the outputs."""
    total = sum(contributions.values())
    largest = max(contributions, key=lambda name: contributions[name])
    share = f" with {contributions[largest] / total:.0%}" if total > 0 else ""
    table = _tensor_table("Contribution to the variance of the outputs", {**contributions, "all tensors": total})
    sections.drawings["output_variance"] = FigureSpec(
        title="Variance of the outputs by tensor",
        alt=f"Bars: what each of {len(contributions)} tensors contributes to the outputs' variance, {total:.3g} in "
        f"all. The largest is {largest}{share}.",
        draw=lambda ax: output_variance_plot(contributions, max_tensors=MAX_TENSORS, ax=ax),
        height=max(2.4, 1.4 + 0.24 * min(len(contributions), MAX_TENSORS)),
        table=table,
    )


def window_of(length: int) -> int:
    """Values in a moving mean over a series of ``length``."""
    return max(1, min(WINDOW, length // WINDOWS))


def _add_online(sections: Sections, history: Mapping[str, Array]) -> None:
    """Running accuracy and log loss."""
    series = {name: history[name] for name in ("correct", "log_loss") if name in history}
    words = []
    if "correct" in series:
        sections.scores["online_accuracy"] = running_accuracy(series["correct"])[-1].item()
        words.append(f"running accuracy ends at {sections.scores['online_accuracy']:.3f}")
    if "log_loss" in series:
        sections.scores["prequential_log_loss"] = prequential_log_loss(series["log_loss"])[-1].item()
        words.append(f"log loss is {sections.scores['prequential_log_loss']:.3f} nats on average")
    if series:
        length = min(len(values) for values in series.values())
        sections.drawings["online"] = FigureSpec(
            title="Learning online",
            alt=f"Curves over {length:,} examples: {', '.join(words)}.",
            draw=lambda ax: online_curves(series, window=window_of(length), ax=ax),
            table=_online_table(series, length),
        )


def _add_innovations(sections: Sections, nis: Array, dof: Array) -> None:
    """Innovation ratio of the whole stream, and its course."""
    length = len(nis)
    whole = innovation_health(nis, dof, window=length)
    scores = {"": whole.ratio, "_null_low": whole.low, "_null_high": whole.high}
    sections.scores |= {f"innovation_ratio{suffix}": value.item() for suffix, value in scores.items()}
    sections.verdict.append(innovation_verdict(sections.scores))
    if length >= FEWEST_WHITE:
        sections.scores["innovation_whiteness_p"] = innovation_whiteness(nis, dof, LAGS).p_value
        sections.verdict.append(whiteness_verdict(sections.scores))
    sections.drawings["innovation"] = FigureSpec(
        title="Innovation health",
        alt="Curve: " + innovation_verdict(sections.scores),
        draw=lambda ax: innovation_plot(nis, dof, window=window_of(length), ax=ax),
        table=_innovation_table(nis, dof, window_of(length)),
    )


def even_steps(length: int) -> list[int]:
    """At most `TABLE_ROWS` places of a series, evenly spaced, the last one among them."""
    rows = min(TABLE_ROWS, length)
    return [(k + 1) * length // rows - 1 for k in range(rows)]


def _online_table(series: Mapping[str, Array], length: int) -> Table:
    """The curves at even steps; the moving mean begins with its first full window."""
    columns = {}
    if "correct" in series:
        columns["Running accuracy"] = running_accuracy(series["correct"])
    if "log_loss" in series:
        window = window_of(length)
        full = moving_average(series["log_loss"], window)
        columns[f"Log loss, mean of {window}"] = torch.cat([full.new_full((window - 1,), torch.nan), full])
    rows = [table_text((k + 1, *(column[k].item() for column in columns.values()))) for k in even_steps(length)]
    return Table("Learning online", ("Examples seen", *columns), tuple(rows))


def _innovation_table(nis: Array, dof: Array, window: int) -> Table:
    """The ratio and its band at even steps."""
    health = innovation_health(nis, dof, window)
    rows = [
        table_text((int(health.step[k]), health.ratio[k].item(), health.low[k].item(), health.high[k].item()))
        for k in even_steps(len(health.ratio))
    ]
    return Table("Innovation health", ("Updates", "Ratio", "Band from", "to"), tuple(rows))


def _tensor_table(quantity: str, values: Mapping[str, float]) -> Table:
    """A number for each tensor."""
    rows = tuple((name, f"{value:.3g}") for name, value in values.items())
    return Table(f"{quantity} by tensor", ("Tensor", quantity), rows)
