"""Text generation with a posterior over adapters: several drawn adapters predict every token together.

Each drawn adapter reads the prompt once and then one token at a time, with its own cache of keys and values. The
distribution of the next token is the average p̄ of theirs, from which ``generate`` of transformers chooses. Its entropy
is the sum of the adapters' mean entropy and their disagreement, the mutual information:
H(p̄) = E[H(p)] + I(token; adapter), in nats.

Adapters are drawn, not linearized. At temperature 1, draws may lie where the linearization does not hold, and the text
becomes nonsense. The temperature that a stream chooses is far below 1 for such models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior, PosteriorDraws
from bayes_kf.inference.predictive.text.drawn_model import DrawnAdapters, can_generate
from bayes_kf.inference.predictive.text.scored_text import ScoredText
from bayes_kf.models.batch import Inputs
from bayes_kf.models.language import learns_prompt
from bayes_kf.validation import check_whole

NEW_TOKENS = 32  # at most, if nothing says so
REFUSED = {  # arguments of transformers' `generate` under which tokens are not chosen one after the other from p̄
    "num_beams": 1,
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "custom_generate": None,
    "penalty_alpha": None,
    "cache": None,
    "past_key_values": None,
    "use_cache": True,
    "return_dict_in_generate": False,
}


@torch.no_grad()
def generate(
    posterior: PosteriorDraws,
    inputs: Inputs,
    max_new_tokens: int | None = None,
    *,
    num_samples: int = 8,
    shared_prompt: bool = False,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> ScoredText:
    """Text by the posterior predictive.

    Args:
        posterior: over a causal language model; it does not matter which outputs it was fitted on.
        inputs: a mapping with ``input_ids`` (B, T) and ``attention_mask`` (B, T); prompts are padded on the left.
        max_new_tokens: maximum number of new tokens; 32, if no other argument limits them.
        num_samples: S adapters drawn from N(μ, P); each takes a forward pass per token.
        shared_prompt: whether the mean adapter reads the prompt, except its last token, and the drawn adapters continue
            from its cache. Long prompts then take one pass, not S, but the effect of the drawn adapters on the prompt
            is lost. Ours.
        generator: source of adapters and tokens; by default a new one seeded with ``config.seed``.
        arguments: those of transformers' ``generate``: ``do_sample``, ``temperature``, ``top_p``,
            ``num_return_sequences``, ``stop_strings`` with ``tokenizer``, ``stopping_criteria``, ``logits_processor``,
            ``generation_config``, ``streamer`` and others; no beam search and no assistant. They act on log p̄;
            the scores in the result are those of p̄ before.

    Returns:
        The new tokens, at most T of each text; those of a prompt with several texts follow each other.
        ``pad_token_id`` follows the end of a text.

    Raises:
        ValueError: if an argument is bad, the model has no cache, or the adapter is one of virtual tokens.
    """
    prompts, adapter = _prompts(inputs), posterior.adapter
    check_whole("num_samples", num_samples)
    if max_new_tokens is not None:
        check_whole("max_new_tokens", max_new_tokens)
        arguments["max_new_tokens"] = max_new_tokens
    elif not {"max_length", "generation_config"} & set(arguments):
        arguments["max_new_tokens"] = NEW_TOKENS
    _check_model(posterior, shared_prompt)
    generator = posterior.generator(generator)
    drawn = DrawnAdapters(posterior, num_samples, shared_prompt, generator)
    model = drawn.model()
    config = arguments.get("generation_config") or model.generation_config
    for name, allowed in REFUSED.items():
        given = arguments.get(name, getattr(config, name, None))
        if given is not None and given != allowed:
            raise ValueError(f"`{name}` must be {allowed} for text by a posterior, got {given!r}.")
    ends = _end_tokens(arguments, config, model.config)
    pad = arguments.get("pad_token_id", config.pad_token_id)
    pad = (ends[0] if ends and ends[0] >= 0 else 0) if pad is None else pad
    recorded = _RecordedEnds(_stopping(arguments, config, ends, adapter.device), prompts["input_ids"].shape[1])
    settings = arguments | {"pad_token_id": pad, "stopping_criteria": StoppingCriteriaList([recorded])}
    devices = [adapter.device] if adapter.device.type == "cuda" else []
    inputs_there = {name: value.to(adapter.device) for name, value in prompts.items()}
    with adapter.full_precision(), adapter.eval_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        whole = model.generate(**inputs_there, **settings)
    tokens = whole[:, prompts["input_ids"].shape[1] :]
    counted = recorded.counted(tokens)
    scores = {name: values.where(counted, 0.0) for name, values in drawn.scores(tokens).items()}
    return ScoredText(tokens.where(counted, pad), counted, **scores)


class _RecordedEnds(StoppingCriteria):
    """Stopping criteria that remember after how many new tokens each text ended."""

    def __init__(self, criteria: StoppingCriteriaList, prompt: int) -> None:
        self.criteria, self.prompt = criteria, prompt
        self.lengths: Tensor | None = None  # 0 while a text goes on

    def __call__(self, input_ids: Tensor, scores: Any, **given: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done = done | torch.as_tensor(criterion(input_ids, scores, **given), device=done.device)
        lengths = torch.zeros_like(done, dtype=torch.long) if self.lengths is None else self.lengths
        self.lengths = torch.where(done & (lengths == 0), input_ids.shape[1] - self.prompt, lengths)
        return self.lengths > 0

    def counted(self, tokens: Tensor) -> Tensor:
        """Whether each token belongs to its text, (B, T)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        lengths = torch.zeros_like(tokens[:, 0]) if self.lengths is None else self.lengths
        return places < lengths.where(lengths > 0, tokens.shape[1]).unsqueeze(1)


