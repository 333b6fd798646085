"""Text by a posterior over adapters: every token is predicted by several drawn adapters together.

Each drawn adapter reads the prompt once, then a token at a time, with its own cache of keys and values. What the
next token may be is the average of what they say, p̄; its entropy splits into what they agree to be uncertain about
and what they disagree about, H(p̄) = E[H(p)] + I(token; adapter) in nats.

Adapters are drawn, not linearized: at temperature 1 draws may lie where the linearization says nothing, and text falls
apart. The temperature that the stream prices, or :meth:`Posterior.calibrate` finds, is far below 1 for such models.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.batch import Inputs
from bayes_kf.models.language import learns_prompt


class Generated(NamedTuple):
    """Text of B prompts, T new tokens at most.

    Attributes:
        tokens: new tokens, (B, T); ``pad_token_id`` after the end.
        written: which of them were written, (B, T), the end included.
        log_prob: log p̄ of each, (B, T); 0 where none was written, as in what follows.
        entropy: H(p̄), in nats.
        mutual_information: of it, what the adapters disagree about, in nats.
    """

    tokens: Tensor
    written: Tensor
    log_prob: Tensor
    entropy: Tensor
    mutual_information: Tensor

    @property
    def sequence_log_prob(self) -> Tensor:
        """log p̄ of each text given its prompt, (B,), token by token."""
        return self.log_prob.sum(1)

    @property
    def sequence_entropy(self) -> Tensor:
        """Mean H(p̄) of each text's tokens, (B,), in nats."""
        return self.entropy.sum(1) / self.written.sum(1).clamp_min(1)

    @property
    def sequence_mutual_information(self) -> Tensor:
        """Mean disagreement over each text's tokens, (B,), in nats."""
        return self.mutual_information.sum(1) / self.written.sum(1).clamp_min(1)


@torch.no_grad()
def generate(
    posterior: GaussianPosterior,
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
        posterior: over a causal language model, however its outputs were read when it was fitted.
        inputs: a mapping with ``input_ids`` (B, T) and ``attention_mask`` (B, T); prompts padded on the left.
        max_new_tokens: most tokens to write.
        num_samples: S adapters drawn from N(μ, temperature·P). S forward passes a token.
        sample: whether a token is drawn from p̄; else it is the most probable one.
        eos_token_id: the token that ends a text, or several; None: those of the model's ``generation_config`` or
            ``config``.
        pad_token_id: what stands after the end.
        shared_prompt: whether the prompt, but for its last token, is read once by the mean adapter and the drawn ones
            go on from its cache. Long prompts then cost one pass and not S; that the adapters may read the prompt
            differently is left out. Ours.
        generator: of adapters and tokens; by default a new one seeded with ``config.seed``.

    Raises:
        ValueError: for a bad argument, a model that keeps no cache, or an adapter of virtual tokens.
    """
    given, adapter = _checked(inputs, max_new_tokens, num_samples), posterior.adapter
    if learns_prompt(adapter.model):  # its forward pass puts them in front of every piece, and drops the cache
        raise ValueError(
            "`posterior` must be over weights to generate text, got an adapter of virtual tokens (prompt, prefix or"
            " p-tuning)."
        )
    generator = posterior.generator(generator)
    draws = [adapter.tensors(draw) for draw in posterior.sample(num_samples, generator)]
    ends = _ends(adapter.model) if eos_token_id is None else _numbers(eos_token_id)
    end = torch.tensor(ends, dtype=torch.long, device=adapter.device)
    ids, mask = (given[name].to(adapter.device) for name in ("input_ids", "attention_mask"))
    done = torch.zeros(len(ids), dtype=torch.bool, device=adapter.device)
    found: dict[str, list[Tensor]] = {name: [] for name in Generated._fields}
    with adapter.full_precision(), adapter.eval_mode():
        caches: list[Any] = [None] * num_samples
        if shared_prompt and ids.shape[1] > 1:
            with adapter.substituted(adapter.tensors(posterior.mean_vector)):
                read = _kept(_ahead(adapter, ids[:, :-1], mask[:, :-1], None))
            caches, ids = [copy.deepcopy(read) for _ in draws], ids[:, -1:]
        for _ in range(max_new_tokens):
            spoken = []
            for number, tensors in enumerate(draws):
                with adapter.substituted(tensors):
                    out = _ahead(adapter, ids, mask, caches[number])
                caches[number] = _kept(out)
                spoken.append(posterior.scaled_logits(out.logits[:, -1].double()).log_softmax(-1))
            token, step = _next(torch.stack(spoken), sample, generator)
            for name, values in (("written", ~done), *((k, v.where(~done, 0.0)) for k, v in step.items())):
                found[name].append(values)
            token = token.where(~done, pad_token_id)
            found["tokens"].append(token)
            done = done | torch.isin(token, end)
            ids = token.unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if bool(done.all()):
                break
    return Generated(**{name: torch.stack(values, 1) for name, values in found.items()})


def _ahead(adapter: Any, ids: Tensor, mask: Tensor, cache: Any) -> Any:
    """What the model as it stands says after some more tokens, with its cache."""
    extra: dict[str, Any] = {}
    if not bool(mask.all()):  # without padding every model counts places by itself
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with torch.autocast(adapter.device.type, dtype=adapter._autocast, enabled=adapter._autocast is not None):
        extra[_cache_argument(adapter.model)] = cache
        out = adapter.model(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
    if _kept(out) is None:
        raise ValueError("`posterior` must be over a causal language model that keeps a cache, got another.")
    return out


def _cache_argument(model: Any) -> str:
    """What the model calls its cache: transformers renamed it in 5.24."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _kept(out: Any) -> Any:
    """The cache among a model's outputs, by either name; None where there is none."""
    found = getattr(out, "cache", None)
    return getattr(out, "past_key_values", None) if found is None else found


def _next(spoken: Tensor, sample: bool, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The next token of each text, (B,), and how sure the draws' log-probabilities (S, B, V) are of it."""
    log_prob = spoken.logsumexp(0) - torch.tensor(len(spoken), dtype=spoken.dtype).log()
    entropy = torch.special.entr(log_prob.exp()).sum(-1)
    agreed = torch.special.entr(spoken.exp()).sum(-1).mean(0)
    if sample:
        drawn = torch.multinomial(log_prob.exp().to(generator.device), 1, generator=generator)
        token = drawn.squeeze(-1).to(log_prob.device)
    else:
        token = log_prob.argmax(-1)
    own = log_prob.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    disagreed = (entropy - agreed).clamp_min(0.0)  # negative only by rounding
    return token, {"log_prob": own, "entropy": entropy, "mutual_information": disagreed}


def _checked(inputs: Inputs, max_new_tokens: int, num_samples: int) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or inputs["input_ids"].ndim != 2:
        raise ValueError("`inputs` must be a mapping with `input_ids` of shape (prompts, tokens).")
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number >= 1, got {value!r}.")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise ValueError("`inputs` must be padded on the left, so that every prompt ends in its last column.")
    return {"input_ids": ids, "attention_mask": mask}


def _ends(model: Any) -> list[int]:
    """The tokens that end a text, as the model's configuration says."""
    for name in ("generation_config", "config"):
        found = getattr(getattr(model, name, None), "eos_token_id", None)
        if found is not None:
            return _numbers(found)
    return []


def _numbers(found: int | Sequence[int]) -> list[int]:
    numbers = [found] if isinstance(found, int) else list(found)
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"`eos_token_id` must be a token's number or several, got {found!r}.")
    return numbers
