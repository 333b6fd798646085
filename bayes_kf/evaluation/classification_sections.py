"""The parts of a report on a classifier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bayes_kf.evaluation._inputs import Array, as_probs, as_vector
from bayes_kf.evaluation.binning import Binning, Kind, make_cells, observed_hits, simulated_hits
from bayes_kf.evaluation.calibration import reliability_bins
from bayes_kf.evaluation.null import Calibrated, Statistic, compare, reliability_band
from bayes_kf.evaluation.ood import ood_scores
from bayes_kf.evaluation.page import table_text
from bayes_kf.evaluation.plots import ece_text, entropy_histogram, reliability_diagram
from bayes_kf.evaluation.report import FigureSpec, Sections, Table
from bayes_kf.evaluation.scores import accuracy, brier_score, negative_log_likelihood
from bayes_kf.evaluation.uncertainty import EntropyParts, entropy
from bayes_kf.evaluation.verdicts import calibration_verdict, confidence_verdict, loss_verdict, ood_verdict

LEVEL = 0.95
COMPARISONS: tuple[tuple[Binning, Kind, dict[str, Statistic]], ...] = (  # what shares cells shares its simulation
    ("equal_width", "top_label", {"confidence_gap": "gap", "ece": "ece", "mce": "mce"}),
    ("equal_mass", "top_label", {"ece_equal_mass": "ece"}),
    ("equal_width", "classwise", {"ece_classwise": "ece"}),
)


@dataclass(frozen=True)
class Chance:
    """How calibration is binned, and how chance is simulated."""

    num_bins: int
    num_simulations: int
    seed: int


def score_section(probs: Tensor, labels: Tensor, log_prob: Array | None, chance: Chance) -> Sections:
    """Accuracy, likelihood and calibration, with the reliability diagram."""
    tests = _calibration_tests(probs, labels, chance)
    scores = {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels) if log_prob is None else _joint_loss(log_prob, len(labels)),
        "brier": brier_score(probs, labels),
        "confidence": probs.max(dim=1).values.mean().item(),
    }
    for name, test in tests.items():
        scores[name] = test.value
        scores |= {f"{name}_{key}": value for key, value in test._asdict().items() if key != "value"}
    verdict = [confidence_verdict(scores), calibration_verdict(scores, len(labels)), loss_verdict(scores)]
    diagram = FigureSpec(
        title="Reliability diagram",
        alt=f"Accuracy against confidence in {chance.num_bins} bins. {ece_text(tests['ece'])}. Numbers under Details.",
        draw=lambda ax: reliability_diagram(probs, labels, **asdict(chance), ax=ax),
        height=4.8,
    )
    return Sections(
        scores=scores,
        verdict=[sentence for sentence in verdict if sentence],
        sizes={"examples": len(labels), "classes": probs.shape[1]},
        drawings={"reliability": diagram},
    )


def entropy_section(probs: Tensor, parts: EntropyParts | None, ood: Mapping[str, Array]) -> Sections:
    """Entropies, and the detection of each foreign set by predictive entropy."""
    known = entropy(probs)
    foreign = {name: entropy(as_probs(values, f"ood[{name!r}]")) for name, values in ood.items()}
    scores = {"entropy": known.mean().item()}
    if parts is not None:
        for name, values in zip(("entropy", "aleatoric", "epistemic"), parts, strict=True):
            scores[name] = as_vector(values, f"uncertainty.{name}").mean().item()
    found = {name: ood_scores(known, values) for name, values in foreign.items()}
    for name, measures in found.items():
        scores |= {f"ood_{name}_{measure}": value for measure, value in measures._asdict().items()}
    means = {"known": known, **foreign}
    words = ", ".join(f"{values.mean():.3f} for {name} inputs" for name, values in means.items())
    histogram = FigureSpec(
        title="Predictive entropy",
        alt=f"Histograms of predictive entropy; the means are {words}, in nats.",
        draw=lambda ax: entropy_histogram(known, foreign, ax=ax),
    )
    return Sections(
        scores=scores,
        verdict=[ood_verdict(name, measures.auroc) for name, measures in found.items()],
        sizes={f"foreign examples, {name}": len(values) for name, values in foreign.items()},
        drawings={"entropy": histogram},
    )


def table_section(probs: Tensor, labels: Tensor, class_names: Sequence[str], chance: Chance) -> Sections:
    """The numbers behind the reliability diagram, and those of each class."""
    return Sections(tables=[_bin_table(probs, labels, chance), _class_table(probs, labels, class_names)])


def _calibration_tests(probs: Tensor, labels: Tensor, chance: Chance) -> dict[str, Calibrated]:
    """Every calibration score beside what chance alone would show."""
    tests: dict[str, Calibrated] = {}
    for binning, kind, statistics in COMPARISONS:
        cells = make_cells(probs, chance.num_bins, binning, kind)
        hits = observed_hits(cells, probs, labels)
        simulated = simulated_hits(cells, probs, chance.num_simulations, chance.seed)
        tests |= {name: compare(statistic, cells, hits, simulated, LEVEL) for name, statistic in statistics.items()}
    return tests


def _joint_loss(log_prob: Array, num_targets: int) -> float:
    """Loss of each target from log probabilities, which may be joint ones of several targets."""
    return -as_vector(log_prob, "log_prob", allow_infinite=True).sum().item() / num_targets


def _bin_table(probs: Tensor, labels: Tensor, chance: Chance) -> Table:
    """Bins that are not empty."""
    bins = reliability_bins(probs, labels, chance.num_bins)
    low, high = reliability_band(probs, **asdict(chance))
    rows = [
        table_text(
            (
                f"{bins.edges[b]:.3f} to {bins.edges[b + 1]:.3f}",
                int(bins.counts[b]),
                bins.confidence[b].item(),
                bins.accuracy[b].item(),
                f"{low[b]:.4f} to {high[b]:.4f}",
            )
        )
        for b in bins.counts.nonzero().flatten().tolist()
    ]
    header = ("Confidence between", "Count", "Mean confidence", "Accuracy", "Chance alone")
    return Table("Reliability, bin by bin", header, tuple(rows))


def _class_table(probs: Tensor, labels: Tensor, class_names: Sequence[str]) -> Table:
    """How often each class came, was expected, and was found."""
    num_classes = probs.shape[1]
    right = labels[probs.argmax(dim=1) == labels]
    came, found = (torch.bincount(chosen, minlength=num_classes) for chosen in (labels, right))
    recall = found / came  # NaN for a class that never came
    frequency, expected = came / len(labels), probs.mean(dim=0)
    rows = [
        table_text((name, int(came[c]), recall[c].item(), frequency[c].item(), expected[c].item()))
        for c, name in enumerate(class_names)
    ]
    header = ("Class", "Examples", "Recall", "Share of examples", "Mean probability")
    return Table("Class by class", header, tuple(rows))
