"""The posterior that a fit returns: predict with it, sample it, save it, continue it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayes_kf.files.hub import local_folder
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.heldout import calibration
from bayes_kf.inference.predictive import arviz_export, output_variance, predict
from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.inference.predictive.prediction import LoaderPrediction, Prediction
from bayes_kf.inference.predictive.text.text_predictions import TextPredictions
from bayes_kf.inference.pyro import sample_moments
from bayes_kf.inference.saving import pretrained
from bayes_kf.inference.saving.hub_upload import HubUpload
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import Inputs

if TYPE_CHECKING:
    from bayes_kf.inference.pyro.kalman_guide import KalmanGuide


class Posterior(GaussianPosterior, TextPredictions, HubUpload):
    """A Gaussian posterior over the trainable tensors of a model, with everything needed to use it.

    It has the attributes and the moments of ``GaussianPosterior``: ``kf``, ``state``, ``history``, ``mean``,
    ``variance``, ``covariance_matrix()``, ``sample(num_samples)``; and for language models ``generate``, ``score`` and
    ``answer``.

    Example:
        >>> import bayes_kf as bkf
        >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(5)]
        >>> posterior = bkf.fit(nn.Linear(3, 2), data, bkf.KalmanConfig(), progress=False)
        >>> posterior.predict(torch.randn(6, 3))
        Prediction(mean (6, 2), probs (6, 2), samples (64, 6, 2), entropy (6,), aleatoric (6,), epistemic (6,))
    """

    mixture_type: ClassVar[type[Any]]  # `MixturePosterior`, set by its module, which imports this one

    def predict(
        self,
        inputs: Inputs,
        method: str = "linearized",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        targets: Tensor | None = None,
    ) -> Prediction:
        """Predictive distribution for a batch of B examples.

        Args:
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            method: "linearized": η ~ N(f(x, μ), J P Jᵀ), drawn in output space (exact moments for a Gaussian
                likelihood). The posterior is that of the linearized model, so this is its own predictive distribution.
                If there are more outputs than draws, or more than 500, each pair of draws takes one forward pass
                (``models.batched_forward``). "probit": MacKay's closed form of the same moments. "sampled": adapters
                drawn from N(μ, P), a forward pass each. It warns if the two methods differ by more than Monte Carlo
                error on the first 16 examples (of a loader: of its first batch); this is checked from eight draws on,
                if there are at least as many draws as outputs. "mean": the outputs at μ alone, as plain PEFT gives.
            num_samples: S draws for "linearized" and "sampled". Log probabilities are low by about Var p / (2 S p²).
            generator: source of the draws; by default a new one seeded with ``config.seed``, so that the same call
                gives the same answer.
            targets: if given, ``log_prob`` of the result is filled.

        Raises:
            ValueError: if the method is unknown, or ``num_samples``, inputs or targets do not fit.
        """
        return predict.predict(self, inputs, method, num_samples, generator, targets)

    def predict_loader(
        self,
        loader: Iterable[Any],
        method: str = "linearized",
        num_samples: int = 64,
        generator: torch.Generator | None = None,
        keep_samples: bool = False,
    ) -> LoaderPrediction:
        """Predictive distributions for all N examples of a loader, on the CPU, with the loader's targets.

        They do not depend on the batches, except for rounding: drawn adapters are the same for all of them. Under
        ``torchrun`` or ``accelerate launch`` every process makes the call, and takes a part of each batch.

        Args:
            loader: batches as ``fit`` takes them; targets may be missing.
            method: as for :meth:`predict`.
            num_samples: as for :meth:`predict`.
            generator: as for :meth:`predict`.
            keep_samples: whether the result holds all draws, (S, N, m).

        Raises:
            ValueError: if the loader yields nothing, or a batch does not fit.
        """
        return predict.predict_loader(self, loader, method, num_samples, generator, keep_samples)

    def calibrate(self, loader: Iterable[Any]) -> Self:
        """The same posterior with the size of its covariance and the sharpness of its softmax set by held-out data.

        The size multiplies the precision of the prior (under settings with dynamics it divides P). It is chosen by
        the joint likelihood of the examples, 50 or more if possible. The sharpness divides the logits; regressions
        have none, and an estimated σ² is estimated again. ``history["size"]`` and ``history["sharpness"]`` hold the
        value and the ends of its 90 % interval. Warns of a value at an end of what was tried. On several processes all
        of them make the call.

        Args:
            loader: batches with targets that the posterior was not fitted on.

        Raises:
            ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
        """
        return calibration.calibrate([self], [1.0], loader)[0]

    def calibrate_softmax(self, loader: Iterable[Any]) -> Self:
        """The same posterior with its sharpness alone set by held-out data; arguments as for :meth:`calibrate`.

        On several processes all of them make the call.

        Raises:
            ValueError: if the likelihood has no softmax, and as for :meth:`calibrate`.
        """
        return calibration.calibrate_sharpness([self], [1.0], loader)[0]

    def output_variance(self, batch: Any) -> dict[str, float]:
        """Contribution of each tensor to the variance of the outputs, tensor name -> squared units of the outputs.

        It is the mean over examples and outputs of J_t (P Jᵀ)_t times the temperature. For a classifier, outputs count
        less their mean over the classes, which softmax ignores. The numbers add up to the mean variance of the outputs;
        one may be negative, since covariances of two tensors count for both. At most 16 outputs are used.

        Args:
            batch: inputs, or a batch as ``fit`` takes them; its first 8 examples are used.

        Raises:
            ValueError: if the inputs do not fit.
        """
        return output_variance.output_variance(self, batch)

    def guide(self) -> KalmanGuide:
        """A Pyro guide that begins at this posterior, with one sample site per tensor, under its name."""
        from bayes_kf.inference.pyro.kalman_guide import KalmanGuide  # loads Pyro

        return KalmanGuide(self.adapter, self.config, state=self.state)

    @property
    def pyro_model(self) -> Callable[..., Tensor]:
        """The Pyro model, called (inputs, targets=None); tensors are from the prior, targets from the likelihood."""
        from bayes_kf.inference.pyro.kalman_model import KalmanModel  # loads Pyro

        return KalmanModel.of(self)

    @classmethod
    def from_samples(
        cls,
        model: nn.Module | AdapterModel,
        samples: Mapping[str, Tensor],
        config: KalmanConfig | None = None,
        inputs: Inputs | None = None,
    ) -> Self:
        """The Gaussian with the moments of draws, for example of NUTS; see ``covariance.moment_matching``.

        Args:
            model: the module, or an adapter of it.
            samples: tensor name -> S draws, (S, ...), as ``MCMC.get_samples()`` returns; other names are ignored.
            config: the settings; ``covariance`` says how much of the draws' covariance is kept.
            inputs: a batch on which the prior takes its scale, as in ``KalmanFilter.init``, if the config asks for it.

        Raises:
            ValueError: if draws are missing or do not fit, the noise is estimated, or the prior needs ``inputs``.
        """
        return cls(*sample_moments.fitted_to_samples(model, samples, config, inputs))

    def save_pretrained(self, folder: str | Path, scores: Mapping[str, float] | None = None) -> None:
        """Write the adapter (plain PEFT), the settings, the state and a model card; see ``saving.pretrained``.

        Args:
            folder: made if missing. A posterior in it is replaced: if the process is killed, the folder opens as
                the old or the new one. Other files in it stay as they are, an edited model card too.
            scores: for the model card: ``Report.scores`` of an evaluation.

        Raises:
            ValueError: if a file is in the way that bayes_kf did not write (another adapter, say), that was changed
                since, or that is read-only; nothing is changed then.
            OSError: if it cannot be written; the old files stay.
        """
        pretrained.save(self, Path(folder), scores)

    @classmethod
    def from_pretrained(cls, folder: str | Path, base_model: nn.Module, **of_hub: Any) -> Any:
        """Read a posterior that :meth:`save_pretrained` wrote; a mixture if the folder holds one.

        Args:
            folder: the folder, or the name of a repository of the Hub.
            of_hub: its ``revision`` and ``token``; see ``files.hub``.
            base_model: the model itself, not its name. PEFT adds the adapter to it, unless it has the adapter already.

        Raises:
            ValueError: if files are missing or damaged, or belong to another model; nothing is changed then.
        """
        loaded = pretrained.load(local_folder(folder, argument="folder", **of_hub), base_model)
        members = tuple(cls(*parts) for parts in loaded.members)
        return members[0] if loaded.weights is None else cls.mixture_type(members, tuple(loaded.weights))

    def export_adapters(
        self, folder: str | Path, num_samples: int = 8, generator: torch.Generator | None = None, width: float = 1.0
    ) -> list[Path]:
        """Write draws from the posterior as PEFT adapters ``draw_0``, ``draw_1``, ... and return their folders.

        Args:
            folder: made if missing. Draws of an earlier call are replaced, all or none; other files, a posterior
                among them, stay as they are. ``SHA256SUMS.draws`` lists the written files, ``draws.json`` the draws.
            num_samples: number of draws.
            generator: source of the draws; by default a new one seeded with ``config.seed``.
            width: factor on their standard deviations; ``serving.draw_width`` chooses one.

        Raises:
            ValueError: if the model is no PEFT model, and as for :meth:`save_pretrained`.
            OSError: if it cannot be written; the old files stay.
        """
        return pretrained.export_draws(self, Path(folder), self.sample(num_samples, generator, width), width)

    def to_arviz(
        self, num_samples: int = 500, generator: torch.Generator | None = None, loader: Iterable[Any] | None = None
    ) -> Any:
        """Draws from the posterior as ArviZ data: group ``posterior``, one variable per tensor.

        A loader of N examples adds three groups with the variable ``target``: ``observed_data`` (N,);
        ``posterior_predictive`` (chain, draw, N), a target drawn from the likelihood of every drawn adapter; and
        ``log_likelihood`` (chain, draw, N). Targets of several outputs have them as the last axis; their log-likelihood
        is the joint one. The draws are independent; ``arviz_export.num_chains`` divides them into chains for R̂.

        Args:
            num_samples: S draws.
            generator: source of the draws; by default a new one seeded with ``config.seed``.
            loader: batches with targets, as ``fit`` takes them. ``loo`` needs the data of the fit.

        Raises:
            ValueError: if the loader yields nothing, or a batch has no targets or does not fit.
        """
        return arviz_export.to_arviz(self, num_samples, generator, loader)


KalmanFilter.posterior_type = Posterior