def _stopping(arguments: dict[str, Any], config: Any, ends: list[int], device: torch.device) -> StoppingCriteriaList:
    """The criteria that end a text, apart from its length."""
    criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    if ends:
        criteria.append(EosTokenCriteria(torch.tensor(ends, device=device)))
    stops = arguments.get("stop_strings", getattr(config, "stop_strings", None))
    if stops is not None:
        if arguments.get("tokenizer") is None:
            raise ValueError("`tokenizer` must be given with `stop_strings`, got None.")
        criteria.append(StopStringCriteria(arguments["tokenizer"], stops))
    return criteria


def _check_model(posterior: PosteriorDraws, shared_prompt: bool) -> None:
    if not can_generate(posterior.adapter.model):
        name = type(posterior.adapter.model).__name__
        raise ValueError(f"`posterior` must be over a causal language model of transformers, got {name}.")
    if learns_prompt(posterior.adapter.model):  # its forward pass prepends them to every input and drops the cache
        raise ValueError(
            "`posterior` must be over weights to generate text, got an adapter of virtual tokens (prompt, prefix or"
            " p-tuning)."
        )
    if shared_prompt and not isinstance(posterior, GaussianPosterior):
        raise ValueError("`shared_prompt` must be False for a mixture, whose members have no common mean, got True.")


def _prompts(inputs: Inputs) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs or inputs["input_ids"].ndim != 2:
        raise ValueError("`inputs` must be a mapping with `input_ids` of shape (prompts, tokens).")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not bool(mask[:, -1].all()):
        raise ValueError("`inputs` must be padded on the left, so that every prompt ends in its last column.")
    return {"input_ids": ids, "attention_mask": mask}


def _end_tokens(arguments: Mapping[str, Any], *configs: Any) -> list[int]:
    """The tokens that end a text: those asked for, or those of the model's configurations."""
    named = [getattr(config, "eos_token_id", None) for config in configs]
    given: Any = next((ends for ends in [arguments.get("eos_token_id"), *named] if ends is not None), [])
    ids: Sequence[Any] = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(number, int) for number in ids):
        raise ValueError(f"`eos_token_id` must be a token's number or several, got {given!r}.")
    return list(ids)
