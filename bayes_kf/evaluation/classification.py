"""The report on a classifier, from its probabilities alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from bayes_kf.evaluation._inputs import Array, as_probs, as_targets, check_positive_int
from bayes_kf.evaluation.classification_sections import LEVEL, Chance, entropy_section, score_section, table_section
from bayes_kf.evaluation.null import check_simulation
from bayes_kf.evaluation.report import Report
from bayes_kf.evaluation.stream_sections import stream_sections
from bayes_kf.evaluation.uncertainty import EntropyParts, entropy_parts


def evaluate_predictions(
    probs: Array,
    targets: Array,
    *,
    samples: Array | None = None,
    uncertainty: EntropyParts | None = None,
    log_prob: Array | None = None,
    ood: Mapping[str, Array] | None = None,
    history: Mapping[str, Array] | None = None,
    parameter_variance: Mapping[str, Array] | None = None,
    config: Mapping[str, object] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    num_bins: int = 15,
    num_simulations: int = 1000,
    seed: int = 0,
) -> Report:
    """Report on class probabilities, wherever they come from.

    Args:
        probs: Class probabilities, (N, C).
        targets: Class indices, (N,).
        samples: Class probabilities of posterior draws, (S, N, C), for aleatoric and epistemic entropy.
        uncertainty: The same three entropies, each (N,), where they are known already.
        log_prob: Predictive log probability of the labels, (N,): used for the likelihood in place of log(probs), which
            may have underflowed. Joint log probabilities of several targets are divided among them.
        ood: Name to class probabilities of foreign inputs, (M, C); predictive entropy is the detector.
        history: Series of the stream: "log_loss", "correct" for each example, "innovation", "dof" for each update.
        parameter_variance: Name to posterior variances of each tensor.
        config: Settings to print.
        class_names: C names.
        title: Title of the page.
        num_bins: Number of bins of all calibration errors.
        num_simulations: Number of simulated data sets behind each band of chance, at least 39.
        seed: Seed of the simulation.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> report = evaluate_predictions(probs, torch.tensor([0, 1, 1]))
        >>> round(report.scores["accuracy"], 3), report.scores["ece_null_high"] > 0.3
        (0.667, True)
    """
    checked = as_probs(probs)
    labels = as_targets(targets, checked)
    check_positive_int(num_bins, "num_bins")
    check_simulation(num_simulations, LEVEL)
    names = _class_names(class_names, checked.shape[1])
    parts = entropy_parts(samples) if uncertainty is None and samples is not None else uncertainty
    chance = Chance(num_bins, num_simulations, seed)
    sections = (
        score_section(checked, labels, log_prob, chance)
        + entropy_section(checked, parts, ood or {})
        + stream_sections(history, parameter_variance)
        + table_section(checked, labels, names, chance)
    )
    settings = {**(config or {}), **asdict(chance)}
    return Report(
        title=title or "Evaluation of a classifier",
        config={name: str(value) for name, value in settings.items()},
        sections=sections,
    )


def _class_names(class_names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """The names, or numbers."""
    if class_names is None:
        return [str(c) for c in range(num_classes)]
    if len(class_names) != num_classes:
        raise ValueError(f"`class_names` must hold {num_classes} names, got {len(class_names)}.")
    return [str(name) for name in class_names]
