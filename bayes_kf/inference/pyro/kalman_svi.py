"""``KalmanSVI``: the filter behind the interface of ``pyro.infer.SVI``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.config_combinations import EQUAL_WEIGHTS
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.kalman_filter import KalmanFilter
from bayes_kf.inference.filtering.measurement_update import check_belief
from bayes_kf.inference.filtering.state import DIVERGED, DivergenceError, FilterState
from bayes_kf.inference.fitting.loop import batch_in_errors, inputs_and_targets
from bayes_kf.inference.fitting.passes.mean_pass import natural_gradient_step
from bayes_kf.inference.pyro.kalman_guide import KalmanGuide
from bayes_kf.inference.pyro.local_gaussians import prior_of, reevaluated
from bayes_kf.inference.pyro.model_prior import check_prior, read_priors
from bayes_kf.inference.pyro.site_priors import SitePrior
from bayes_kf.models.batch import Batch, Inputs
from bayes_kf.validation import check_whole

PLAIN = prequential_temperature.GRID.index(1.0)  # the temperature at which losses are reported


class KalmanSVI:
    """Inference by the filter, in the place of ``SVI(model, guide, optimizer, Trace_ELBO())``.

    A step updates the guide once with a batch: there is no learning rate, no gradient noise, and one pass is enough for
    a model that is linear in its parameters.

    The model is ``guide.model``, or any Pyro model ``(inputs, targets)`` whose sample sites are the trainable tensors
    and whose one observed site has the likelihood of the config. Its priors become those of the filter at the first
    step: Normal ones exactly; Laplace, StudentT, Cauchy and ``bayes_kf.inference.Horseshoe`` ones by local Gaussian
    terms (expectation propagation, ``pyro.local_gaussians``), which each step evaluates again. Prior settings of the
    config, also ``bound_prior``, do not count then. The filter begins at the mean of the priors. If all layers of a
    network are zero there, only the last one can learn: give the sites means such as ``guide.median()``.

    With ``num_data`` a loop may go over the data several times, as for SVI. The first ``num_data`` examples update
    mean and covariance. Later ones move the mean alone, by natural-gradient steps toward the mode (those of
    ``mean_passes``) with step size N / (examples so far), so that no example counts twice. Without ``num_data`` every
    batch is new data.

    Args:
        model: the Pyro model.
        guide: the guide to advance.

    Raises:
        ValueError: if the guide is not a KalmanGuide or the model is not callable.

    Example:
        >>> import bayes_kf as bkf
        >>> config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0)
        >>> guide = KalmanGuide(torch.nn.Linear(2, 1), config)
        >>> svi = KalmanSVI(guide.model, guide)
        >>> losses = [svi.step(torch.randn(4, 2), torch.randn(4, 1)) for _ in range(3)]
    """

    def __init__(self, model: Callable[..., Any], guide: KalmanGuide) -> None:
        if not isinstance(guide, KalmanGuide):
            raise ValueError(f"`guide` must be a KalmanGuide, got {type(guide).__name__}.")
        if not callable(model):
            raise ValueError(f"`model` must be a Pyro model, a callable, got {type(model).__name__}.")
        self.model, self.guide = model, guide
        self._priors: list[SitePrior] | None = None  # of a model of the user's own, once it was read
        config = guide.config
        self._kf = KalmanFilter(guide.adapter, replace(config, temperature="prequential", tune=None))
        self._first_batch: list[float] | None = None  # sums over its tensors
        self._warned = False

    def step(self, inputs: Inputs, targets: Tensor, num_data: int | None = None) -> float:
        """The loss of a batch, in nats, before the guide was updated with it.

        The loss is the prequential −Σᵢ log p(yᵢ | earlier batches) of the B examples, under the predictions of the
        belief N(μ, P) linearized at its mean (temperature 1), each example on its own. For Gaussian targets it is in
        closed form; otherwise it is integrated numerically, with "sampled" curvature for outputs that vary
        independently. Over one pass of single examples it adds up to −log p(y),
        which a negative ELBO bounds from above, for models that are linear in θ. With ``num_data`` = N it is multiplied
        by N/B, as SVI's is, and is then an estimate of the loss of all data. From the second pass on it is N/B times
        −log p(y | x, μ), and not prequential any more.

        Args:
            inputs: a tensor (B, ...) or a mapping of the model's keyword arguments.
            targets: (B,) class labels, or (B, m) numbers for the other likelihoods.
            num_data: N, the number of examples in all batches, those learned before included.

        Raises:
            ValueError: if the model, inputs or targets do not fit, or ``num_data`` is less than the number of examples.
            DivergenceError: if the update would not be finite. The guide is not changed by an error.
        """
        size, revisited = Batch.of(inputs).size, self.guide.store.read().revisited
        state = self._start(inputs, targets, num_data)
        if num_data is not None:
            check_whole("num_data", num_data)
            if state.examples != num_data and state.examples + size > num_data:
                raise ValueError(
                    "`num_data` must be at least the number of examples that the guide has learned with this batch, "
                    f"{state.examples + size}, got {num_data}."
                )
        self._warn_if_repeated(inputs, targets, num_data)
        if num_data is not None and state.examples == num_data:
            state, loss = self._mean_step(state, inputs, targets, num_data / (num_data + revisited))
            revisited += size
        else:
            before, (state, loss) = state, self._update(state, inputs, targets)
            self._warn_if_stuck(before, state)
        self.guide.store.write(self._with_local_terms(state), revisited)
        return loss if num_data is None else loss * num_data / size

    def evaluate_loss(self, inputs: Inputs, targets: Tensor, num_data: int | None = None) -> float:
        """The loss that :meth:`step` returns for a batch of new data; the guide is not changed.

        Args:
            inputs: as for :meth:`step`.
            targets: as for :meth:`step`.
            num_data: N; the loss is multiplied by N/B.
        """
        size = Batch.of(inputs).size
        loss = self._update(self._start(inputs, targets, num_data), inputs, targets)[1]
        return loss if num_data is None else loss * num_data / size

    def run(self, loader: Iterable[Any], num_data: int | None = None) -> list[float]:
        """The losses of a step with every batch of a loader.

        Args:
            loader: batches ``(inputs, targets)`` or mappings with ``labels``.
            num_data: as for :meth:`step`.

        Raises:
            ValueError: if the loader is empty or a batch does not fit; the message gives the number of the batch.
        """
        losses = []
        for number, batch in enumerate(loader):
            inputs, targets = inputs_and_targets(batch, number)
            with batch_in_errors(number):
                losses.append(self.step(inputs, targets, num_data))
        if not losses:
            raise ValueError("`loader` must yield at least one batch, got none.")
        return losses

    def _start(self, inputs: Inputs, targets: Tensor, num_data: int | None) -> FilterState:
        """The guide's state, under the priors of the model if it has not learned yet."""
        state = self.guide.state
        if self.model is self.guide.model:
            return state
        if self._priors is None:
            priors = read_priors(self.model, self.guide, inputs, targets, num_data)
            if state.step:
                check_prior(priors, state.prior)
            self._priors = priors
        if state.step == 0:
            return self._kf.init_from_prior(prior_of(self._priors))
        return state

    def _update(self, state: FilterState, inputs: Inputs, targets: Tensor) -> tuple[FilterState, float]:
        """The state after a batch of new data, and its loss."""
        before = state.temperature_scores
        after, _ = self._kf.update(state, inputs, targets)
        loss = float(after.temperature_scores.total[PLAIN])
        loss = loss - float(before.total[PLAIN]) if math.isfinite(loss) else loss
        if not isinstance(self.guide.config.temperature, str):  # nothing chooses by the scores
            after = after._replace(temperature_scores=before)
        return after, loss

    def _with_local_terms(self, state: FilterState) -> FilterState:
        """The state after an update with the local terms of its prior evaluated again."""
        if self._priors is None:
            return state
        try:
            after = reevaluated(state, self._priors)
            check_belief(after.belief)
        except DIVERGED as error:
            cause = f"local terms of the prior: {str(error).splitlines()[0]}"
            raise DivergenceError(self.guide.state.step, cause, self.guide.state) from error
        return after

    def _mean_step(
        self, state: FilterState, inputs: Inputs, targets: Tensor, step_size: float
    ) -> tuple[FilterState, float]:
        """The state with its mean moved by a batch that it has learned before, and −log p(y | x, μ) before."""
        config = self.guide.config
        needed = EQUAL_WEIGHTS | {"noise": "exponential_family"}
        changed = [name for name, value in needed.items() if getattr(config, name) != value]
        if changed:
            raise ValueError(
                f"`config` must have `{changed[0]}` {needed[changed[0]]!r} for a second pass over the data, got "
                f"{getattr(config, changed[0])!r}."
            )
        after, loss = natural_gradient_step(config, self.guide.adapter, state, inputs, targets, step_size)
        if not bool(torch.isfinite(after.belief.mean).all()):
            raise DivergenceError(state.step, "the mean in a further pass would not be finite", state)
        return after, loss

    def _warn_if_repeated(self, inputs: Inputs, targets: Tensor, num_data: int | None) -> None:
        """Warn once if the first batch comes again and would count as new data."""
        if num_data is not None or self._warned:
            return
        tensors = [inputs, targets] if isinstance(inputs, Tensor) else [*inputs.values(), targets]
        sums = [float(tensor.double().sum()) for tensor in tensors if isinstance(tensor, Tensor)]
        if self._first_batch is None:
            self._first_batch = sums
        elif sums == self._first_batch:
            self._warned = True
            warnings.warn(
                "the first batch was given again without `num_data`: it counts as new data, and the covariance "
                "becomes too small if it is not. With `num_data`, further passes count no example twice.",
                stacklevel=3,
            )

    def _warn_if_stuck(self, before: FilterState, after: FilterState) -> None:
        """Warn after the first update if a site whose prior mean is zero has not moved."""
        if before.step or self.model is self.guide.model:
            return
        for name, where in self.guide.adapter.slices().items():
            start, end = before.belief.mean[where], after.belief.mean[where]
            if not bool(start.any()) and torch.equal(start, end):
                warnings.warn(
                    f"the outputs do not depend on {name!r} where all sites have their prior means, so that it has not "
                    "learned; a prior mean other than zero, such as `guide.median()`, avoids this.",
                    stacklevel=3,
                )
                return
