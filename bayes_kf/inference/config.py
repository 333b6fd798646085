"""The settings of a filter."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bayes_kf.files.checksums import CHECKSUMS_FILE, is_listed
from bayes_kf.files.staging import staging
from bayes_kf.inference.config_combinations import check_combinations
from bayes_kf.inference.config_field import (
    check_dof,
    check_forgetting,
    check_integer,
    optional,
    setting,
    word_or_positive,
)
from bayes_kf.inference.config_groups import (
    CovarianceSettings,
    CurvatureSettings,
    DynamicsSettings,
    FittingSettings,
    NoiseSettings,
    PredictiveSettings,
    PriorSettings,
)
from bayes_kf.inference.covariance.gaussian_belief import GaussianBelief
from bayes_kf.inference.covariance.structure import STRUCTURES
from bayes_kf.models.likelihood import LIKELIHOODS
from bayes_kf.validation import (
    check_bool,
    check_inside_unit_interval,
    check_not_negative,
    check_one_of,
    check_positive,
    check_share,
    check_whole,
    did_you_mean,
)

NOISES = ("exponential_family", "ema_taylor", "ema_residual", "identity", "decaying")
RULES = ("constant", "uniform")
SPREADS = ("modules", "tensors", "constant", "bounded")
LORA_INPUTS = ("peft", "whitened")
BLOCKS = ("tensors", "modules")
EXPANSIONS = ("mode", "mean")
CURVATURES = ("exact", "truncated", "sampled")
PENALTIES = ("transient", "permanent")
CHOICES: dict[str, tuple[str, ...]] = {
    "likelihood": tuple(LIKELIHOODS),
    "noise": NOISES,
    "initial_rule": RULES,
    "initial_spread": SPREADS,
    "lora_inputs": LORA_INPUTS,
    "blocks": BLOCKS,
    "gradient_penalty_form": PENALTIES,
    "expansion": EXPANSIONS,
    "curvature": CURVATURES,
}
"""The allowed words of each setting whose value is a word."""
WHOLE = ("rank", "curvature_classes", "curvature_draws", "passes", "tune_examples")  # whole numbers >= 1
CONFIG_FILE = "kalman_config.json"


@dataclass(frozen=True)
class KalmanConfig:
    """Settings of a Kalman filter over adapter parameters, checked when the object is made.

    Inner functions take the groups of settings that they use: ``prior_settings``, ``noise_settings`` and so on.

    Raises:
        TypeError: for a setting that does not exist.
        ValueError: one sentence for the first bad value.

    Example:
        >>> KalmanConfig(beta=1.0)
        Traceback (most recent call last):
        ...
        ValueError: `beta` must lie strictly between 0 and 1, got 1.0.
    """

    likelihood: str = setting(
        "categorical",
        'The observation model: "categorical", "bernoulli" (an answer of yes or no for each output), "ordinal" '
        '(classes in an order, with an output fewer than classes; see OrdinalHead), "gaussian", "poisson", "student_t" '
        '(real targets with outliers), "heteroscedastic_gaussian" (two outputs a target: the means, then the log '
        'variances) or "tokens" (the learned tokens of text or labels of tokens, as SupervisedTokens and '
        "LabelledTokens read them).",
    )
    covariance: str = setting(
        "low_rank",
        'The covariance structure: "low_rank" (low rank plus diagonal), "diagonal" (gain form, as in the papers), '
        '"diagonal_information", "diagonal_mixed", "block_diagonal" or "full".',
    )
    noise: str = setting(
        "exponential_family",
        'The observation noise R. "exponential_family": the variance of the likelihood. "ema_taylor" and '
        '"ema_residual": equations 12 and 7 of LoKO. "identity": I. "decaying": exp(−k/50) I at update k.',
    )
    noise_variance: float | str = setting(
        1.0,
        'σ² of a Gaussian likelihood, in squared units of the targets, or "estimated"; of a Student-t likelihood '
        'its squared scale. With "identity" and "decaying" noise, the unit of R.',
        check=word_or_positive("estimated"),
    )
    student_dof: float = setting(
        4.0,
        "ν > 2, the degrees of freedom of a Student-t likelihood: the smaller, the less an outlier counts.",
        check=check_dof,
    )
    initial_logit_sd: float = setting(
        3.0,
        "Prior standard deviation of the outputs (logits). The prior variances of the parameters follow from it. "
        "Used when initial_variance is None.",
        check=check_positive,
    )
    initial_spread: str = setting(
        "modules",
        'How initial_logit_sd is shared among the parameters. "modules": a module adds variance proportional to '
        'the square root of its gain, and no LoRA factor may make ΔW more than twice the size of W. "tensors": '
        'each tensor adds the same variance to the outputs. "constant": every parameter has the same variance. '
        '"bounded": the same, but less for adapter layers that would change the outputs by more than their own size.',
    )
    initial_bias_sd: float | None = setting(
        None,
        "Least prior standard deviation of a bias of the outputs, in units of the outputs, beside "
        "initial_logit_sd: how far the log odds of the classes may lie from their start whatever the features "
        "show. Used when initial_variance is None. None: no such bound.",
        check=optional(check_positive),
    )
    initial_variance: float | None = setting(
        None,
        'Prior variance of every parameter (initial_rule "constant"), or its upper bound ("uniform"). None: the '
        "variance follows from initial_logit_sd.",
        check=optional(check_positive),
    )
    initial_rule: str = setting(
        "constant",
        'How initial_variance is used: "constant" or "uniform" (methods 1 and 2 of LoKO).',
    )
    bound_prior: bool = setting(
        True,
        "Whether an initial_variance that is too wide for the linearization of a classifier is narrowed, with a "
        "warning.",
        check=check_bool,
    )
    lora_inputs: str = setting(
        "peft",
        'Factors A of LoRA layers at the start. "peft": those of the model. "whitened": such that for the first inputs '
        "the r inputs of B are uncorrelated and of one size, in all layers whose B is zero. Outputs stay the same.",
    )
    expansion: str = setting(
        "mode",
        'Where the likelihood is expanded: at the "mode" of the outputs given the batch, or at their prior "mean" '
        'as in the papers. Only "exponential_family" noise has a choice. "student_t" takes moments instead of a mode, '
        'and "heteroscedastic_gaussian" fits the log variance to the expected squared residual.',
    )
    rank: int = setting(
        20,
        "L, the number of columns of the low-rank part of the precision.",
        check=check_whole,
    )
    blocks: str = setting(
        "modules",
        'The blocks of "block_diagonal": one for each of the "tensors", or one for each of the "modules" (A and B '
        "of one LoRA layer; weight and bias).",
    )
    beta: float = setting(
        0.95,
        "Forgetting factor of the EMA noise models, in (0, 1). It is applied once for every block of a batch that "
        "is solved together: 192 rows, or fewer where one step would leave the linearization.",
        check=check_inside_unit_interval,
    )
    forgetting: float = setting(
        1.0,
        "λ in (0, 1]. The variance is divided by λ before every update.",
        check=check_forgetting,
    )
    drift_variance: float = setting(
        0.0,
        "q ≥ 0, added to every variance before every update.",
        check=check_not_negative,
    )
    prior_pull: float = setting(
        0.0,
        "a in [0, 1). Before every update the belief returns to the prior by a: with α = 1 − a, μ⁻ = αμ + aμ₀ and "
        "P⁻ = α²P + (1 − α²)P₀, which leaves the prior unchanged.",
        check=check_share,
    )
    damping: bool = setting(
        True,
        "Whether an update that does not lower its own objective is solved again with a quarter of the data's "
        "precision, eight times at most. If that fails, the batch is skipped with a warning.",
        check=check_bool,
    )
    gate_quantile: float | None = setting(
        None,
        "χ² quantile in (0, 1) of the Mahalanobis gate. Beyond it, the noise of an observation is inflated. None: "
        "no gate.",
        check=optional(check_inside_unit_interval),
    )
    gradient_penalty: float = setting(
        0.0,
        "ρ ≥ 0 of R-Kalman (ours). An update starts from the precision P⁻¹ + ρ‖g‖² I, where g is the gradient of "
        "the mean of −log p(y | θ) over the batch, at the mean before the update. It costs one more backward pass "
        "a batch.",
        check=check_not_negative,
    )
    gradient_penalty_form: str = setting(
        "transient",
        'What the gradient penalty changes. "transient": the step of the mean only. "permanent": the added '
        "precision stays in the covariance.",
    )
    curvature: str = setting(
        "exact",
        'Which directions of the outputs an update uses. "exact": all of them, one backward pass each. '
        '"truncated": the most probable classes of each example, and the rest as one class. "sampled": the log '
        "odds of the label for the mean, random probes for the covariance; two backward passes for any number of "
        "classes.",
    )
    curvature_epsilon: float = setting(
        1e-3,
        'The most probability, in (0, 1), that "truncated" joins into one class.',
        check=check_inside_unit_interval,
    )
    curvature_classes: int = setting(
        100,
        'The most classes, beside the label, that "truncated" keeps apart, whatever probability is left.',
        check=check_whole,
    )
    curvature_draws: int = setting(
        1,
        'K, the number of probes of "sampled".',
        check=check_whole,
    )
    outputs_per_pass: int | None = setting(
        None,
        "Outputs of each example that share a backward pass. None: chosen from the sizes. It changes speed only.",
        check=optional(check_whole),
    )
    bytes_budget: int | None = setting(
        None,
        "Bytes that the graph, the rows and the temporaries of an update may take beside the belief. Larger "
        "batches go through in pieces. None: 32 MiB, or three times the graph of the batch, or two vectors of "
        "parameters, whichever is most. It changes results only by rounding, unless it is too small for 192 rows.",
        check=optional(check_whole),
    )
    tune: Mapping[str, Sequence[Any]] | None = setting(
        None,
        'Settings to choose among, field name -> values, as {"initial_logit_sd": (1.0, 3.0, 10.0)}. A Bank of '
        "filters, one for each combination, learns the first examples; the combination with the least prequential "
        "log loss goes on. Used by fit.",
    )
    tune_examples: int = setting(
        500,
        "The number of examples by which tune chooses.",
        check=check_whole,
    )
    tune_burn_in: float = setting(
        0.5,
        "Share, in [0, 1), of these examples, the first, whose log loss does not count: the combination with "
        "the best start often does not have the best end. 0: all count, as in the evidence.",
        check=check_share,
    )
    tune_margin: float = setting(
        0.0,
        "Standard errors by which the log loss must prefer a combination to one with a narrower prior. 0: the "
        "least log loss wins.",
        check=check_not_negative,
    )
    passes: int = setting(
        1,
        "Passes of fit over the data. Each starts from the prior, linearized and expanded at the mean of the pass "
        "before (Gauss-Newton), so that no example counts twice. More than one excludes drift, forgetting, the "
        "gate and the gradient penalty.",
        check=check_whole,
    )
    mean_passes: int = setting(
        0,
        "Further passes of fit in which only the mean moves, toward the mode, by natural-gradient steps at the "
        "cost of gradient descent. They exclude drift, forgetting, the gate and the gradient penalty. With "
        'start="trained" they go on from the mean of the adapter.',
        check=partial(check_whole, least=0),
    )
    temperature: float | str = setting(
        "prequential",
        'Factor on the posterior covariance in predictions: a number > 0, or "prequential": chosen from a grid by '
        "the prequential log loss, the one nearest to 1 that the scores do not clearly reject. With several passes"
        " the last one counts. With mean_passes it is that of the belief before them, unless fit holds data out; "
        "Posterior.calibrate sets the size of the final belief instead.",
        check=word_or_positive("prequential"),
    )
    temperature_margin: float = setting(
        0.0,
        'Nats an example by which the log loss at the "prequential" temperature may exceed that of a colder one. '
        "Without it, long streams reject all covariances for a few thousandths, and with them epistemic uncertainty.",
        check=check_not_negative,
    )
    softmax_temperature: float = setting(
        1.0,
        "The number > 0 that divides the logits in predictions of classes (below 1: more confident; Guo et al. "
        "2017). Learning does not use it. Posterior.calibrate sets it, up or down.",
        check=check_positive,
    )
    seed: int = setting(
        0,
        "Seed of the uniform prior rule, the probes and the draws.",
        check=check_integer,
    )

    def __new__(cls, *args: Any, **settings: Any) -> KalmanConfig:
        """Raise TypeError for an unknown setting; the message suggests the nearest name."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise TypeError(f"KalmanConfig has no setting {name!r}{did_you_mean(name, names) or '.'}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_one_of(name, getattr(self, name), allowed)
        check_one_of("covariance", self.covariance, tuple(STRUCTURES))
        for f in dataclasses.fields(self):
            if f.metadata["check"] is not None:
                f.metadata["check"](f.name, getattr(self, f.name))
        check_combinations(self)
        if self.tune is not None:
            object.__setattr__(self, "tune", {name: list(values) for name, values in self.tune.items()})

    def differences(self, other: KalmanConfig) -> list[str]:
        """Names of the settings whose values differ in another configuration."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]

    @classmethod
    def loko(cls, **overrides: Any) -> KalmanConfig:
        """The settings of LoKO (section 5.1): equations 9 to 12 with p₀ ~ Uniform(0, 0.2), β = 0.95, undamped.

        The paper does not give R₀. Here R₀ is the identity.
        """
        settings: dict[str, Any] = {
            "covariance": "diagonal",
            "noise": "ema_taylor",
            "initial_variance": 0.2,
            "initial_rule": "uniform",
            "bound_prior": False,
            "beta": 0.95,
            "damping": False,
            "expansion": "mean",
            "temperature": 1.0,
        }
        return cls(**(settings | overrides))

    @classmethod
    def dataset(cls, **overrides: Any) -> KalmanConfig:
        """Settings for data that ``fit`` can read several times: rank 60, and three passes of the mean.

        They are for a config of your own, or for several from which ``fit`` chooses: ``[dataset(), dataset(
        initial_logit_sd=10.0)]``. Without a ``config``, ``fit`` uses other settings (:func:`fit_mixture`).
        """
        settings: dict[str, Any] = {"rank": 60, "mean_passes": 3}
        return cls(**(settings | overrides))

    @classmethod
    def stream(cls, **overrides: Any) -> KalmanConfig:
        """Settings for data that arrive once: the evidence of the first 200 examples chooses one of three prior widths.

        Without a ``config``, ``fit`` uses these settings if it cannot split its loader. The best width depends on the
        task: on some tasks a prior of 3 logits learns fastest, on others it fits noise
        (``benchmarks/bench/run_online.py``). Among widths within one standard error, the narrowest wins. All tasks can
        learn the class frequencies, so the log odds of the classes have a prior of one logit under each width. The
        temperature may cost 0.01 nats an example, so that predictions keep their epistemic uncertainty.
        """
        settings: dict[str, Any] = {
            "tune": {"initial_logit_sd": (3.0, 1.0, 0.3)},
            "tune_examples": 200,
            "tune_burn_in": 0.0,
            "tune_margin": 1.0,
            "initial_bias_sd": 1.0,
            "temperature_margin": 0.01,
        }
        return cls(**(settings | overrides))

    @cached_property
    def covariance_settings(self) -> CovarianceSettings:
        """The structure of the covariance."""
        return CovarianceSettings.of(self)

    @cached_property
    def prior_settings(self) -> PriorSettings:
        """The prior: its variance, and the start of LoRA factors."""
        return PriorSettings.of(self)

    @cached_property
    def noise_settings(self) -> NoiseSettings:
        """The likelihood, the noise R and the expansion point."""
        return NoiseSettings.of(self)

    @cached_property
    def curvature_settings(self) -> CurvatureSettings:
        """The output directions of an update and its budgets."""
        return CurvatureSettings.of(self)

    @cached_property
    def dynamics_settings(self) -> DynamicsSettings:
        """The predict step, and the limits of the measurement update."""
        return DynamicsSettings.of(self)

    @cached_property
    def predictive_settings(self) -> PredictiveSettings:
        """The predictive distribution."""
        return PredictiveSettings.of(self)

    @cached_property
    def fitting_settings(self) -> FittingSettings:
        """The passes over a loader, and the settings that it chooses."""
        return FittingSettings.of(self)

    @property
    def structure(self) -> type[GaussianBelief]:
        """The class of beliefs with the configured covariance structure."""
        return STRUCTURES[self.covariance]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``kalman_config.json`` into ``folder``. Missing folders are created; earlier settings are replaced.

        Raises:
            ValueError: if a file of that name is not a configuration, or belongs to a posterior saved in ``folder``.
        """
        path = Path(folder) / CONFIG_FILE
        if os.path.lexists(path):
            if path.is_symlink():
                raise ValueError(f"`folder` must hold no link {CONFIG_FILE}, got one in {folder}.")
            if self.from_pretrained(folder) == self:
                return
            if is_listed(Path(folder), CONFIG_FILE) and (Path(folder) / CHECKSUMS_FILE).is_file():
                raise ValueError(f"`folder` must not hold a posterior, which has its own settings, got {folder}.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with staging(Path(folder)) as stage:
            (stage / CONFIG_FILE).write_text(self._as_json(), encoding="utf-8")
            os.replace(stage / CONFIG_FILE, path)

    def _as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KalmanConfig:
        """The configuration in ``folder``/kalman_config.json.

        Raises:
            ValueError: if the file is missing, is not JSON, or holds settings that this version does not have.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"`folder` must hold a readable {CONFIG_FILE}, got {path}: {error}.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"`folder` must hold a {CONFIG_FILE} with a JSON object, got {type(fields).__name__}.")
        for name in fields:
            check_setting(name, f"`folder` must hold a {CONFIG_FILE} of this version's settings", f" in {path}")
        if fields.get("softmax_temperature") == "held_out":  # an earlier version's word: 1, since no data chose it yet
            fields["softmax_temperature"] = 1.0
        return cls(**fields)


KalmanConfig.__doc__ = f"{KalmanConfig.__doc__}\n    Attributes:\n" + "".join(
    f"        {f.name}: {f.metadata['help']}\n" for f in dataclasses.fields(KalmanConfig)
)


def check_setting(name: str, requirement: str, place: str) -> None:
    """Raise ValueError unless ``name`` is a setting; the message suggests the nearest name.

    Args:
        name: the name in the file.
        requirement: start of the message.
        place: the file, with the line if known; it follows the name in the message.
    """
    names = [field.name for field in dataclasses.fields(KalmanConfig)]
    if name not in names:
        nearest = did_you_mean(name, names) or f"; the settings are {', '.join(names)}."
        raise ValueError(f"{requirement}, got {name!r}{place}{nearest}")


def check_config(config: object, argument: str = "config") -> None:
    """Raise ValueError unless ``config`` is a :class:`KalmanConfig`.

    Args:
        config: the value to check.
        argument: its name in the message.
    """
    if not isinstance(config, KalmanConfig):
        hint = "; `KalmanConfig(**settings)` makes one" if isinstance(config, Mapping) else ""
        raise ValueError(f"`{argument}` must be a KalmanConfig, got {type(config).__name__}{hint}.")
