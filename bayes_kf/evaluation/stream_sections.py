"""What a report says about the stream a posterior learned from and about the belief itself."""

from collections.abc import Mapping

from bayes_kf.evaluation._inputs import Array
from bayes_kf.evaluation.health import innovation_health, innovation_whiteness
from bayes_kf.evaluation.online import prequential_log_loss, running_accuracy
from bayes_kf.evaluation.report import FigureSpec, Sections
from bayes_kf.evaluation.stream_plots import innovation_plot, online_curves, variance_by_tensor
from bayes_kf.evaluation.verdicts import innovation_verdict, whiteness_verdict

WINDOW = 100
LAGS = 10
MAX_TENSORS = 40


def stream_sections(history: Mapping[str, Array] | None, parameter_variance: Mapping[str, Array] | None) -> Sections:
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
        )
    return sections


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
            draw=lambda ax: online_curves(series, window=min(WINDOW, length), ax=ax),
        )


def _add_innovations(sections: Sections, nis: Array, dof: Array) -> None:
    """Innovation ratio of the whole stream, and its course."""
    length = len(nis)
    whole = innovation_health(nis, dof, window=length)
    scores = {"": whole.ratio, "_null_low": whole.low, "_null_high": whole.high}
    sections.scores |= {f"innovation_ratio{suffix}": value.item() for suffix, value in scores.items()}
    sections.verdict.append(innovation_verdict(sections.scores))
    if length > LAGS + 1:
        sections.scores["innovation_whiteness_p"] = innovation_whiteness(nis, dof, LAGS).p_value
        sections.verdict.append(whiteness_verdict(sections.scores))
    sections.drawings["innovation"] = FigureSpec(
        title="Innovation health",
        alt="Curve: " + innovation_verdict(sections.scores),
        draw=lambda ax: innovation_plot(nis, dof, window=min(WINDOW, length), ax=ax),
    )
