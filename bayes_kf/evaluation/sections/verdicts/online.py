"""Sentences on the innovations of a stream."""

from bayes_kf.evaluation.score import Score
from bayes_kf.evaluation.sections.verdicts.phrases import decimal_range, null_band_of, p_value_text, round_up

DETECTABLE_RATIO = 1.5  # a null band that reaches further cannot show inconsistency
SIGNIFICANCE = 0.01  # of the test of whiteness


def innovation_verdict(ratio: Score) -> str:
    """Whether squared innovations match the covariance that the filter predicts for them."""
    null_band = null_band_of(ratio)
    numbers = (
        f"squared innovations are {ratio.value:.2f} times their expectation (null band {decimal_range(null_band, 2)})"
    )
    if ratio.null_position == 0 and null_band.high > DETECTABLE_RATIO:
        needed = round_up(2.0 * (1.96 / (DETECTABLE_RATIO - 1.0)) ** 2)  # χ²/d has the variance 2/d
        return (
            f"Too few updates to tell whether the filter was consistent: {numbers}. About {needed:,} degrees of "
            f"freedom would distinguish a ratio of {DETECTABLE_RATIO:g} from 1."
        )
    word = ("consistent", "over-confident", "under-confident")[ratio.null_position]
    return f"The filter was {word}: {numbers}."


def whiteness_verdict(p: float) -> str:
    """Whether innovations are autocorrelated."""
    test = f"Ljung-Box test of ranks, ten lags, {p_value_text(p)}"
    if p >= SIGNIFICANCE:
        return f"No autocorrelation of the squared innovations detected at the 1 % level ({test})."
    return (
        f"The squared innovations are autocorrelated ({test}): large ones come in runs because the stream changes, or "
        "because the filter lags behind it."
    )
