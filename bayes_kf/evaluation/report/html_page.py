"""The page of a report: numbers made readable, figures embedded, everything escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import platform
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayes_kf._version import __version__
from bayes_kf.evaluation.inputs import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "accuracy": ("Accuracy", "share of right predictions"),
    "nll": ("Negative log-likelihood", "nats per target; lower is better"),
    "brier": ("Brier score", "0 to 2; lower is better"),
    "brier_miscalibration": ("… of it miscalibration", "probability against frequency, bin by bin; lower is better"),
    "brier_resolution": ("… less resolution", "how far frequencies of bins differ; higher is better"),
    "brier_uncertainty": ("… of it the labels' own", "the Brier score of the overall frequencies"),
    "brier_within": ("… of it inside the bins", "what differences inside bins add or take off"),
    "rps": ("Ranked probability score", "0 to classes − 1; lower is better"),
    "confidence": ("Mean confidence", "probability of the predicted class"),
    "confidence_gap": ("Confidence − accuracy", "above zero: over-confident"),
    "ece": ("ECE", "top label, bins of equal width"),
    "ece_equal_mass": ("ECE, equal mass", "top label, bins of equal counts"),
    "ece_classwise": ("ECE, classwise", "mean over the classes"),
    "mce": ("MCE", "the worst bin, however small"),
    "ece_debiased": ("Calibration error, debiased", "root mean square, bins of equal counts, less what chance adds"),
    "ece_smooth": ("ECE, smooth", "a kernel as wide as the error in place of bins"),
    "ks": ("Calibration error, KS", "largest gap of cumulative confidence and accuracy"),
    "spiegelhalter": ("Spiegelhalter's z", "Brier score less its expectation, in standard deviations"),
    "entropy": ("Predictive entropy", "nats, mean"),
    "margin": ("Margin", "between the two most probable classes, mean"),
    "aleatoric": ("… of it aleatoric", "nats; what more data cannot remove"),
    "epistemic": ("… of it epistemic", "nats; what more data would remove"),
    "aurc": ("AURC", "area under the risk-coverage curve; lower is better"),
    "aurc_excess": ("… of it above the best order", "zero where confidence puts every error last"),
    "accuracy_at_80": ("Accuracy at 80 % coverage", "of the most confident 80 %"),
    "accuracy_at_90": ("Accuracy at 90 % coverage", "of the most confident 90 %"),
    "accuracy_at_95": ("Accuracy at 95 % coverage", "of the most confident 95 %"),
    "error_entropy_auroc": ("Errors by entropy: AUROC", "0.5 is chance, 1 is perfect"),
    "error_entropy_aupr": ("Errors by entropy: AUPR", "chance is the share of errors"),
    "error_entropy_fpr95": ("Errors by entropy: FPR@95", "right ones flagged with 95 % of the errors; lower is better"),
    "error_confidence_auroc": ("Errors by 1 − confidence: AUROC", "0.5 is chance, 1 is perfect"),
    "error_confidence_aupr": ("Errors by 1 − confidence: AUPR", "chance is the share of errors"),
    "error_confidence_fpr95": (
        "Errors by 1 − confidence: FPR@95",
        "right ones flagged with 95 % of the errors; lower is better",
    ),
    "recalibrated_accuracy": ("Recalibrated: accuracy", "share of right predictions"),
    "recalibrated_nll": ("Recalibrated: negative log-likelihood", "nats per target; lower is better"),
    "recalibrated_nll_change": ("… its change", "nats; below zero: the recalibration gains"),
    "recalibrated_brier": ("Recalibrated: Brier score", "0 to 2; lower is better"),
    "recalibrated_ece": ("Recalibrated: ECE", "top label, bins of equal width"),
    "conformal_coverage": ("Conformal sets: coverage", "share of labels inside"),
    "conformal_size": ("Conformal sets: mean size", "classes in a set; smaller is better at equal coverage"),
    "conformal_empty": ("Conformal sets: empty ones", "share of all sets"),
    "rmse": ("RMSE", "in the target's unit; lower is better"),
    "crps": ("CRPS", "in the target's unit; lower is better"),
    "sharpness": ("Sharpness", "root mean predictive variance, in the target's unit"),
    "ence": ("ENCE", "predicted against found spread, relative, mean over bins"),
    "pit_ks": ("PIT, Kolmogorov-Smirnov", "distance of the PIT values from even ones"),
    "quantile_error": ("Quantile calibration error", "share of targets below a quantile less its level, mean"),
    "human_nll": ("Log loss of people's answers", "nats per answer; lower is better"),
    "human_entropy": ("… of it people's own entropy", "nats; the least that any model could have"),
    "human_kl": ("… of it divergence of the model", "nats; zero where the model predicts people's shares"),
    "human_tv": ("Total variation to people's answers", "0 to 1; lower is better"),
    "human_entropy_spearman": ("Doubt of people and model, Spearman", "rank correlation of their entropies"),
    "human_entropy_pearson": ("Doubt of people and model, Pearson", "correlation of their entropies"),
    "online_accuracy": ("Online accuracy", "each example predicted before it was learned"),
    "prequential_log_loss": ("Prequential log loss", "nats per example; lower is better"),
    "innovation_ratio": ("Innovation² / degrees of freedom", "one for a consistent filter"),
    "innovation_whiteness_p": ("Whiteness of innovations, p value", "small where large ones come in runs"),
}
OOD_LABELS = {
    "auroc": ("AUROC", "0.5 is chance, 1 is perfect"),
    "aupr": ("AUPR", "chance is the share of foreign inputs"),
    "fpr95": ("FPR@95", "known inputs flagged when 95 % of the foreign are; lower is better"),
}
LARGEST_SVG = 400_000  # bytes; a figure of more paths is smaller, and quicker to show, as pixels
PIXELS_PER_INCH = 200


def render_page(**content: Any) -> str:
    """The page as HTML; every text is escaped by the template engine, and no script runs but the page's own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bayes_kf.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("report.js").render()
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(script_hash=script_hash, **content)


