"""``fit_mixture``: several posteriors of one data set, and their mixture.

1. For each member another eighth of the examples is held out. The members start from other random LoRA factors, as far
   as these have no effect yet. Over the other examples: a pass of the filter; passes of the mean, up to the latest one
   that the held-out examples do not reject; and the covariance at that mean.
2. The held-out examples of all members choose the size of the covariances, the weights and one divisor of the logits.
3. The covariance of each member with a weight learns its held-out examples. Their mean was learned by the other
   members; a single member learns it in one more pass over all data.

Ours. ``docs/how-to/mixture.md`` explains it; ``benchmarks/quality/split`` measures it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.defaults.default_curvature import EXACT_IN_MIXTURE, default_curvature
from bayes_kf.inference.fitting.defaults.default_likelihood import as_text, default_likelihood
from bayes_kf.inference.fitting.defaults.default_prior import (
    NEW,
    default_prior,
    later_loss,
    learned_nothing,
    narrower_priors,
)
from bayes_kf.inference.fitting.fit_config import fit_config
from bayes_kf.inference.fitting.fitting_together import fitting_together
from bayes_kf.inference.fitting.loader import first_batches, num_batches
from bayes_kf.inference.fitting.loop import inputs_and_targets
from bayes_kf.inference.fitting.passes.covariance_pass import add_at_mean, covariance_pass
from bayes_kf.inference.fitting.passes.early_stopping import early_stopped_passes
from bayes_kf.inference.fitting.passes.mean_pass import mean_pass
from bayes_kf.inference.fitting.progress import ProgressBar, shows_progress
from bayes_kf.inference.fitting.reading import read_data
from bayes_kf.inference.fitting.regression.examples import holds_real_targets, holds_text
from bayes_kf.inference.fitting.regression.regression_mixture import MEMBERS as REAL_MEMBERS
from bayes_kf.inference.fitting.regression.regression_mixture import fit_regression_mixture
from bayes_kf.inference.fitting.selection.heldout_config_selection import (
    HELDOUT_SHARE,
    Split,
    check_candidates,
    shuffled,
    split_loader,
)
from bayes_kf.inference.heldout import calibration, noise_and_size
from bayes_kf.inference.heldout.choice import Choice
from bayes_kf.inference.heldout.covariance_size import is_static, with_size
from bayes_kf.inference.heldout.heldout_examples import heldout_batches, heldout_outputs, thinned
from bayes_kf.inference.heldout.member_weights import choose_weights
from bayes_kf.inference.heldout.sharpness import choose_sharpness, cross_fitted_sharpness
from bayes_kf.inference.heldout.text_size import sampled_text_losses
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.batch import split_batch
from bayes_kf.models.language import LearnedTokens, token_reading
from bayes_kf.models.prior.layer_tensors import redrawn_factors
from bayes_kf.validation import check_whole

BATCH = 16  # the most examples of a batch
MEMBERS = 2
PRIOR_EXAMPLES = 128  # on which the default prior is chosen, at least
TEXT_RANK = 20  # of their covariances if they are over text, whose adapters are large
MEAN_PASSES = 5  # of each member
LAST_STEP_SIZE = 0.5  # r of the first step of the pass in which a single member learns its held-out examples


class Member(NamedTuple):
    """A member, fitted to most of the data.

    Attributes:
        posterior: at the size 1.
        split: its data.
    """

    posterior: Posterior
    split: Split


def fit_mixture(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    configs: Sequence[KalmanConfig] | None = None,
    *,
    members: int | None = None,
    progress: bool | None = None,
) -> MixturePosterior:
    """A mixture of posteriors of one data set.

    One example in eight is held out from each member, for each another. These examples choose the sizes of the
    covariances, the weights and the sharpness. Temperatures in the settings are not used. On several processes all
    of them make the call, as for :func:`bayes_kf.fit`.

    Args:
        model: as for :func:`bayes_kf.fit`; its weights are not changed.
        loader: a DataLoader over a data set, or a list of at least eight batches. The members are fitted to batches of
            at most 16 examples, in another order in every pass.
        configs: the settings of each member, with ``mean_passes`` passes of its mean; None: a wide prior for all, with
            the likelihood of the targets, as :func:`bayes_kf.fit` without a config. For float targets: fits as
            :func:`bayes_kf.fit` makes them, from other starts; nothing is held out.
        members: their number, without ``configs``; None: 2, and 3 for float targets. The time is proportional to it.
        progress: as for :func:`bayes_kf.fit`.

    Raises:
        ValueError: if the loader cannot be split, a batch does not fit, the configs are not of one likelihood, or
            ``members`` is not a whole number of at least 1.
        FitDivergenceError: if all members diverge.

    Example:
        >>> import bayes_kf as bkf
        >>> x = torch.linspace(-2, 2, 64)[:, None]
        >>> data = [(x[k::16], (x[k::16, 0] > 0).long()) for k in range(16)]
        >>> posterior = fit_mixture(nn.Linear(1, 2), data, progress=False)
        >>> posterior.predict(torch.tensor([[-2.0], [2.0]])).probs.argmax(1)
        tensor([0, 1])
    """
    if members is not None:
        check_whole("members", members)
    model, loader = read_data(model, loader)
    with fitting_together(model, loader, "fit_mixture", configs, members):
        return _fit_mixture(model, loader, configs, members, progress)


def _fit_mixture(
    model: nn.Module | AdapterModel,
    loader: Iterable[Any],
    configs: Sequence[KalmanConfig] | None,
    members: int | None,
    progress: bool | None,
) -> MixturePosterior:
    """:func:`fit_mixture` of processes that share the work."""
    if configs is None and holds_real_targets(loader, model):
        return fit_regression_mixture(model, loader, shows_progress(progress), members or REAL_MEMBERS)
    if split_loader(loader) is None:
        raise ValueError(
            "`loader` must be a DataLoader over a data set or a list of at least 8 batches, "
            f"got {type(loader).__name__}."
        )
    shown = shows_progress(progress)
    if configs is None:
        return fit_default_mixture(model, loader, shown, members=members or MEMBERS)
    adapter = model if isinstance(model, AdapterModel) else AdapterModel(model)
    return _combined(_fit_members(adapter, loader, check_candidates(configs), shown), shown)


def fit_default_mixture(
    model: nn.Module | AdapterModel, loader: Iterable[Any], progress: bool, seed: int = 0, members: int = MEMBERS
) -> MixturePosterior:
    """:func:`fit_mixture` without settings, for a loader that can be split and targets that are not real numbers."""
    if not isinstance(model, AdapterModel):
        model = token_reading(model) if holds_text(loader, model) else AdapterModel(model)
    configs = default_members(model, loader, members, seed)
    return _combined(_fit_members(model, loader, configs, progress, narrower_priors(configs[0])), progress)


def default_members(
    adapter: AdapterModel, loader: Iterable[Any], members: int = MEMBERS, seed: int = 0
) -> list[KalmanConfig]:
    """The settings of members without settings: a wide prior, each with its own seed."""
    if isinstance(adapter, LearnedTokens):
        text = as_text(KalmanConfig(rank=TEXT_RANK, mean_passes=MEAN_PASSES), adapter.num_probes)
        return [dataclasses.replace(text, seed=seed + number) for number in range(members)]
    batches = iter(loader)
    first = first_batches(batches, PRIOR_EXAMPLES)
    inputs, _ = inputs_and_targets(first[0], 0)
    curvature = default_curvature(adapter, inputs, EXACT_IN_MIXTURE)
    likelihood = default_likelihood((split_batch(batch)[1] for batch in itertools.chain(first, batches)), adapter)
    if likelihood:
        chosen = likelihood | NEW | {"curvature": "exact"}
    else:
        chosen = {"curvature": curvature} | default_prior(
            adapter, [inputs_and_targets(b, n) for n, b in enumerate(first)]
        )
    common: dict[str, Any] = {"rank": 60, "mean_passes": MEAN_PASSES} | chosen
    return [KalmanConfig(**common, seed=seed + number) for number in range(members)]


def _fit_members(
    adapter: AdapterModel,
    loader: Iterable[Any],
    configs: Sequence[KalmanConfig],
    progress: bool,
    narrower: Sequence[dict[str, Any]] = (),
) -> list[Member]:
    """The members that did not diverge.

    Args:
        adapter: the model.
        loader: can be split.
        configs: of the members.
        progress: whether to show it.
        narrower: priors for all members, tried in turn while the first member learns nothing in its pass.

    Raises:
        FitDivergenceError: if all of them diverge.
    """
    members, divergence, change = list[Member](), None, dict[str, Any]()
    for number, config in enumerate(configs):
        split = split_loader(loader, number % HELDOUT_SHARE)
        assert split is not None
        split = shuffled(split, BATCH)
        generator = torch.Generator().manual_seed(config.seed + number)
        start = redrawn_factors(adapter, generator) if number else adapter.vector()
        label = f"member {number + 1}: "
        try:
            changes = [change] if members else [{}, *narrower]
            first, change = _pass_that_learns(adapter, split, config, changes, start, progress, label)
            posterior = _fit_member(first, split, config.mean_passes, progress, label)
        except DivergenceError as error:
            divergence = error
        else:
            members.append(Member(posterior, split))
    if divergence is not None and not members:
        raise divergence
    return members


def _pass_that_learns(
    adapter: AdapterModel,
    split: Split,
    config: KalmanConfig,
    changes: Sequence[dict[str, Any]],
    start: Tensor,
    progress: bool,
    label: str,
) -> tuple[Posterior, dict[str, Any]]:
    """The filter's pass over the first part of a member's data from the prior mean ``start``, (n,), at size 1.

    It is that of the first of the changes of ``config`` under which something is learned. A change that follows one
    under which nothing is learned counts only if the later half of its pass is predicted better.
    """
    single = dataclasses.replace(config, mean_passes=0, temperature=1.0, softmax_temperature=1.0, tune=None)
    best: tuple[Posterior, dict[str, Any]] | None = None
    for change in changes:
        fitted, changed = _WithTargets(split.fitted), dataclasses.replace(single, **change)
        first = fit_config(adapter, fitted, changed, "prior", progress, label, prior_mean=start)
        if best is not None and later_loss(first.history["log_loss"]) >= later_loss(best[0].history["log_loss"]):
            break
        best = first, change
        if change is changes[-1] or not learned_nothing(first.history["log_loss"], fitted.targets):
            break
    assert best is not None  # there is at least one change
    return best


class _WithTargets:
    """A loader that remembers the targets of its latest pass; another pass for them would be in another order."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self.targets: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError if it has none

    def __iter__(self) -> Iterator[Any]:
        self.targets = []
        for batch in self._loader:
            self.targets.append(inputs_and_targets(batch, len(self.targets))[1])
            yield batch


