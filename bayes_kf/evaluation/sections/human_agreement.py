"""Section on the agreement of a model with people's answers."""

import torch

from bayes_kf.evaluation.calibration.score_summary import LEVEL
from bayes_kf.evaluation.classification.entropy import entropy
from bayes_kf.evaluation.classification.human_agreement import check_human, human_agreement, rounded_entropy
from bayes_kf.evaluation.inputs import Array
from bayes_kf.evaluation.plots.human_agreement import human_entropy_plot
from bayes_kf.evaluation.report.contents import FigureSpec, Sections
from bayes_kf.evaluation.report.sortable_tables import Table, make_table
from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.human_agreement import entropy_correlation_verdict, human_verdict

NUM_GROUPS = 10  # of examples in the table


def human_section(probs: Array, human: Array) -> Sections:
    """Scores against people's answers, with their intervals, verdicts and the figure of both entropies.

    Args:
        probs: Class probabilities, (N, C).
        human: Shares of people's answers, (N, C), rows sum to one.

    Raises:
        ValueError: If an argument is malformed or the shapes differ.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
        >>> section = human_section(probs, probs)
        >>> section.scores["human_tv"].value, round(section.scores["human_entropy_spearman"].value, 4)
        (0.0, 1.0)
    """
    predicted, answers = check_human(probs, human)
    agreement = human_agreement(predicted, answers, level=LEVEL)
    scores = {
        "human_nll": agreement.nll.score(),
        "human_entropy": Score(entropy(answers).mean().item()),
        "human_kl": agreement.kl.score(),
        "human_tv": agreement.total_variation.score(),
        "human_entropy_spearman": agreement.entropy_spearman.score(),
        "human_entropy_pearson": Score(agreement.entropy_pearson),
    }
    sentence = entropy_correlation_verdict(scores["human_entropy_spearman"])
    figure = FigureSpec(
        title="Entropy of people and of the model",
        alt=f"Entropy of the prediction against entropy of people's answers for {len(answers):,} examples. {sentence}",
        draw=lambda ax: human_entropy_plot(predicted, answers, ax=ax),
        table=_entropy_table(predicted, answers),
    )
    return Sections(
        scores=scores,
        verdict=[human_verdict(scores), sentence],
        drawings={"human_entropy": figure},
    )


def _entropy_table(probs: torch.Tensor, human: torch.Tensor) -> Table:
    """Mean entropies in groups of equal size, sorted by the entropy of people's answers."""
    human_entropy, model_entropy = rounded_entropy(human), rounded_entropy(probs)
    order = human_entropy.sort(stable=True).indices
    rows = [
        (k + 1, len(part), human_entropy[part].mean().item(), model_entropy[part].mean().item())
        for k, part in enumerate(order.tensor_split(min(NUM_GROUPS, len(order))))
    ]
    header = (
        "Group, by increasing entropy of people",
        "Examples",
        "Entropy of people's answers",
        "Entropy of the prediction",
    )
    return make_table("Entropy of people and of the model", header, rows)
