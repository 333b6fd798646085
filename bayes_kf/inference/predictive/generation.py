"""Text generation with a posterior over adapters: several drawn adapters predict every token together.

Each drawn adapter reads the prompt once and then one token at a time, with its own cache of keys and values. The
distribution of the next token is the average p̄ of theirs. Its entropy is the sum of the adapters' mean entropy and
their disagreement, the mutual information: H(p̄) = E[H(p)] + I(token; adapter), in nats.

Adapters are drawn, not linearized. At temperature 1, draws may lie where the linearization does not hold, and the text
becomes nonsense. The temperature that a stream chooses is far below 1 for such models.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior, PosteriorDraws
from bayes_kf.models.batch import Inputs
from bayes_kf.models.language import learns_prompt
from bayes_kf.validation import check_whole


class Generated(NamedTuple):
    """Generated text of B prompts, at most T new tokens each.

    Attributes:
        tokens: new tokens, (B, T); ``pad_token_id`` after the end of a text.
        written: whether each of them belongs to the text, (B, T); the end token does.
        log_prob: log p̄ of each token, (B, T), in nats; 0 after the end, as in the following.
        entropy: H(p̄), (B, T), in nats.
        mutual_information: its part that is disagreement of the adapters, (B, T), in nats.
    """

    tokens: Tensor
    written: Tensor
    log_prob: Tensor
    entropy: Tensor
    mutual_information: Tensor

    @property
    def sequence_log_prob(self) -> Tensor:
        """Sum of log p̄ over the tokens of each text, (B,), in nats."""
        return self.log_prob.sum(1)

    @property
    def sequence_entropy(self) -> Tensor:
        """Mean H(p̄) over the tokens of each text, (B,), in nats."""
        return self.entropy.sum(1) / self.written.sum(1).clamp_min(1)

    @property
    def sequence_mutual_information(self) -> Tensor:
        """Mean mutual information over the tokens of each text, (B,), in nats."""
        return self.mutual_information.sum(1) / self.written.sum(1).clamp_min(1)


@torch.no_grad()
def generate(
    posterior: PosteriorDraws,
    inputs: Inputs,
    max_new_tokens: int = 32,
    *,
    num_samples: int = 8,
    sample: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    shared_prompt: bool = False,
    generator: torch.Generator | None = None,
) -> Generated:
    """Text by the posterior predictive.

    Args:
        posterior: over a causal language model; it does not matter which outputs it was fitted on.
        inputs: a mapping with ``input_ids`` (B, T) and ``attention_mask`` (B, T); prompts are padded on the left.
        max_new_tokens: maximum number of new tokens.
        num_samples: S adapters drawn from N(μ, temperature·P); each takes a forward pass per token.
        sample: whether a token is drawn from p̄; otherwise it is the most probable one.
        eos_token_id: the token that ends a text, or several; None: those of the model's ``generation_config`` or
            ``config``.
        pad_token_id: the token after the end of a text.
        shared_prompt: whether the mean adapter reads the prompt, except its last token, and the drawn adapters continue
            from its cache. Long prompts then take one pass, not S, but the effect of the drawn adapters on the prompt
            is lost. Ours.
        generator: source of adapters and tokens; by default a new one seeded with ``config.seed``.

    Raises:
        ValueError: if an argument is bad, the model has no cache, or the adapter is one of virtual tokens.
    """
    prompts, adapter = _check_arguments(inputs, max_new_tokens, num_samples), posterior.adapter
    if learns_prompt(adapter.model):  # its forward pass prepends them to every input and drops the cache
        raise ValueError(
            "`posterior` must be over weights to generate text, got an adapter of virtual tokens (prompt, prefix or"
            " p-tuning)."
        )
    if shared_prompt and not isinstance(posterior, GaussianPosterior):
        raise ValueError("`shared_prompt` must be False for a mixture, whose members have no common mean, got True.")
    generator = posterior.generator(generator)
    draws = [adapter.tensors(draw) for draw in posterior.sample(num_samples, generator)]
    ends = _end_tokens(adapter.model) if eos_token_id is None else _token_ids(eos_token_id)
    end = torch.tensor(ends, dtype=torch.long, device=adapter.device)
    ids, mask = (prompts[name].to(adapter.device) for name in ("input_ids", "attention_mask"))
    done = torch.zeros(len(ids), dtype=torch.bool, device=adapter.device)
    columns: dict[str, list[Tensor]] = {name: [] for name in Generated._fields}
    caches: list[Any] = [None] * num_samples
    with adapter.full_precision(), adapter.eval_mode():
        if shared_prompt and isinstance(posterior, GaussianPosterior) and ids.shape[1] > 1:
            caches, ids = _shared_caches(posterior, ids, mask, num_samples), ids[:, -1:]
        for _ in range(max_new_tokens):
            log_probs = _next_log_probs(posterior, draws, caches, ids, mask)
            token, scores = _next_token(log_probs, sample, generator)
            columns["written"].append(~done)
            for name, values in scores.items():
                columns[name].append(values.where(~done, 0.0))
            token = token.where(~done, pad_token_id)
            columns["tokens"].append(token)
            done = done | torch.isin(token, end)
            ids = token.unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if bool(done.all()):
                break
    return Generated(**{name: torch.stack(values, 1) for name, values in columns.items()})


def _shared_caches(posterior: GaussianPosterior, ids: Tensor, mask: Tensor, num_samples: int) -> list[Any]:
    """Copies of the mean adapter's cache after all tokens of the prompt but the last."""
    adapter = posterior.adapter
    with adapter.substituted(adapter.tensors(posterior.mean_vector)):
        cache = _cache_of(_forward(adapter, ids[:, :-1], mask[:, :-1], None))
    return [copy.deepcopy(cache) for _ in range(num_samples)]


