"""``fit_mixture``: several posteriors of one data set, and the mixture of those that predict held-out data well.

1. One example in eight is held out. For each member, which differ in their priors:
   a pass of the filter over the others; passes of the mean, up to the latest one that the held-out examples do not
   reject; and the covariance at that mean.
2. The held-out examples choose the size of each covariance, the weights of the members and one divisor of the logits.
3. Each member with a weight learns the held-out examples: its covariance, and its mean in one more pass over all data.

Ours. ``docs/how-to/mixture.md`` explains it; ``benchmarks/quality/split`` measures it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.default_likelihood import default_likelihood
from bayes_kf.inference.fitting.fit_config import fit_config
from bayes_kf.inference.fitting.loader import num_batches
from bayes_kf.inference.fitting.passes.covariance_pass import add_at_mean, covariance_pass
from bayes_kf.inference.fitting.passes.early_stopping import early_stopped_passes
from bayes_kf.inference.fitting.passes.mean_pass import mean_pass
from bayes_kf.inference.fitting.progress import ProgressBar, shows_progress
from bayes_kf.inference.fitting.regression.examples import holds_real_targets
from bayes_kf.inference.fitting.regression.regression_mixture import fit_regression_mixture
from bayes_kf.inference.fitting.selection.heldout_config_selection import (
    WIDE_LOGIT_SD,
    Split,
    check_candidates,
    shuffled,
    split_loader,
)
from bayes_kf.inference.heldout import noise_and_size
from bayes_kf.inference.heldout.choice import Choice
from bayes_kf.inference.heldout.covariance_size import choose_size, with_size
from bayes_kf.inference.heldout.heldout_examples import HeldoutOutputs, heldout_outputs
from bayes_kf.inference.heldout.member_weights import choose_weights
from bayes_kf.inference.heldout.sharpness import choose_sharpness
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.heldout_calibration import heldout_batches
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import check_inputs, split_batch, to_device

BATCH = 16  # the most examples of a batch
MEAN_PASSES = 6  # of each member
FEW_OUTPUTS = 3  # with more, the curvature is sampled: exact curvature takes a backward pass for each
LAST_STEP_SIZE = 0.5  # r of the first step of the pass that learns the held-out examples


class Member(NamedTuple):
    """A member, fitted to most of the data.

    Attributes:
        posterior: at the size that the held-out examples chose.
        size: that size.
        heldout: its predictions of the held-out examples.
        log_loss: of each of them at the member's own best divisor, (N,).
    """

    posterior: Posterior
    size: Choice
    heldout: HeldoutOutputs
    log_loss: Tensor


def fit_mixture(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    configs: Sequence[KalmanConfig] | None = None,
    *,
    progress: bool | None = None,
) -> MixturePosterior:
    """A mixture of posteriors of one data set, whose members differ in their priors.

    One example in eight is held out while the members are fitted. It chooses the size of each covariance, the weights
    and the sharpness, and is learned at the end. Temperatures in the settings are not used.

    Args:
        model: as for :func:`bayes_kf.fit`; its weights are not changed.
        loader: a DataLoader over a data set, or a list of at least eight batches. The members are fitted to batches of
            at most 16 examples, in another order in every pass.
        configs: the settings of each member, with ``mean_passes`` passes of its mean; None: a cautious prior and a
            wide one, with the likelihood of the targets, as :func:`bayes_kf.fit` without a config. For float targets:
            three fits as :func:`bayes_kf.fit` makes them, from other starts; nothing is held out.
        progress: as for :func:`bayes_kf.fit`.

    Raises:
        ValueError: if the loader cannot be split, a batch does not fit, or the configs are not of one likelihood.
        FitDivergenceError: if all members diverge.

    Example:
        >>> import bayes_kf as bkf
        >>> x = torch.linspace(-2, 2, 64)[:, None]
        >>> data = [(x[k::16], (x[k::16, 0] > 0).long()) for k in range(16)]
        >>> posterior = fit_mixture(nn.Linear(1, 2), data, progress=False)
        >>> posterior.predict(torch.tensor([[-2.0], [2.0]])).probs.argmax(1)
        tensor([0, 1])
    """
    if configs is None and holds_real_targets(loader):
        return fit_regression_mixture(model, loader, shows_progress(progress))
    split = split_loader(loader) if isinstance(loader, Iterable) else None
    if split is None:
        raise ValueError(
            "`loader` must be a DataLoader over a data set or a list of at least 8 batches, "
            f"got {type(loader).__name__}."
        )
    adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
    split = shuffled(split, BATCH)
    members = default_members(adapter, split.fitted) if configs is None else check_candidates(configs)
    shown = shows_progress(progress)
    return _combined(_fit_members(adapter, split, members, shown), split, shown)


def default_members(adapter: AdapterModel, loader: Iterable[Any], seed: int = 0) -> list[KalmanConfig]:
    """The settings of the members without settings: a cautious prior of 3 logits, and a wide one of 10."""
    batches = iter(loader)
    first = next(batches)
    inputs, _ = split_batch(first)
    check_inputs(inputs)
    outputs = adapter.outputs(adapter.vector(), to_device(inputs, adapter.device)).shape[1]
    likelihood = default_likelihood(split_batch(batch)[1] for batch in itertools.chain([first], batches))
    curvature = "sampled" if outputs > FEW_OUTPUTS and not likelihood else "exact"
    common: dict[str, Any] = {"rank": 60, "mean_passes": MEAN_PASSES, "curvature": curvature, "seed": seed} | likelihood
    wide: dict[str, Any] = {"initial_spread": "constant", "initial_logit_sd": WIDE_LOGIT_SD}
    return [KalmanConfig(**common), KalmanConfig(**common, **wide)]


def _fit_members(adapter: AdapterModel, split: Split, configs: Sequence[KalmanConfig], progress: bool) -> list[Member]:
    """The members that did not diverge.

    Raises:
        FitDivergenceError: if all of them diverge.
    """
    members, divergence = list[Member](), None
    for number, config in enumerate(configs, 1):
        try:
            members.append(_fit_member(adapter, split, config, progress, f"member {number}: "))
        except DivergenceError as error:
            divergence = error
    if divergence is not None and not members:
        raise divergence
    return members


def _combined(members: Sequence[Member], split: Split, progress: bool) -> MixturePosterior:
    """The mixture of the members that get a weight, with all data learned."""
    weights = choose_weights([member.log_loss for member in members])
    pairs = [(member, weight) for member, weight in zip(members, weights, strict=True) if weight > 0.0]
    shares = [weight for _, weight in pairs]
    is_class = members[0].posterior.config.likelihood == "categorical"
    sharpness = choose_sharpness([member.heldout for member, _ in pairs], weights=shares) if is_class else None
    posteriors = tuple(_learn_heldout(member, split, sharpness, progress) for member, _ in pairs)
    return MixturePosterior(posteriors, tuple(shares), posteriors[0].history)


def _fit_member(adapter: AdapterModel, split: Split, config: KalmanConfig, progress: bool, label: str) -> Member:
    single = dataclasses.replace(config, mean_passes=0, temperature=1.0, softmax_temperature=1.0, tune=None)
    first = fit_config(adapter, split.fitted, single, "prior", progress, label)
    kf, bar = first.kf, _bars(split.fitted, progress, label)
    heldout = list(heldout_batches(first, split.heldout))
    stopped = early_stopped_passes(kf, first.state, split.fitted, heldout, config.mean_passes, bar)
    with bar("covariance at the mean") as at_mean:
        state = covariance_pass(kf, stopped.state, split.fitted, at_mean)
    losses = torch.tensor(stopped.losses, dtype=torch.float64)
    posterior = Posterior(kf, state, first.history | {"held_out_log_loss": losses})
    posterior, size = _sized(posterior, split.heldout)
    outputs = heldout_outputs(posterior, split.heldout)
    divisor = choose_sharpness([outputs]).value if config.likelihood == "categorical" else 1.0
    return Member(posterior, size, outputs, outputs.log_loss(divisor))


def _sized(posterior: Posterior, heldout: Iterable[Any]) -> tuple[Posterior, Choice]:
    """The posterior at the size that held-out examples choose, with the σ² that they choose if it is estimated."""
    if noise_and_size.chooses_noise(posterior):
        chosen = noise_and_size.choose_noise_and_size(posterior, heldout)
        return noise_and_size.with_noise_and_size(posterior, chosen), chosen.size
    size = choose_size(posterior, heldout)
    return with_size(posterior, size.value), size


def _learn_heldout(member: Member, split: Split, sharpness: Choice | None, progress: bool) -> Posterior:
    """A member with the held-out examples learned, and its predictions at the chosen sharpness."""
    posterior, kf = member.posterior, member.posterior.kf
    with _bars(split.heldout, progress, "")("the held-out part") as held:
        state = add_at_mean(kf, posterior.state, split.heldout, held)
    everything = itertools.chain(split.fitted, split.heldout)
    with ProgressBar(None, "last mean pass", progress) as last:
        state, _ = mean_pass(kf, state, everything, 0, 1, last, step_size=LAST_STEP_SIZE)
    history = posterior.history | {"size": member.size.as_tensor()}
    if sharpness is None:
        return dataclasses.replace(posterior, state=state, history=history)
    history |= {"sharpness": sharpness.as_tensor()}
    learned = dataclasses.replace(posterior, state=state, history=history)
    return learned.with_settings(softmax_temperature=sharpness.value)


def _bars(loader: Iterable[Any], progress: bool, label: str) -> Callable[[str], ProgressBar]:
    return lambda text: ProgressBar(num_batches(loader), f"{label}{text}", progress)