def figure_uri(figure: Figure) -> str:
    """The figure as a data URI of an SVG image, sharp at any size, or of a PNG image where the SVG would be large."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "bayes_kf"}):  # the same report gives the same bytes
        image = _saved(figure, format="svg", metadata={"Date": None})
    if len(image) <= LARGEST_SVG:
        return data_uri(image, "image/svg+xml")
    return data_uri(_saved(figure, format="png", dpi=PIXELS_PER_INCH), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    """A file of that media type as an address that holds it.

    Example:
        >>> data_uri(b"abc", "text/plain")
        'data:text/plain;base64,YWJj'
    """
    return f"data:{kind};base64," + base64.b64encode(content).decode("ascii")


def fingerprint(array: Array) -> str:
    """SHA-256 of an array: of its shape, then of its values as little-endian float64, or int64 where they are integers.

    The same numbers have the same fingerprint in torch and NumPy and in every precision that holds them.

    Args:
        array: Real numbers, of any shape.

    Raises:
        ValueError: If the numbers are complex.

    Example:
        >>> found = fingerprint(torch.tensor([[0.5, 0.5]]))
        >>> found[:16], found == fingerprint(np.array([[0.5, 0.5]])), found == fingerprint(np.array([0.5, 0.5]))
        ('9ae723c84fff86ca', True, False)
    """
    tensor = torch.as_tensor(array).detach().cpu()
    if tensor.is_complex():
        raise ValueError(f"`array` must hold real numbers, got {tensor.dtype}.")
    values = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64).contiguous().numpy()
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).reshape(-1).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what computed a report.

    Example:
        >>> list(versions())
        ['bayes_kf', 'torch', 'numpy', 'python']
    """
    found = {"bayes_kf": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    return found | {"python": platform.python_version()}


def known_label(name: str) -> tuple[str, str] | None:
    """Name of a score for people with a remark, or None where the score is unknown."""
    data_set, _, measure = name.removeprefix("ood_").rpartition("_")
    if name.startswith("ood_") and measure in OOD_LABELS:
        label, remark = OOD_LABELS[measure]
        return f"Foreign “{data_set}”: {label}", remark
    if found := re.fullmatch(r"coverage_(\d+)", name):
        return f"Coverage of {found[1]} % intervals", "share of targets inside"
    if found := re.fullmatch(r"ece_top(\d+)", name):
        return f"ECE, top {found[1]}", f"label among the {found[1]} most probable classes, bins of equal width"
    return LABELS.get(name)


def label_of(name: str) -> tuple[str, str]:
    """Name of a score for people with a remark; an unknown one as it is.

    Example:
        >>> label_of("coverage_95"), label_of("mine")
        (('Coverage of 95 % intervals', 'share of targets inside'), ('mine', ''))
    """
    return known_label(name) or (name, "")


def number(value: float) -> str:
    """A number with four decimals (fewer for large ones, two digits of small ones), or words for what is not finite.

    Up to a billionth it is zero: sums of scores are no more exact.

    Example:
        >>> number(0.12345), number(1234.5), number(0.0000123), number(float("inf")), number(float("nan"))
        ('0.1235', '1234', '0.000012', '∞', 'not defined')
    """
    if math.isnan(value):
        return "not defined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    if 1e-9 < abs(value) < 1e-3:
        text = np.format_float_positional(value, precision=2, fractional=False, trim="-")
    return (text if float(text) else text.lstrip("-")).replace("-", "−")


def table_text(values: Iterable[float | int | str]) -> tuple[str, ...]:
    """A row of a table as text."""
    return tuple(v if isinstance(v, str) else f"{v:,}" if isinstance(v, int) else number(v) for v in values)


def _saved(figure: Figure, **settings: Any) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, **settings)
    return buffer.getvalue()