def _next_log_probs(
    posterior: PosteriorDraws, draws: list[dict[str, Tensor]], caches: list[Any], ids: Tensor, mask: Tensor
) -> Tensor:
    """Log-probabilities of the next token by each drawn adapter, (S, B, V); updates ``caches``."""
    log_probs = []
    for number, tensors in enumerate(draws):
        with posterior.adapter.substituted(tensors):
            out = _forward(posterior.adapter, ids, mask, caches[number])
        caches[number] = _cache_of(out)
        log_probs.append(posterior.scaled_logits(out.logits[:, -1].double()).log_softmax(-1))
    return torch.stack(log_probs)


def _forward(adapter: Any, ids: Tensor, mask: Tensor, cache: Any) -> Any:
    """The output of the model, as it is, for more tokens; it holds the new cache."""
    extra: dict[str, Any] = {}
    if not bool(mask.all()):  # without padding every model numbers positions by itself
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with torch.autocast(adapter.device.type, dtype=adapter._autocast, enabled=adapter._autocast is not None):
        extra[_cache_argument(adapter.model)] = cache
        out = adapter.model(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
    if _cache_of(out) is None:
        raise ValueError("`posterior` must be over a causal language model with a cache, got another.")
    return out


def _cache_argument(model: Any) -> str:
    """The name of the model's cache argument, which transformers renamed in 5.24."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _cache_of(out: Any) -> Any:
    """The cache in a model's output, under either name; None if there is none."""
    cache = getattr(out, "cache", None)
    return getattr(out, "past_key_values", None) if cache is None else cache


def _next_token(log_probs: Tensor, sample: bool, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The next token of each text, (B,), and its scores, from log-probabilities (S, B, V) of the drawn adapters."""
    log_prob = log_probs.logsumexp(0) - torch.tensor(len(log_probs), dtype=log_probs.dtype).log()
    entropy = torch.special.entr(log_prob.exp()).sum(-1)
    mean_entropy = torch.special.entr(log_probs.exp()).sum(-1).mean(0)
    if sample:
        drawn = torch.multinomial(log_prob.exp().to(generator.device), 1, generator=generator)
        token = drawn.squeeze(-1).to(log_prob.device)
    else:
        token = log_prob.argmax(-1)
    token_log_prob = log_prob.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    mutual_information = (entropy - mean_entropy).clamp_min(0.0)  # negative only by rounding
    return token, {"log_prob": token_log_prob, "entropy": entropy, "mutual_information": mutual_information}


def _check_arguments(inputs: Inputs, max_new_tokens: int, num_samples: int) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or inputs["input_ids"].ndim != 2:
        raise ValueError("`inputs` must be a mapping with `input_ids` of shape (prompts, tokens).")
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        check_whole(name, value)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise ValueError("`inputs` must be padded on the left, so that every prompt ends in its last column.")
    return {"input_ids": ids, "attention_mask": mask}


def _end_tokens(model: Any) -> list[int]:
    """The tokens that end a text according to the model's configuration."""
    for name in ("generation_config", "config"):
        token_id = getattr(getattr(model, name, None), "eos_token_id", None)
        if token_id is not None:
            return _token_ids(token_id)
    return []


def _token_ids(given: int | Sequence[int]) -> list[int]:
    ids = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(number, int) for number in ids):
        raise ValueError(f"`eos_token_id` must be a token's number or several, got {given!r}.")
    return ids
