"""The probability and the uncertainty of text that exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayes_kf.inference.predictive.gaussian_posterior import PosteriorDraws
from bayes_kf.inference.predictive.text.scored_text import ScoredText
from bayes_kf.inference.predictive.text.tokenizing import completions, tokenizer_of
from bayes_kf.models.batch import IGNORED, Inputs
from bayes_kf.models.language.logits import mapping, token_logits
from bayes_kf.models.language.supervised_tokens import following_labels
from bayes_kf.validation import check_whole

AT_ONCE = 2**25  # numbers of the logits of a few texts


@torch.no_grad()
def score(
    posterior: PosteriorDraws,
    texts: Sequence[str] | Inputs,
    prompts: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
) -> ScoredText:
    """The probability of texts by the posterior predictive, and the uncertainty of each of their tokens.

    Every drawn adapter reads every text once.

    Args:
        posterior: over a causal language model; it does not matter which outputs it was fitted on.
        texts: B texts; or a mapping with ``input_ids`` (B, T), and ``attention_mask`` and ``labels`` where there are
            some. Without labels all tokens count but the first, with them those that are not −100.
        prompts: what comes before each text and does not count.
        tokenizer: of the model; by default the one that lies beside its weights.
        num_samples: S adapters drawn from N(μ, P).
        generator: source of the adapters; by default a new one seeded with ``config.seed``.

    Raises:
        ValueError: if an argument is bad, or no token counts.
    """
    check_whole("num_samples", num_samples)
    given = _inputs(posterior, texts, prompts, tokenizer)
    following = following_labels(given)
    if not bool((following >= 0).any()):
        raise ValueError("`texts` must have a token that counts, got none.")
    counted = torch.nn.functional.pad(following >= 0, (1, 0))
    columns = {name: torch.zeros(counted.shape) for name in ("log_prob", "entropy", "epistemic")}
    adapter, drawn = posterior.adapter, posterior.sample(num_samples, posterior.generator(generator))
    draws = [adapter.tensors(draw) for draw in drawn]
    with adapter.full_precision(), adapter.eval_mode():
        for some in _few(given, counted, _vocabulary(adapter.model)):
            part = {name: values[some] for name, values in given.items()}
            places = (following[some] >= 0).any(0).nonzero().squeeze(-1)
            if not len(places):
                continue
            labels = following[some][:, places].clamp_min(0).to(adapter.device)
            for name, values in _scores(posterior, draws, part, places, labels).items():
                columns[name][some, places + 1] = values.float().cpu()
    columns = {name: values.where(counted.cpu(), 0.0) for name, values in columns.items()}
    return ScoredText(given["input_ids"].cpu(), counted.cpu(), **columns)


def _scores(
    posterior: PosteriorDraws,
    draws: Sequence[dict[str, Tensor]],
    given: dict[str, Tensor],
    places: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Scores of the tokens ``labels`` (b, t) that follow the columns ``places`` (t,), (b, t) each."""
    mean, of_label, agreed = None, [], torch.zeros(())
    for tensors in draws:
        with posterior.adapter.substituted(tensors):
            logits = token_logits(posterior.adapter, given, places)
        log_probs = posterior.scaled_logits(logits.float()).log_softmax(-1)
        of_label.append(log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double())
        probs = log_probs.exp_()
        agreed = agreed.to(probs.device) + torch.special.entr(probs).sum(-1) / len(draws)
        mean = probs / len(draws) if mean is None else mean.add_(probs, alpha=1.0 / len(draws))
    entropy = torch.special.entr(mean).sum(-1)
    log_prob = torch.stack(of_label).logsumexp(0) - torch.tensor(len(draws), dtype=torch.float64).log()
    return {"log_prob": log_prob, "entropy": entropy, "epistemic": (entropy - agreed).clamp_min(0.0)}


def _inputs(
    posterior: PosteriorDraws, texts: Sequence[str] | Inputs, prompts: Sequence[str] | None, tokenizer: Any
) -> dict[str, Tensor]:
    if isinstance(texts, str):
        raise ValueError("`texts` must be a list of texts, got one text.")
    if not isinstance(texts, Sequence):
        if prompts is not None:
            raise ValueError("`prompts` must be None with tokens; labels of −100 mark a prompt.")
        return mapping(texts, "input_ids")
    own = tokenizer_of(posterior.adapter.model, tokenizer)
    if prompts is None:
        rows = [own(text)["input_ids"] for text in texts]
        if short := [text for text, row in zip(texts, rows, strict=True) if len(row) < 2]:
            raise ValueError(
                f"`texts` must have at least two tokens, of which the first does not count, got {short[0]!r}."
            )
        return _padded(rows)
    if len(prompts) != len(texts):
        raise ValueError(f"`prompts` must be as many as `texts`, {len(texts)}, got {len(prompts)}.")
    both = completions(own, prompts, [[text] for text in texts])
    ids, scored = both["input_ids"].squeeze(1), both["scored"].squeeze(1)
    return {"input_ids": ids, "attention_mask": both["attention_mask"].squeeze(1), "labels": ids.where(scored, IGNORED)}


def _padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(-1)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths).long()}


def _vocabulary(model: Any) -> int:
    """V, or a usual one if the model does not say."""
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", None) or 2**16)


def _few(given: dict[str, Tensor], counted: Tensor, vocabulary: int) -> list[slice]:
    """Ranges of texts whose logits fit in memory together."""
    step = max(1, AT_ONCE // (vocabulary * max(1, int(counted.any(0).sum()))))
    return [slice(start, start + step) for start in range(0, len(given["input_ids"]), step)]
