"""A language model whose next token several drawn adapters predict together, for ``generate`` of transformers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior, PosteriorDraws
from bayes_kf.models.language.prefix_cache import CACHES
from bayes_kf.models.peft_adapters.in_use import is_peft

PER_TOKEN = ("input_ids", "position_ids", "cache_position")


class DrawnAdapters:
    """The forward passes of S drawn adapters: log p̄ of the next token, and scores of the tokens so far.

    Each adapter has its own cache. The first one's is that of ``generate``.

    Args:
        posterior: over a causal language model.
        num_samples: S.
        shared_prompt: whether the mean adapter reads the prompt, except its last token, for all.
        generator: source of the adapters.
    """

    def __init__(
        self, posterior: PosteriorDraws, num_samples: int, shared_prompt: bool, generator: torch.Generator
    ) -> None:
        self.posterior = posterior
        self.draws = [posterior.adapter.tensors(draw) for draw in posterior.sample(num_samples, generator)]
        self.mean = None
        if shared_prompt and isinstance(posterior, GaussianPosterior):
            self.mean = posterior.adapter.tensors(posterior.mean_vector)
        self.caches: list[Any] = []
        self.columns: dict[str, list[Tensor]] = {"log_prob": [], "entropy": [], "epistemic": []}
        self._last: Tensor | None = None

    def model(self) -> Any:
        """The base model with these forward passes; its modules are the user's own, and stay as they are."""
        own: Any = self.posterior.adapter.model
        base: Any = own.get_base_model() if is_peft(own) else own

        @functools.wraps(type(base).forward)
        def forward(_self: Any, *_args: Any, **given: Any) -> Any:
            return self.forward(given)

        model = copy.copy(base)
        model.__class__ = type(type(base).__name__, (type(base),), {"forward": forward})
        return model

    def forward(self, given: dict[str, Any]) -> Any:
        """The output of the first adapter, with log p̄ of the next token, (B, 1, V), as its logits."""
        name = next((name for name in CACHES if given.get(name) is not None), None)
        if name is None:
            raise ValueError("`posterior` must be over a causal language model with a cache, got another.")
        self._score(given["input_ids"][:, -1])
        if not self.caches:
            given = self._begin(given, name)
        log_probs, first = [], None
        for tensors, cache in zip(self.draws, self.caches, strict=True):
            out = self._run(tensors, given | {name: cache})
            first = out if first is None else first
            log_probs.append(self.posterior.scaled_logits(out.logits[:, -1].double()).log_softmax(-1))
        stacked = torch.stack(log_probs)
        self._last = stacked.logsumexp(0) - torch.tensor(len(stacked), dtype=stacked.dtype).log()
        entropy = torch.special.entr(self._last.exp()).sum(-1)
        mean_entropy = torch.special.entr(stacked.exp()).sum(-1).mean(0)
        self.columns["entropy"].append(entropy)
        self.columns["epistemic"].append((entropy - mean_entropy).clamp_min(0.0))  # negative only by rounding
        first.logits = self._last.float().unsqueeze(1)  # type: ignore[union-attr]
        return first

    def scores(self, tokens: Tensor) -> dict[str, Tensor]:
        """The scores of all tokens that were written, (B, T) each."""
        self._score(tokens[:, -1])
        return {name: torch.stack(values, 1)[:, : tokens.shape[1]] for name, values in self.columns.items()}

    def _score(self, token: Tensor) -> None:
        """Keep log p̄ of the token that followed the last forward pass."""
        if self._last is not None:
            self.columns["log_prob"].append(self._last.gather(-1, token.unsqueeze(-1)).squeeze(-1))
        self._last = None

    def _begin(self, given: dict[str, Any], name: str) -> dict[str, Any]:
        """Give each adapter its cache, with the prompt in it that they share; returns the arguments that remain."""
        width = given["input_ids"].shape[1]
        if self.mean is not None and width > 1:
            before = {key: value[:, :-1] for key, value in self._of_prompt(given, width).items()}
            cut = {"attention_mask": given["attention_mask"][:, :-1]} if "attention_mask" in given else {}
            self._run(self.mean, given | before | cut)
            given = given | {key: value[:, -1:] for key, value in self._of_prompt(given, width).items()}
        self.caches = [given[name], *(copy.deepcopy(given[name]) for _ in self.draws[1:])]
        return given

    @staticmethod
    def _of_prompt(given: dict[str, Any], width: int) -> dict[str, Tensor]:
        """The arguments that have a column for each token."""
        named = {key: given[key] for key in PER_TOKEN if isinstance(given.get(key), Tensor)}
        return {key: value for key, value in named.items() if value.ndim == 2 and value.shape[1] == width}

    def _run(self, tensors: dict[str, Tensor], given: dict[str, Any]) -> Any:
        """The output of the model with an adapter's tensors; its cache is filled."""
        adapter = self.posterior.adapter
        with adapter.substituted(tensors), adapter.autocast():
            return adapter.model(**given)


def can_generate(model: nn.Module) -> bool:
    """Whether a model has the ``generate`` of transformers."""
    base: Any = model.get_base_model() if is_peft(model) else model
    return bool(getattr(base, "can_generate", bool)())