def _fit_member(first: Posterior, split: Split, mean_passes: int, progress: bool, label: str) -> Posterior:
    """A member after its first pass: passes of the mean, and the covariance there."""
    kf, bar = first.kf, _bars(split.fitted, progress, label)
    heldout = list(heldout_batches(first, split.heldout))
    stopped = early_stopped_passes(kf, first.state, split.fitted, heldout, mean_passes, bar)
    with bar("covariance at the mean") as at_mean:
        state = covariance_pass(kf, stopped.state, split.fitted, at_mean)
    losses = torch.tensor(stopped.losses, dtype=torch.float64)
    return Posterior(kf, state, first.history | {"held_out_log_loss": losses})


def _combined(members: Sequence[Member], progress: bool) -> MixturePosterior:
    """The mixture of the members that get a weight, at the chosen sizes and sharpness, with all data learned."""
    likelihood = members[0].posterior.config.likelihood
    is_class = likelihood == "categorical"
    sized = _with_sizes(members)
    if likelihood == "tokens":
        outputs = []
        losses = [sampled_text_losses(m.posterior, heldout_batches(m.posterior, m.split.heldout)) for m in sized]
    else:
        outputs = [heldout_outputs(member.posterior, member.split.heldout) for member in sized]
        divisors = [choose_sharpness([held]).value if is_class else 1.0 for held in outputs]
        losses = [held.log_loss(divisor) for held, divisor in zip(outputs, divisors, strict=True)]
    weights = choose_weights(losses)
    kept = [number for number, weight in enumerate(weights) if weight > 0.0]
    sharpness = cross_fitted_sharpness([outputs[number] for number in kept]) if is_class else None
    if sharpness:
        calibration.warn([calibration.edge_of_sharpness(sharpness)], stacklevel=4)
    is_single = len(kept) == 1
    posteriors = tuple(_learn_heldout(sized[number], sharpness, is_single, progress) for number in kept)
    return MixturePosterior(posteriors, tuple(weights[number] for number in kept), posteriors[0].history)


