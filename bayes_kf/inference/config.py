"""Every setting of a filter, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bayes_kf.files.checksums import SUMS_FILE, is_listed
from bayes_kf.files.staging import staging
from bayes_kf.inference.covariance import block_diagonal, diagonal, full, low_rank
from bayes_kf.models.likelihood import LIKELIHOODS
from bayes_kf.validation import did_you_mean


class Structure(NamedTuple):
    """The functions of one covariance structure; each documented in its own file.

    ``accumulate`` takes the place of ``condition`` where the mean is held: what it adds to the precision does not
    depend on the prior, whose width may be chosen afterwards. None where that is so of ``condition`` itself.
    """

    State: type[Any]
    init: Callable[..., Any]
    predict: Callable[..., Any]
    condition: Callable[..., Any]
    add_precision: Callable[..., Any]
    merge: Callable[..., Any]
    root: Callable[..., Any]
    product: Callable[..., Any]
    marginal_variance: Callable[..., Any]
    covariance_matrix: Callable[..., Any]
    output_covariance: Callable[..., Any]
    joint_output_covariance: Callable[..., Any]
    quadratic: Callable[..., Any]
    log_determinant: Callable[..., Any]
    scales: Callable[..., Any]
    accumulate: Callable[..., Any] | None = None


def _structure(module: Any, condition: Callable[..., Any], accumulate: Callable[..., Any] | None = None) -> Structure:
    names = [name for name in Structure._fields if name not in ("condition", "accumulate")]
    found = {name: getattr(module, name) for name in names}
    return Structure(condition=condition, accumulate=accumulate, **found)


STRUCTURES: dict[str, Structure] = {
    "diagonal": _structure(diagonal, diagonal.gain_condition, diagonal.mixed_condition),
    "diagonal_information": _structure(diagonal, diagonal.information_condition),
    "diagonal_mixed": _structure(diagonal, diagonal.mixed_condition),
    "low_rank": _structure(low_rank, low_rank.condition, low_rank.accumulate),
    "block_diagonal": _structure(block_diagonal, block_diagonal.condition, block_diagonal.accumulate),
    "full": _structure(full, full.condition),
}


def register_structure(name: str, structure: Structure) -> None:
    """Make a covariance structure one that ``KalmanConfig(covariance=name)`` takes.

    Args:
        name: a word that is not taken.
        structure: its functions; ``STRUCTURES["diagonal"]._replace(...)`` is a start.

    Raises:
        ValueError: for a name that is taken, or what is no structure.
    """
    if not isinstance(structure, Structure):
        raise ValueError(f"`structure` must be a Structure, got {type(structure).__name__}.")
    if not name.isidentifier() or name in STRUCTURES:
        raise ValueError(f"`name` must be a word other than {', '.join(STRUCTURES)}, got {name!r}.")
    STRUCTURES[name] = structure
    CHOICES["covariance"] = tuple(STRUCTURES)


NOISES = ("exponential_family", "ema_taylor", "ema_residual", "identity", "decaying")
RULES = ("constant", "uniform")
SPREADS = ("modules", "tensors", "constant")
BLOCKS = ("tensors", "modules")
EXPANSIONS = ("mode", "mean")
CURVATURES = ("exact", "truncated", "sampled")
PENALTIES = ("transient", "permanent")
OBSERVED = ("likelihood", "noise", "curvature", "curvature_epsilon", "curvature_classes", "curvature_draws", "seed")
CHOICES: dict[str, tuple[str, ...]] = {
    "likelihood": tuple(LIKELIHOODS),
    "covariance": tuple(STRUCTURES),
    "noise": NOISES,
    "initial_rule": RULES,
    "initial_spread": SPREADS,
    "blocks": BLOCKS,
    "gradient_penalty_form": PENALTIES,
    "expansion": EXPANSIONS,
    "curvature": CURVATURES,
}
"""The settings that are words, and the words."""
WHOLE = ("rank", "curvature_classes", "curvature_draws", "passes", "tune_examples")  # numbers, at least 1
STREAM_SPREADS = (3.0, 1.0, 0.3)  # prior sds of the outputs that a stream chooses among, in logits
STREAM_BIAS = 1.0  # prior sd of the classes' log odds there
STREAM_EXAMPLES = 200  # that it chooses by
STREAM_MARGIN = 1.0  # standard errors by which the first examples must prefer a wider one
BUDGETS = ("bytes_budget", "outputs_per_pass")
TUNING = ("tune", "tune_examples", "tune_burn_in", "tune_margin")
TEMPERATURES = ("temperature", "softmax_temperature")
FIXED = (*OBSERVED, *TUNING, *BUDGETS, "passes", "mean_passes", *TEMPERATURES)  # what a stream cannot choose
CONFIG_FILE = "kalman_config.json"


@dataclass(frozen=True)
class KalmanConfig:
    """How a belief over adapters starts, moves and learns.

    Attributes:
        likelihood: "categorical", "bernoulli", "gaussian" or "poisson".
        covariance: "low_rank" (plus a diagonal), "diagonal" (gain form, as the papers), "diagonal_information",
            "diagonal_mixed", "block_diagonal" or "full".
        rank: L, columns of the low-rank part of the precision.
        blocks: of "block_diagonal": each of the "tensors", or each of the "modules" (LoRA's A and B of one layer;
            weight and bias).
        noise: observation noise. "exponential_family": the likelihood's own variance. "ema_taylor" and "ema_residual":
            LoKO's equations 12 and 7. "identity": I. "decaying": exp(−k/50) I at update k.
        noise_variance: σ² of a Gaussian likelihood in squared target units, or "estimated"; the unit of "identity" and
            "decaying" noise there.
        initial_logit_sd: prior standard deviation of the outputs, from which the prior variances follow. Used when
            ``initial_variance`` is None.
        initial_spread: how that is shared: "modules" (a module adds variance ∝ the root of its gain, and no LoRA factor
            more than lets ΔW be twice the size of W), "tensors" (each tensor adds the same variance to the outputs) or
            "constant" (one variance for every parameter).
        initial_bias_sd: None, or prior standard deviation that a bias of the outputs themselves has at least, in the
            outputs' unit, beside ``initial_logit_sd``: how far the log odds of the classes may lie from where they
            start, whatever the features can teach. Used when ``initial_variance`` is None.
        initial_variance: prior variance of every parameter ("constant"), or its upper bound ("uniform").
        bound_prior: whether an ``initial_variance`` too wide for a classifier's linearization is narrowed, with a
            warning (``prior.bounded`` says how).
        initial_rule: "constant" or "uniform" (LoKO's methods 1 and 2), for ``initial_variance``.
        beta: forgetting factor of the EMA noise models, in (0, 1); applied once for every part of a batch that is
            solved together: 192 rows, or fewer where one step would be too far for them.
        forgetting: λ in (0, 1]; the variance is divided by it before every update.
        drift_variance: q ≥ 0, added to every variance before every update.
        prior_pull: a in [0, 1), by which the belief returns to the prior before every update: with α = 1 − a,
            μ⁻ = αμ + aμ₀ and P⁻ = α²P + (1 − α²)P₀, which leaves the prior as it is.
        damping: whether an update that does not lower its own objective is solved again with less precise data, eight
            times at most, and then not taken, with a warning.
        gate_quantile: None, or the χ² quantile in (0, 1) beyond which an observation's noise is inflated.
        gradient_penalty: ρ ≥ 0 of R-Kalman (ours): an update starts from the precision P⁻¹ + ρ‖g‖² I, g the gradient of
            the batch's mean −log p(y | θ) at the mean before it (``penalty``). It takes one more backward pass a batch.
        gradient_penalty_form: "transient": that tightens the step of the mean only, and the covariance is the one of an
            update without it. "permanent": the added precision stays.
        expansion: where the likelihood is expanded: at the "mode" of the outputs given the batch, or at their prior
            "mean" as in the papers. Only the exponential-family noise has a choice.
        curvature: which directions of the outputs a step sees. "exact": all of them, one backward pass each.
            "truncated": of each example the most probable classes, and the rest lumped into one. "sampled": the log
            odds of the label for the mean, random probes for the covariance; two passes for any number of classes.
        curvature_epsilon: "truncated" lumps at most this much probability together, in (0, 1).
        curvature_classes: "truncated" keeps at most this many classes (and the label), whatever probability is left.
        curvature_draws: K, probes of "sampled".
        outputs_per_pass: outputs of each example that share a backward pass; None chooses from the sizes. Only speed
            depends on it.
        bytes_budget: bytes that the graph, the rows and the temporaries of a step may take beside the belief; larger
            batches go through in pieces. None: 32 MiB, or three times the graph of the batch, or two vectors of
            parameters, where that is more. Beliefs depend on it only through rounding, unless it is too small for 192
            rows.
        tune: settings to choose among, field name -> values, as ``{"initial_logit_sd": (1.0, 3.0, 10.0)}``: filters
            with every combination learn the first examples side by side (:class:`~bayes_kf.Bank`), and the one whose
            predictions of them had the least log loss goes on. :func:`~bayes_kf.fit` does so.
        tune_examples: how many examples that takes.
        tune_burn_in: share of them, the first, whose log loss does not count, in [0, 1): what begins best is often not
            what ends best. 0: all counts, as evidence does.
        tune_margin: standard errors by which their log loss must prefer a combination to one with a narrower prior; 0:
            the least log loss wins.
        passes: over the data of a :func:`~bayes_kf.fit`. Each starts again from the prior, linearized and expanded at
            the mean of the one before (Gauss-Newton), so that no example counts twice. For more than one, nothing
            drifts, is forgotten, gated or penalized.
        mean_passes: further passes of a :func:`~bayes_kf.fit` in which only the mean moves, toward the mode, by natural
            gradient steps that each cost what one of gradient descent does (``refine``). Nothing may drift, be
            forgotten, gated or penalized. With ``start`` "trained" they go on from the adapter's own mean.
        temperature: factor on the posterior covariance in predictions: "prequential" (chosen from a grid by the
            stream's own log loss: the one nearest to 1 that the scores do not clearly speak against) or a number > 0.
            With several ``passes`` those of the last one count, each example predicted by the examples before it. With
            ``mean_passes`` it stays that of the belief before them, unless :func:`~bayes_kf.fit` holds data out;
            ``Posterior.calibrate`` chooses one for the belief that is kept.
        softmax_temperature: what logits are divided by in predictions of classes, > 0 (below 1: surer; Guo et al.
            2017); learning does not see it. "held_out": 1 until held-out data say less, which
            :func:`~bayes_kf.fit` asks where it holds data out, and ``Posterior.calibrate_softmax``.
        seed: of the uniform prior rule, the probes and the draws.

    Raises:
        ValueError: one sentence for the first bad field.

    Example:
        >>> KalmanConfig(beta=1.0)
        Traceback (most recent call last):
        ...
        ValueError: `beta` must lie strictly between 0 and 1, got 1.0.
    """

    likelihood: str = "categorical"
    covariance: str = "low_rank"
    noise: str = "exponential_family"
    noise_variance: float | str = 1.0
    initial_logit_sd: float = 3.0
    initial_spread: str = "modules"
    initial_bias_sd: float | None = None
    initial_variance: float | None = None
    initial_rule: str = "constant"
    bound_prior: bool = True
    expansion: str = "mode"
    rank: int = 20
    blocks: str = "modules"
    beta: float = 0.95
    forgetting: float = 1.0
    drift_variance: float = 0.0
    prior_pull: float = 0.0
    damping: bool = True
    gate_quantile: float | None = None
    gradient_penalty: float = 0.0
    gradient_penalty_form: str = "transient"
    curvature: str = "exact"
    curvature_epsilon: float = 1e-3
    curvature_classes: int = 100
    curvature_draws: int = 1
    outputs_per_pass: int | None = None
    bytes_budget: int | None = None
    tune: Mapping[str, Sequence[Any]] | None = None
    tune_examples: int = 500
    tune_burn_in: float = 0.5
    tune_margin: float = 0.0
    passes: int = 1
    mean_passes: int = 0
    temperature: float | str = "prequential"
    softmax_temperature: float | str = 1.0
    seed: int = 0

    def __new__(cls, *args: Any, **settings: Any) -> KalmanConfig:
        """Raise TypeError for a setting that there is not, with the one that it may stand for."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise TypeError(f"KalmanConfig has no setting {name!r}{did_you_mean(name, known) or '.'}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            _one_of(name, getattr(self, name), allowed)
        if self.noise_variance != "estimated":
            _positive("noise_variance", self.noise_variance)
        _positive("initial_logit_sd", self.initial_logit_sd)
        if self.initial_bias_sd is not None:
            _positive("initial_bias_sd", self.initial_bias_sd)
        if self.initial_variance is not None:
            _positive("initial_variance", self.initial_variance)
        _between("beta", self.beta)
        if self.gate_quantile is not None:
            _between("gate_quantile", self.gate_quantile)
        if not (_is_number(self.forgetting) and 0 < self.forgetting <= 1):
            raise ValueError(f"`forgetting` must lie in (0, 1], got {self.forgetting!r}.")
        check_not_negative("drift_variance", self.drift_variance)
        if not (_is_number(self.prior_pull) and 0 <= self.prior_pull < 1):
            raise ValueError(f"`prior_pull` must lie in [0, 1), got {self.prior_pull!r}.")
        check_not_negative("gradient_penalty", self.gradient_penalty)
        if self.temperature != "prequential":
            _positive("temperature", self.temperature)
        if self.softmax_temperature != "held_out":
            _positive("softmax_temperature", self.softmax_temperature)
        if self.softmax_temperature != 1.0 and self.likelihood != "categorical":
            raise ValueError(
                f"`softmax_temperature` must be 1 for `likelihood` {self.likelihood!r}, which has no softmax, "
                f"got {self.softmax_temperature!r}."
            )
        _between("curvature_epsilon", self.curvature_epsilon)
        for name in WHOLE:
            _whole(name, getattr(self, name))
        if not (_is_number(self.tune_burn_in) and 0 <= self.tune_burn_in < 1):
            raise ValueError(f"`tune_burn_in` must lie in [0, 1), got {self.tune_burn_in!r}.")
        check_not_negative("tune_margin", self.tune_margin)
        if not isinstance(self.mean_passes, int) or isinstance(self.mean_passes, bool) or self.mean_passes < 0:
            raise ValueError(f"`mean_passes` must be a whole number >= 0, got {self.mean_passes!r}.")
        for name in ("outputs_per_pass", "bytes_budget"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        for name in ("damping", "bound_prior"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"`seed` must be an integer, got {self.seed!r}.")
        if self.noise_variance == "estimated" and (self.likelihood, self.noise) != ("gaussian", "exponential_family"):
            raise ValueError(
                "`noise_variance` 'estimated' needs `likelihood` 'gaussian' and `noise` 'exponential_family', "
                f"got {self.likelihood!r} and {self.noise!r}."
            )

        if self.curvature != "exact" and (self.likelihood, self.noise) != ("categorical", "exponential_family"):
            raise ValueError(
                f"`curvature` {self.curvature!r} needs `likelihood` 'categorical' and `noise` 'exponential_family', "
                f"got {self.likelihood!r} and {self.noise!r}."
            )

        if self.tune is not None:
            _check_grid(self, self.tune)
            object.__setattr__(self, "tune", {name: list(values) for name, values in self.tune.items()})
        changing = {"forgetting": 1.0, "drift_variance": 0.0, "prior_pull": 0.0, "gate_quantile": None}
        changing |= {"gradient_penalty": 0.0}
        many = "`passes` above 1" if self.passes > 1 else "`mean_passes` above 0"
        wrong = [name for name, plain in changing.items() if getattr(self, name) != plain]
        if (self.passes > 1 or self.mean_passes) and wrong:
            needed = " and ".join(f"`{name}` {changing[name]}" for name in wrong)
            found = " and ".join(str(getattr(self, name)) for name in wrong)
            raise ValueError(f"{many} needs {needed}, since it gives every example the same weight, got {found}.")
        if self.mean_passes and self.noise != "exponential_family":
            raise ValueError(
                f"`mean_passes` descend the likelihood of `noise` 'exponential_family', got {self.noise!r}."
            )

    def differences(self, other: KalmanConfig) -> list[str]:
        """Names of the settings that are not the same in another."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]

    @classmethod
    def loko(cls, **overrides: Any) -> KalmanConfig:
        """LoKO's setting (its section 5.1): equations 9 to 12 with p₀ ~ Uniform(0, 0.2), β = 0.95, undamped.

        R₀ is not given in the paper; ours is the identity.
        """
        setting: dict[str, Any] = {
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
        return cls(**(setting | overrides))

    @classmethod
    def dataset(cls, **overrides: Any) -> KalmanConfig:
        """For data that can be passed over again: rank 60, and three passes of the mean after the filter's.

        ``fit`` without settings tries this and ``dataset(initial_spread="constant", initial_logit_sd=10.0)``, and where
        this did better also a narrow prior of one logit without those passes.
        """
        setting: dict[str, Any] = {"rank": 60, "mean_passes": 3}
        return cls(**(setting | overrides))

    @classmethod
    def stream(cls, **overrides: Any) -> KalmanConfig:
        """For data that come once: the first 200 examples choose among three widths of the prior by evidence.

        ``fit`` without settings takes this where its loader cannot be split. What a stream can teach differs: on
        some tasks a prior of 3 logits learns fastest, on others it learns noise (``benchmarks/bench/run_online.py``).
        Among widths that one standard error does not tell apart the narrowest goes on. How frequent the classes are
        can be learned on all, so their log odds have a prior of one logit under each.
        """
        setting: dict[str, Any] = {
            "tune": {"initial_logit_sd": STREAM_SPREADS},
            "tune_examples": STREAM_EXAMPLES,
            "tune_burn_in": 0.0,
            "tune_margin": STREAM_MARGIN,
            "initial_bias_sd": STREAM_BIAS,
        }
        return cls(**(setting | overrides))

    @property
    def structure(self) -> Structure:
        """The functions of the covariance structure."""
        return STRUCTURES[self.covariance]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``kalman_config.json`` into ``folder``, which is made if missing; earlier settings are replaced.

        Raises:
            ValueError: where a file of that name holds no settings, or those of a posterior saved there.
        """
        path = Path(folder) / CONFIG_FILE
        if os.path.lexists(path):
            if path.is_symlink():
                raise ValueError(f"`folder` must hold no link {CONFIG_FILE}, got one in {folder}.")
            if self.from_pretrained(folder) == self:
                return
            if is_listed(Path(folder), CONFIG_FILE) and (Path(folder) / SUMS_FILE).is_file():
                raise ValueError(f"`folder` must not be a posterior's, which has settings of its own, got {folder}.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        with staging(Path(folder)) as stage:
            (stage / CONFIG_FILE).write_text(self._as_json(), encoding="utf-8")
            os.replace(stage / CONFIG_FILE, path)

    def _as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KalmanConfig:
        """Read ``kalman_config.json`` from ``folder``.

        Raises:
            ValueError: when the file is missing, is not JSON, or holds fields this version does not know.
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
        return cls(**fields)


def check_setting(name: str, rule: str, where: str) -> None:
    """Raise ValueError for a name that is no setting, with the name that it may stand for.

    Args:
        name: of a setting, as a file has it.
        rule: the beginning of the message.
        where: the file, and the line if known.
    """
    known = [field.name for field in dataclasses.fields(KalmanConfig)]
    if name not in known:
        nearest = did_you_mean(name, known) or f"; the settings are {', '.join(known)}."
        raise ValueError(f"{rule}, got {name!r}{where}{nearest}")


def check_config(config: object, argument: str = "config") -> None:
    """Raise ValueError for what is no :class:`KalmanConfig`.

    Args:
        config: what was given.
        argument: its name, for the message.
    """
    if not isinstance(config, KalmanConfig):
        hint = "; `KalmanConfig(**settings)` makes one" if isinstance(config, Mapping) else ""
        raise ValueError(f"`{argument}` must be a KalmanConfig, got {type(config).__name__}{hint}.")


def _check_grid(config: KalmanConfig, grid: object) -> None:
    """Whether every setting of a grid may be chosen by evidence, and every value of it is one that a filter takes."""
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"`tune` must be a mapping from settings to values, got {grid!r}.")
    known = {field.name for field in dataclasses.fields(config)} - set(FIXED)
    for name, values in grid.items():
        if name not in known:
            nearest = did_you_mean(name, known) or "."
            raise ValueError(f"`tune` must name settings that a stream can choose, got {name!r}{nearest}")
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"`tune` must hold a list or tuple of values for {name!r}, got {values!r}.")
        for value in values:
            dataclasses.replace(config, tune=None, **{name: value})
    if config.temperature != "prequential":
        raise ValueError(f"`tune` needs `temperature` 'prequential', got {config.temperature!r}.")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed) or '.'}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number >= 1, got {value!r}.")


def _positive(name: str, value: object) -> None:
    if not (_is_number(value) and 0 < value < float("inf")):  # type: ignore[operator]
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def check_not_negative(name: str, value: object) -> None:
    """Raise ValueError for what is no finite number >= 0."""
    if not (_is_number(value) and 0 <= value < float("inf")):  # type: ignore[operator]
        raise ValueError(f"`{name}` must be >= 0 and finite, got {value!r}.")


def _between(name: str, value: object) -> None:
    if not (_is_number(value) and 0 < value < 1):  # type: ignore[operator]
        raise ValueError(f"`{name}` must lie strictly between 0 and 1, got {value!r}.")
