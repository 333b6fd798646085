"""Options of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bayes_kf.evaluation.calibration.score_summary import LEVEL
from bayes_kf.evaluation.inputs import Array, check_positive_int
from bayes_kf.evaluation.recalibration.conformal_sets import ConformalSets
from bayes_kf.evaluation.recalibration.scaling import Recalibration
from bayes_kf.evaluation.resampling.null_test import NullSettings, check_simulation
from bayes_kf.evaluation.resampling.sample_design import SampleDesign
from bayes_kf.evaluation.sections.advice import Calls


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Everything about a report except the predictions and their targets. The functions that make reports say more.

    Attributes:
        null: Bins of the calibration errors, and simulation of the null bands.
        title: Title of the page.
        config: Settings to print.
        history: Series of a stream.
        parameter_variance: Name to posterior variances of each tensor.
        output_variance: Name to contribution of each tensor to the variance of the outputs.
        ood: Name to out-of-distribution inputs: a loader or class probabilities. This and the following options are for
            class probabilities only.
        examples: The examples themselves.
        human: Shares of people's answers.
        recalibration: A recalibration fitted on other examples.
        conformal: Conformal sets fitted on other examples.
        ordered: Whether the classes have an order.
        top_k: Numbers of most probable classes that count together.
        class_names: Names of the classes.
        groups: Kinds of groups of the examples.
        design: Weights and clusters of the examples.
        calls: Code that the advice names.

    Raises:
        ValueError: If the null settings give no 95 % band.
    """

    null: NullSettings
    title: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    history: Mapping[str, Array] | None = None
    parameter_variance: Mapping[str, Array] | None = None
    output_variance: Mapping[str, float] | None = None
    ood: Mapping[str, Any] = field(default_factory=dict)
    examples: Any = None
    human: Array | None = None
    recalibration: Recalibration | None = None
    conformal: ConformalSets | None = None
    ordered: bool = False
    top_k: Sequence[int] | None = None
    class_names: Sequence[str] | None = None
    groups: Mapping[str, Any] = field(default_factory=dict)
    design: SampleDesign | None = None
    calls: Calls = field(default_factory=Calls)

    def __post_init__(self) -> None:
        """Check the null settings."""
        check_positive_int(self.null.num_bins, "num_bins")
        check_simulation(self.null.num_simulations, LEVEL)

    def check_no_classes(self) -> None:
        """Check that no option for class probabilities is set.

        Raises:
            ValueError: If one is.
        """
        for name in ("ood", "human", "recalibration", "conformal", "groups"):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, dict) and not given):
                raise ValueError(f"`{name}` must be None for a posterior without class probabilities, got one.")
        for name in ("ordered", "top_k", "class_names"):
            given = getattr(self, name)
            if given:
                raise ValueError(
                    f"`{name}` must be left out for a posterior without class probabilities, got {given!r}."
                )

    def check_design(self) -> None:
        """Check that weights and clusters are given only with what takes them.

        Raises:
            ValueError: If people's answers are given too.
        """
        if self.design is not None and self.human is not None:
            raise ValueError("`human` must be left out with weights or clusters, got both.")

    def check_no_examples(self) -> None:
        """Check that nothing is given that belongs to single examples, where tokens, pixels or labels count as such.

        Raises:
            ValueError: If something is.
        """
        for name in ("examples", "human"):
            given = getattr(self, name)
            if given is not None and len(given):
                raise ValueError(f"`{name}` must be left out if tokens, pixels or labels count as examples, got some.")

    def top_k_of(self, num_classes: int) -> Sequence[int]:
        """The given numbers of classes, by default 5 if there are more than 10 classes.

        Raises:
            ValueError: If one is not an integer from 2 to the number of classes.
        """
        if self.top_k is None:
            return (5,) if num_classes > 10 else ()
        for k in self.top_k:
            if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= num_classes:
                raise ValueError(
                    f"`top_k` must hold integers from 2 to the number of classes, {num_classes}, got {k!r}."
                )
        return self.top_k

    def class_names_of(self, num_classes: int) -> list[str]:
        """The given class names, by default the class indices.

        Raises:
            ValueError: If their number is not that of the classes.
        """
        if self.class_names is None:
            return [str(c) for c in range(num_classes)]
        if len(self.class_names) != num_classes:
            raise ValueError(f"`class_names` must hold {num_classes} names, got {len(self.class_names)}.")
        return [str(name) for name in self.class_names]

    def printed_config(self, **settings: object) -> dict[str, str]:
        """The settings to print, those given here last, as text."""
        return {name: str(value) for name, value in {**self.config, **settings}.items()}