def _with_sizes(members: Sequence[Member]) -> list[Member]:
    """The members at the chosen sizes; those with the same settings but for the seed have one size."""
    sized = list(members)
    kinds = [dataclasses.replace(member.posterior.config, seed=0) for member in members]
    for kind in dict.fromkeys(map(repr, kinds)):
        alike = [number for number, other in enumerate(kinds) if repr(other) == kind]
        if noise_and_size.chooses_noise(members[alike[0]].posterior):
            for number in alike:
                sized[number] = _with_noise_and_size(members[number])
            continue
        limit = -(-calibration.SIZE_EXAMPLES // len(alike))
        size = calibration.common_size([_of_limited_size(members[n], limit) for n in alike])
        static = is_static(members[alike[0]].posterior.config.dynamics_settings)
        calibration.warn([calibration.edge_of_size(size, static)], stacklevel=5)
        for number in alike:
            posterior = with_size(members[number].posterior, size.value)
            history = posterior.history | {"size": size.as_tensor()}
            sized[number] = members[number]._replace(posterior=dataclasses.replace(posterior, history=history))
    return sized


def _with_noise_and_size(member: Member) -> Member:
    """A member at the size and the σ² of Gaussian noise that its held-out examples choose together."""
    posterior, batches = _of_limited_size(member, calibration.SIZE_EXAMPLES)
    chosen = noise_and_size.choose_noise_and_size(posterior, batches)
    calibration.warn([calibration.edge_of_size(chosen.size)], stacklevel=6)
    posterior = noise_and_size.with_noise_and_size(posterior, chosen)
    history = posterior.history | {"size": chosen.size.as_tensor()}
    return member._replace(posterior=dataclasses.replace(posterior, history=history))


def _of_limited_size(member: Member, limit: int) -> tuple[Posterior, list[tuple[Any, Tensor]]]:
    """A member and its held-out examples, thinned out to at most ``limit``."""
    return member.posterior, thinned(member.posterior, member.split.heldout, limit)


def _learn_heldout(member: Member, sharpness: Choice | None, learns_mean: bool, progress: bool) -> Posterior:
    """A member with the held-out examples learned, and its predictions at the chosen sharpness."""
    posterior, split = member
    with _bars(split.heldout, progress, "")("the held-out part") as held:
        state = add_at_mean(posterior.kf, posterior.state, split.heldout, held)
    if learns_mean:
        everything = itertools.chain(split.fitted, split.heldout)
        with ProgressBar(None, "last mean pass", progress) as last:
            state, _ = mean_pass(posterior.kf, state, everything, 0, 1, last, step_size=LAST_STEP_SIZE)
    if sharpness is None:
        return dataclasses.replace(posterior, state=state)
    history = posterior.history | {"sharpness": sharpness.as_tensor()}
    learned = dataclasses.replace(posterior, state=state, history=history)
    return learned.with_settings(softmax_temperature=sharpness.value)


def _bars(loader: Iterable[Any], progress: bool, label: str) -> Callable[[str], ProgressBar]:
    return lambda text: ProgressBar(num_batches(loader), f"{label}{text}", progress)
