"""Rewards under one posterior or a mixture."""

from __future__ import annotations

from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.inference.predictive.rewards import Rewards, joint_rewards
from bayes_kf.models.batch import Inputs


def rewards(posterior: Posterior | MixturePosterior, inputs: Inputs) -> Rewards:
    """The joint distribution of the rewards of N texts, under a posterior that was fitted to preference pairs.

    It is that of the linearized model, N(f(x, μ), J P Jᵀ), with the covariances of different texts; for a mixture, a
    mixture of these.

    Args:
        posterior: over a reward model (``models.language.PreferencePairs``), also one that was loaded from a folder.
        inputs: of the model, for N texts: ``input_ids`` (N, T) and, if there is padding, ``attention_mask`` (N, T).

    Raises:
        ValueError: if the model has more than one output, or the inputs do not fit.

    Example:
        >>> import torch
        >>> import bayes_kf as bkf
        >>> from bayes_kf.models.language import PreferencePairs
        >>> features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> better = features @ torch.tensor([1.0, -1.0, 0.0]) > 0
        >>> pairs = {"input_chosen": features[better], "input_rejected": -features[better]}
        >>> config = bkf.KalmanConfig(likelihood="bernoulli")
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> posterior = bkf.fit(PreferencePairs(model), [pairs], config, progress=False)
        >>> texts = rewards(posterior, torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]))
        >>> texts.mean.shape, texts.best_of_n()
        (torch.Size([2]), 0)
    """
    if isinstance(posterior, MixturePosterior):
        return joint_rewards(posterior.members, posterior.weights, inputs)
    return joint_rewards([posterior], [1.0], inputs)
