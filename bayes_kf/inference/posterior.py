"""A fitted belief over adapters: predict with it, draw from it, save it, go on learning from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws, semidefinite
from bayes_kf.inference.filtering import predictive_density, tempering
from bayes_kf.inference.filtering.kalman_filter import FilterState, KalmanFilter
from bayes_kf.inference.fitting import noise_refit
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.measurement_model.output_directions import MAX_EXACT_OUTPUTS
from bayes_kf.inference.predictive import arviz_export, prediction
from bayes_kf.inference.predictive.output_variance import output_variance
from bayes_kf.inference.predictive.prediction import METHODS, LoaderPrediction, Prediction
from bayes_kf.inference.saving import pretrained
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs, batch_size, check_inputs, some_examples, split_batch, to_device
from bayes_kf.models.batched_forward import finite_difference_jvps, outputs_of_draws
from bayes_kf.models.likelihood import Categorical, Gaussian, Likelihood
from bayes_kf.validation import did_you_mean

if TYPE_CHECKING:
    from bayes_kf.inference.predictive.generation import Generated
    from bayes_kf.inference.predictive.pyro_guide import KalmanGuide

VARIANCE_EXAMPLES = 8
COMPARED = 16  # examples on which sampled predictions are compared with linearized ones
FEWEST_COMPARED = 8  # draws below which they are not
BEYOND = 3.0  # times Monte Carlo error
NOTICEABLE = 0.05  # of total variation, or of standard deviations
MAX_MATRIX = 20_000  # parameters above which a dense covariance is refused


@dataclass(frozen=True, repr=False)
class Posterior:
    """Belief over a model's trainable tensors with everything needed to use it.

    Attributes:
        kf: the filter that made it; holds the model and the settings.
        state: the filter's state.
        history: name -> 1-D tensor. Per example ``log_loss`` and, for classifiers, ``correct``, both before the
            example's update; per update ``innovation``, ``dof`` (its degrees of freedom), ``damping`` and ``seconds``.
            Of several passes, those of the first, and ``objective``, −log p(y, θ) after each later one; with
            ``mean_passes`` also ``fitted_log_loss``, that of each such pass; with ``tune`` the candidates'
            ``evidence``, with several settings their ``held_out_log_loss``. After ``start="trained"`` the adapter
            had learned the data before, so no score is prequential: the series are then ``training_log_loss``,
            ``training_correct``, ``training_innovation`` and ``training_dof``.
    """

    kf: KalmanFilter
    state: FilterState
    history: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> KalmanConfig:
        """The settings it was fitted with."""
        return self.kf.config

    @property
    def adapter(self) -> AdapterModel:
        """The model as a function of its trainable tensors."""
        return self.kf.adapter

    @property
    def temperature(self) -> float:
        """Factor on the covariance in predictions and draws, as configured or chosen by the prequential score."""
        return self.kf.temperature(self.state)

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever uses its predictions must know, as sentences; on the model card and on report pages."""
        if not tempering.is_mean_alone(self.temperature):
            return ()
        return (f"The temperature is {self.temperature:g}: {tempering.MEAN_ALONE_NOTE}",)

    def __repr__(self) -> str:
        settings, parameters = self.config, self.adapter.num_parameters
        text = (
            f"Posterior({settings.likelihood}, {parameters:,} parameters, covariance={settings.covariance!r}, "
            f"temperature={self.temperature:g}, {self.state.examples:,} examples in {self.state.step:,} updates)"
        )
        return "\n".join([text, *self.notes])

    @property
    def softmax_temperature(self) -> float:
        """What logits are divided by in predictions; 1 unless given or chosen on held-out data."""
        setting = self.config.softmax_temperature
        return 1.0 if isinstance(setting, str) else setting

    @property
    def mean_vector(self) -> Tensor:
        """μ, (n,)."""
        return self.state.belief.mean

    @property
    def variance_vector(self) -> Tensor:
        """Marginal variances, (n,), without the temperature."""
        return self.state.belief.marginal_variance()

    @property
    def mean(self) -> dict[str, Tensor]:
        """Posterior means, tensor name -> tensor."""
        return self.adapter.unflatten(self.mean_vector)

    @property
    def variance(self) -> dict[str, Tensor]:
        """Marginal posterior variances, tensor name -> tensor, without the temperature."""
        return self.adapter.unflatten(self.variance_vector)

    @property
    def prior_variance(self) -> dict[str, Tensor]:
        """Prior variances, tensor name -> tensor."""
        return self.adapter.unflatten(self.state.prior.variance)

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """Logits as predictions take them, or what adds to them: divided by :attr:`softmax_temperature`."""
        return logits if self.softmax_temperature == 1.0 else logits / self.softmax_temperature

    def covariance_matrix(self) -> Tensor:
        """P, (n, n), without the temperature.

        Raises:
            ValueError: above 20,000 parameters, with the size it would have.
        """
        size = len(self.mean_vector)
        if size > MAX_MATRIX:
            gib = size**2 * self.mean_vector.dtype.itemsize / 2**30
            raise ValueError(
                f"`covariance_matrix` takes at most {MAX_MATRIX:,} parameters, got {size:,} ({gib:.1f} GiB)."
            )
        return self.state.belief.covariance_matrix()

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of the latent vector from N(μ, temperature·P), (S, n)."""
        return self.mean_vector + self._deviations(num_samples, self._generator(generator), self.temperature)

    def predict(
        self,
        inputs: Inputs,
        method: str = "linearized",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
    ) -> Prediction:
        """Predictive distribution for a batch.

        Args:
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            method: "linearized": η ~ N(f(x, μ), J P Jᵀ), drawn in output space (exact moments for a Gaussian
                likelihood); the posterior is one of the linearized model, so this is its own predictive. Where there
                are more outputs than draws, a pair of draws takes one forward pass (``models.draws``), and so where
                there are more than 500, whatever the number of draws. "probit":
                MacKay's closed form of the same moments. "sampled": adapters drawn from N(μ, P), a forward pass each;
                with a warning where, on the first 16 examples, the two methods differ by more than Monte Carlo error
                (looked at where there are eight draws or more, and no fewer than outputs; of a loader on its first
                batch). "mean": the outputs at μ alone, as plain PEFT gives.
            num_samples: S draws for "linearized" and "sampled". The mean log probability of targets is too low by about
                Var p / (2 S p²), since the logarithm of a mean of draws is: with 64 draws by 0.0004 nats at temperature
                0.1 and 0.003 at 1 in softmax regression with eight classes.
            generator: source of the draws; by default a new one seeded with ``config.seed``: same call, same answer.
            targets: when given, ``log_prob`` of the result is filled.

        Raises:
            ValueError: for an unknown method, a bad number of samples, or inputs or targets that do not fit.
        """
        return self._predict(inputs, method, num_samples, generator, targets, compare=True)

    def _predict(
        self,
        inputs: Inputs,
        method: str,
        num_samples: int,
        generator: torch.Generator | None,
        targets: Tensor | None,
        compare: bool,
        begun: Tensor | None = None,
    ) -> Prediction:
        """As :meth:`predict`; of a later batch of a loader, ``begun`` is the generator's state before the first.

        Adapters are drawn from there, so that all batches are predicted by the same ones. Noise in output space is
        each example's own and goes on from the batch before.
        """
        if method not in METHODS:
            nearest = did_you_mean(method, METHODS) or "."
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}{nearest}")
        if method == "probit" and self.config.likelihood == "poisson":
            raise ValueError("`method` 'probit' has no closed form for counts, use 'linearized' or 'sampled'.")
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"`num_samples` must be a whole number >= 1, got {num_samples!r}.")
        check_inputs(inputs)
        if targets is not None and not isinstance(targets, Tensor):
            raise ValueError(f"`targets` must be a tensor or None, got {type(targets).__name__}.")
        generator = self._generator(generator)
        inputs = to_device(inputs, self.adapter.device)
        targets = None if targets is None else targets.to(self.adapter.device)
        with self.adapter.full_precision():
            by_adapters = method == "sampled" or (method == "linearized" and self._by_differences(inputs, num_samples))
            if by_adapters and begun is not None:
                generator.set_state(begun)
            if method == "sampled":
                found = self._sampled(inputs, num_samples, generator, targets)
                if compare:
                    self._compare(inputs, found)
                return found
            if method == "mean":
                return self._piece(inputs, method, num_samples, generator, targets)
            if by_adapters:
                return self._differenced(inputs, num_samples, generator, targets)
            before = generator.get_state()

            def in_pieces() -> Prediction:
                generator.set_state(before)  # as it was, where memory ran out before
                parts = [
                    self._piece(piece, method, num_samples, generator, None if targets is None else targets[where])
                    for where, piece in self.kf.linearize.chunks(self.mean_vector, inputs)
                ]
                return prediction.concatenate(parts)

            return self.kf.linearize.retry_in_smaller_chunks(in_pieces, batch_size(inputs))

    def predict_loader(
        self,
        loader: Iterable[Any],
        method: str = "linearized",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        keep_samples: bool = False,
    ) -> LoaderPrediction:
        """Predictions for every batch of a loader, joined on the CPU, with the targets that it carries.

        They do not depend on how the examples are divided into batches, but for rounding: "sampled" draws S adapters
        once and predicts every batch with them, and so does "linearized" where it draws adapters; elsewhere each
        example has noise of its own.

        Args:
            loader: batches as ``fit`` takes them; targets may be missing.
            method: as for :meth:`predict`.
            num_samples: as for :meth:`predict`.
            generator: as for :meth:`predict`.
            keep_samples: whether the result holds all draws, (S, N, m).

        Raises:
            ValueError: when the loader yields nothing, or a batch does not fit.
        """
        generator = self._generator(generator)
        begun, parts = generator.get_state(), list[LoaderPrediction]()
        for batch in loader:
            inputs, targets = split_batch(batch)
            part = self._predict(inputs, method, num_samples, generator, targets, compare=not parts, begun=begun)
            kept: dict[str, Any] = {
                name: _cpu(value) for name, value in vars(part).items() if name != "samples" or keep_samples
            }
            parts.append(LoaderPrediction(**kept, targets=_cpu(targets)))
        if not parts:
            raise ValueError("`loader` must yield at least one batch, got none.")
        joined = prediction.concatenate(parts)
        assert isinstance(joined, LoaderPrediction)
        return joined

    def calibrate(self, loader: Iterable[Any]) -> Posterior:
        """The same belief at the temperature under which held-out data have the least log loss.

        For an adapter that was trained elsewhere (``fit(start="trained")``), or where a part of the data can be spared:
        one linearized prediction of each batch, with more than 64 outputs from as many drawn adapters. Of temperatures
        whose losses are within half a standard error of the least, paired by example, it is the one nearest to 1
        (``tempering``). An estimated σ² is estimated again with it, for each temperature: that of most posterior
        density given the held-out residuals, the present one counting as 20 observations (``noise_refit``).

        There is a warning where the temperature is 0.01 or less: predictions are then those of the mean alone.

        Args:
            loader: batches with targets that the belief has not learned from.

        Raises:
            ValueError: when the loader yields nothing, or a batch without targets or one that does not fit.
        """
        found = self._calibrated(loader)
        tempering.warn_of_mean_alone(found.temperature)
        return found

    def _calibrated(self, loader: Iterable[Any]) -> Posterior:
        """As :meth:`calibrate`, without its warning."""
        if self.config.noise_variance == "estimated":
            return self._calibrate_noise(loader)
        family, losses = noise.likelihood(self.config.noise_settings, self.state.noise), list[Tensor]()
        seen = 0
        for inputs, targets in self._held_out(loader):
            with self.adapter.full_precision():
                losses.append(self._log_losses(family, inputs, targets, seen))
            seen += len(targets)
        return self._with(temperature=tempering.choose_held_out(torch.cat(losses, 1)))

    def _calibrate_noise(self, loader: Iterable[Any]) -> Posterior:
        """:meth:`calibrate` of a Gaussian likelihood whose σ² is estimated."""
        family, residuals, covariances = (
            noise.likelihood(self.config.noise_settings, self.state.noise),
            list[Tensor](),
            list[Tensor](),
        )
        for inputs, targets in self._held_out(loader):
            with self.adapter.full_precision():
                for where, piece in self.kf.linearize.chunks(self.mean_vector, inputs):
                    linearized = self.kf.linearize(self.mean_vector, piece)
                    known = family.check(linearized.outputs, targets[where])
                    residuals.append((known - linearized.outputs).double())
                    covariances.append(self.state.belief.output_covariance(linearized.jacobian()))
        residual, covariance = torch.cat(residuals), semidefinite(torch.cat(covariances))
        present = self.state.noise.variance
        if present is None:  # nothing was learned
            present = torch.ones_like(residual[0])
        variances, losses = [], []
        for temperature in tempering.GRID:
            spread = temperature * covariance
            variance = noise_refit.held_out_variance(present, residual, spread.diagonal(dim1=1, dim2=2))
            variances.append(variance)
            losses.append(noise_refit.log_losses(variance, residual, spread))
        chosen = tempering.choose_held_out(torch.stack(losses))
        variance = variances[tempering.GRID.index(chosen)]
        count = torch.full_like(variance, noise_refit.HELD_OUT_COUNT + len(residual))
        state = self.state._replace(noise=noise.with_variance(self.state.noise, variance, count))
        return replace(self._with(temperature=chosen), state=state)

    def calibrate_softmax(self, loader: Iterable[Any]) -> Posterior:
        """The same belief with logits divided by the number of at most 1 that held-out data ask for.

        A covariance can only add doubt. Where the mean alone is less sure than held-out data bear out, as with many
        classes of a few examples each, this takes doubt away; the data are predicted once, by the mean. The number
        has most posterior probability under a prior that keeps it near 1 (``tempering``): a handful of examples, all
        predicted right, would else make a belief certain. Call it before :meth:`calibrate`.

        Args:
            loader: batches with targets that the belief has not learned from.

        Raises:
            ValueError: for a likelihood that has no softmax; when the loader yields nothing, or a batch without targets
                or one that does not fit.
        """
        family = noise.likelihood(self.config.noise_settings, self.state.noise)
        if not isinstance(family, Categorical):
            raise ValueError(f"`calibrate_softmax` needs `likelihood` 'categorical', got {family.name!r}.")
        losses = tempering.SOFTMAX_PRIOR
        for inputs, targets in self._held_out(loader):
            with self.adapter.full_precision():
                outputs = self.adapter.outputs(self.mean_vector, inputs)
            losses = losses + tempering.softmax_log_losses(family, outputs, family.check(outputs, targets))
        return self._with(softmax_temperature=tempering.choose_softmax(losses))

    def _held_out(self, loader: Iterable[Any]) -> Iterator[tuple[Inputs, Tensor]]:
        """Every batch, which must have targets, on the model's device."""
        index = -1
        for index, batch in enumerate(loader):
            inputs, targets = split_batch(batch)
            if targets is None:
                raise ValueError(f"`loader` must yield targets with every batch, got none in batch {index}.")
            if not isinstance(targets, Tensor):
                raise ValueError(f"`loader` must yield targets as tensors, got {type(targets).__name__}.")
            check_inputs(inputs)
            yield to_device(inputs, self.adapter.device), targets.to(self.adapter.device)
        if index < 0:
            raise ValueError("`loader` must yield at least one batch, got none.")

    def _with(self, **settings: Any) -> Posterior:
        """The same belief under other settings of its predictions."""
        config = replace(self.config, tune=None, **settings)
        return Posterior(KalmanFilter(self.adapter, config), self.state, self.history)

    def output_variance(self, batch: Any) -> dict[str, float]:
        """What each tensor contributes to the variance of the outputs: where the uncertainty of predictions sits.

        The mean over examples and outputs of J_t (P Jᵀ)_t times the temperature, in squared units of the outputs;
        those of a classifier less their mean over the classes, which softmax does not see. The numbers add up to the
        variance of the outputs. A covariance of two tensors counts for each of them, so a number may be negative. Of
        more than 16 outputs 16 are looked at.

        Args:
            batch: inputs, or a batch as ``fit`` takes them; its first 8 examples are looked at.

        Raises:
            ValueError: when the inputs do not fit.
        """
        inputs, _ = split_batch(batch)
        check_inputs(inputs)
        size = batch_size(inputs)
        few = to_device(some_examples(inputs, slice(0, min(size, VARIANCE_EXAMPLES)), size), self.adapter.device)
        with self.adapter.full_precision():
            linearized = self.kf.linearize(self.mean_vector, few)
            centred = self.config.likelihood == "categorical"
            found = output_variance(self.adapter, self.state.belief, linearized, centred)
        return {name: self.temperature * value for name, value in found.items()}

    def reading(self, adapter: AdapterModel) -> Posterior:
        """The same belief, its model's outputs read in another way (``models.language``).

        Raises:
            ValueError: for other trainable tensors.
        """
        if (adapter.names, adapter.shapes) != (self.adapter.names, self.adapter.shapes):
            raise ValueError("`adapter` must have the trainable tensors that the posterior was fitted on, got others.")
        return Posterior(KalmanFilter(adapter, self.config), self.state, self.history)

    def generate(self, inputs: Inputs, max_new_tokens: int = 32, **settings: Any) -> Generated:
        """Text by the posterior predictive of a causal language model, and how sure it is; see ``generation``."""
        from bayes_kf.inference.predictive.generation import generate

        return generate(self, inputs, max_new_tokens, **settings)

    def filter(self) -> KalmanFilter:
        """The filter to go on learning with, from :attr:`state`."""
        return self.kf

    def apply_to(self, model: nn.Module) -> None:
        """Write the posterior mean into ``model``'s trainable tensors, in place."""
        other = AdapterModel(model)
        if (other.names, other.shapes) != (self.adapter.names, self.adapter.shapes):
            raise ValueError("`model` must have the trainable tensors that the posterior was fitted on, got others.")
        other.assign(self.mean_vector.to(other.device))

    def guide(self) -> KalmanGuide:
        """A Pyro guide that samples every adapter tensor, under its name, from the belief."""
        from bayes_kf.inference.predictive.pyro_guide import KalmanGuide

        return KalmanGuide(self)

    @property
    def pyro_model(self) -> Callable[..., Tensor]:
        """The Pyro model: tensors from the prior, targets from the likelihood; called (inputs, targets=None)."""
        from bayes_kf.inference.predictive.pyro_guide import KalmanModel

        return KalmanModel(self)

    def save_pretrained(self, folder: str | Path, scores: Mapping[str, float] | None = None) -> None:
        """Write the adapter (plain PEFT), the settings, the belief and a model card; see ``persistence``.

        Args:
            folder: made if missing. A posterior in it is replaced: if the process is killed, the folder opens as
                the old or the new one. Other files in it stay as they are, an edited model card too.
            scores: for the card: ``Report.scores`` of an evaluation.

        Raises:
            ValueError: where a file is in the way that bayes_kf did not write (an adapter of another origin, say), that
                was changed since, or that is read-only; nothing is changed then.
            OSError: where it cannot be written; what was there stays.
        """
        pretrained.save(self, Path(folder), scores)

    @classmethod
    def from_pretrained(cls, folder: str | Path, base_model: nn.Module) -> Posterior:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            folder: where it was written.
            base_model: the model itself, not its name: without its adapter, which PEFT then adds to it, or with it.

        Raises:
            ValueError: when files are missing or damaged, or belong to another model; nothing is changed then.
        """
        return pretrained.load(Path(folder), base_model)

    def export_adapters(
        self, folder: str | Path, num_samples: int = 8, generator: torch.Generator | None = None
    ) -> list[Path]:
        """Write draws from the posterior as ordinary PEFT adapters ``draw_0``, ``draw_1``, ...

        Args:
            folder: made if missing. Draws of an earlier call are replaced, all or none; other files, a posterior
                among them, stay as they are. ``SHA256SUMS.draws`` lists what was written.
            num_samples: number of draws.
            generator: of the draws; by default one seeded with ``config.seed``.

        Returns:
            The folders of the draws.

        Raises:
            ValueError: for a model that is no PEFT model, and as :meth:`save_pretrained`.
            OSError: where it cannot be written; what was there stays.
        """
        return pretrained.export(self, Path(folder), self.sample(num_samples, self._generator(generator)))

    def to_arviz(
        self,
        num_samples: int = 500,
        generator: torch.Generator | None = None,
        loader: Iterable[Any] | None = None,
    ) -> Any:
        """Draws from the belief as ArviZ data (group ``posterior``, a variable per tensor).

        With a loader also what these adapters say about its N examples, each under the variable ``target``:
        ``observed_data`` (N,), ``posterior_predictive`` (chain, draw, N), a target drawn from every adapter's
        likelihood, and ``log_likelihood`` (chain, draw, N). Targets of several outputs have them as their last axis;
        their log-likelihood is the joint one. The draws are independent. They come as two chains (more for an odd
        number of draws, one where no number divides them), so that ArviZ can tell R̂. Forward passes are those of
        ``predict`` with "sampled", with its warning where the belief's linearized model says otherwise.

        Args:
            num_samples: S, draws.
            generator: source of the draws; by default a new one seeded with ``config.seed``.
            loader: batches with targets, as ``fit`` takes them. ``loo`` needs those that the belief has learned from.

        Raises:
            ValueError: when the loader yields nothing, or a batch without targets or one that does not fit.
        """
        generator = self._generator(generator)
        draws = self.sample(num_samples, generator)
        groups = {"posterior": arviz_export.named_draws(self.adapter, draws)}
        if loader is not None:
            with self.adapter.full_precision():
                groups |= arviz_export.predictive_groups(self, draws, loader, generator)
        return arviz_export.inference_data(groups)

    def _generator(self, generator: torch.Generator | None) -> torch.Generator:
        return generator or torch.Generator(device=self.adapter.device).manual_seed(self.config.seed)

    def _piece(
        self, inputs: Inputs, method: str, num_samples: int, generator: torch.Generator, targets: Tensor | None
    ) -> Prediction:
        family = noise.likelihood(self.config.noise_settings, self.state.noise)
        if method == "mean":
            outputs = self.scaled_logits(self.adapter.outputs(self.mean_vector, inputs))
            return prediction.point(family, outputs, _checked(family, outputs, targets))
        batch = self.kf.linearize(self.mean_vector, inputs)
        outputs = self.scaled_logits(batch.outputs)
        targets = _checked(family, outputs, targets)
        covariance = self.state.belief.output_covariance(batch.jacobian())
        output_cov = self.temperature / self.softmax_temperature**2 * covariance
        if method == "probit" and family.name != "gaussian":
            return prediction.probit(family, outputs, output_cov.to(outputs.dtype), targets)
        draws = None
        if method == "linearized":
            unit = prediction.noise_by_example(num_samples, outputs.shape, generator)
            draws = gaussian_draws(outputs, output_cov, num_samples, generator, unit)
        if isinstance(family, Gaussian):
            return prediction.gaussian_moments(family, outputs, output_cov, draws, targets)
        assert draws is not None
        return prediction.mixture(family, draws, targets)

    def _by_differences(self, inputs: Inputs, num_samples: int) -> bool:
        """Whether draws of the linearized outputs cost less by forward passes than through their covariance."""
        family = noise.likelihood(self.config.noise_settings, self.state.noise)
        if isinstance(family, Gaussian) or not self.adapter.is_precise:
            return False
        passes = self.kf.linearize.num_backward_passes(self.mean_vector, inputs)
        return num_samples < passes or self.kf.linearize.num_outputs > MAX_EXACT_OUTPUTS

    def _differenced(
        self, inputs: Inputs, num_samples: int, generator: torch.Generator, targets: Tensor | None
    ) -> Prediction:
        """Linearized predictions from draws δ of the parameters, and f ± Jδ by differences: J P Jᵀ is never formed."""
        family = noise.likelihood(self.config.noise_settings, self.state.noise)
        outputs = self.adapter.outputs(self.mean_vector, inputs)
        changes = self._responses(inputs, -(-num_samples // 2), generator, self.temperature)
        draws = self.scaled_logits(outputs + torch.cat([changes, -changes])[:num_samples])
        return prediction.mixture(family, draws, _checked(family, outputs, targets))

    def _log_losses(self, family: Likelihood, inputs: Inputs, targets: Tensor, first: int) -> Tensor:
        """Log losses (K, B) of a batch's linearized predictions by temperature; ``first`` numbers its examples."""
        if self._by_differences(inputs, tempering.NUM_RESPONSES):
            generator = torch.Generator(device=self.adapter.device).manual_seed(self.config.seed)
            outputs = self.adapter.outputs(self.mean_vector, inputs)
            known = family.check(outputs, targets)
            responses = self._responses(inputs, tempering.NUM_RESPONSES, generator)
            root = self.scaled_logits(responses / tempering.NUM_RESPONSES**0.5).transpose(0, 1)  # (B, S, m)
            outputs = self.scaled_logits(outputs)
            return predictive_density.root_log_loss(family, outputs, root, known, tempering.GRID, first)
        losses = list[Tensor]()
        for where, piece in self.kf.linearize.chunks(self.mean_vector, inputs):
            linearized = self.kf.linearize(self.mean_vector, piece)
            outputs = self.scaled_logits(linearized.outputs)
            known = family.check(outputs, targets[where])
            covariance = self.state.belief.output_covariance(linearized.jacobian())
            output_cov = covariance / self.softmax_temperature**2
            number = first + sum(part.shape[1] for part in losses)
            losses.append(predictive_density.log_loss(family, outputs, output_cov, known, tempering.GRID, number))
        return torch.cat(losses, 1)

    def _responses(
        self, inputs: Inputs, num_draws: int, generator: torch.Generator, temperature: float = 1.0
    ) -> Tensor:
        """Jδ for draws δ ~ N(0, temperature·P), (S, B, m)."""
        steps = self._deviations(num_draws, generator, temperature)
        return finite_difference_jvps(self.adapter, self.mean_vector, steps, inputs, self._draws_at_once(inputs))

    def _deviations(self, num_draws: int, generator: torch.Generator, temperature: float) -> Tensor:
        """Draws from N(0, temperature·P), (S, n)."""
        mean = self.mean_vector
        noise = torch.randn((num_draws, len(mean)), generator=generator, dtype=mean.dtype, device=generator.device)
        return temperature**0.5 * self.state.belief.root()(noise.to(mean.device))

    def _draws_at_once(self, inputs: Inputs) -> int:
        """Adapters whose forward passes over a batch fit the memory together."""
        return max(1, self.kf.linearize.max_chunk_size(self.mean_vector, inputs) // batch_size(inputs))

    def _compare(self, inputs: Inputs, sampled: Prediction) -> None:
        """Warn where the first predictions from drawn adapters are not those of the linearized model."""
        assert sampled.samples is not None  # drawn
        num_samples, size = len(sampled.samples), min(COMPARED, batch_size(inputs))
        if num_samples < max(FEWEST_COMPARED, sampled.samples.shape[2]):  # a backward pass for every output
            return
        few = some_examples(inputs, slice(size), batch_size(inputs))
        _, few = next(iter(self.kf.linearize.chunks(self.mean_vector, few)))  # what the memory allows at once
        size = batch_size(few)
        own = torch.Generator(device=self.adapter.device).manual_seed(self.config.seed + 1)
        linearized = self._piece(few, "linearized", num_samples, own, None)
        variance = None if sampled.variance is None else sampled.variance[:size]
        first = replace(sampled, samples=sampled.samples[:, :size], variance=variance)
        family = noise.likelihood(self.config.noise_settings, self.state.noise)
        if isinstance(family, Gaussian):  # what both are compared in is the linearized model's own spread
            first, linearized = linearized, first
        apart, expected = prediction.disagreement(family, first, linearized)
        if apart > max(BEYOND * expected, NOTICEABLE):
            unit = "standard deviations" if linearized.variance is not None else "total variation"
            warnings.warn(
                f"`method` 'sampled' and 'linearized' disagree: {apart:.3f} {unit} apart on {size} examples, where "
                f"Monte Carlo error makes {expected:.3f}. The belief is the linearized model's: trust 'linearized'.",
                stacklevel=4,
            )

    def _sampled(
        self, inputs: Inputs, num_samples: int, generator: torch.Generator, targets: Tensor | None
    ) -> Prediction:
        family = noise.likelihood(self.config.noise_settings, self.state.noise)
        draws = self.sample(num_samples, generator)
        outputs = outputs_of_draws(self.adapter, draws, inputs, self._draws_at_once(inputs))
        outputs = self.scaled_logits(outputs)
        return prediction.mixture(family, outputs, _checked(family, outputs[0], targets))


def _checked(family: Any, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
    return None if targets is None else family.check(outputs, targets)


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()
