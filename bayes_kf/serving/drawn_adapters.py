"""A client of a server that holds drawn adapters beside one base model and speaks OpenAI's protocol."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_kf.inference.predictive.text.answers import Answers
from bayes_kf.inference.saving.file_names import DRAWS_FILE
from bayes_kf.validation import check_whole


class NextTokens(NamedTuple):
    """The averaged distribution of the next token, as far as the draws list it; entropies in nats.

    Attributes:
        tokens: texts of the tokens that a draw listed, the most probable first.
        probs: their probabilities, (K,); what is missing to 1 lies on tokens that are not listed.
        entropy: total uncertainty, with all tokens that are not listed as one; so a lower bound.
        aleatoric: mean entropy of the draws.
        epistemic: their disagreement.
    """

    tokens: list[str]
    probs: Tensor
    entropy: float
    aleatoric: float
    epistemic: float


class DrawnAdapters:
    """The draws of a posterior on a server such as vLLM or LoRAX: every question goes to all of them.

    Args:
        url: of the server's protocol, ``http://host:8000/v1``, say.
        draws: the folder that ``export_adapters`` wrote, or the names of the adapters on the server.
        api_key: of the server.
        timeout: of one request, in seconds.

    Raises:
        ValueError: if the folder holds no list of draws, or there are no names.

    Example:
        The server is started with the adapters under their names::

            vllm serve BASE --enable-lora --lora-modules draw_0=draws/draw_0 draw_1=draws/draw_1

        Then ``DrawnAdapters("http://localhost:8000/v1", "draws").answer("Is 7 prime?", [" yes", " no"])``.
    """

    def __init__(
        self,
        url: str,
        draws: str | Path | Sequence[str],
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.url, self.api_key, self.timeout = url.rstrip("/"), api_key, timeout
        self.softmax_temperature = 1.0
        if isinstance(draws, str | Path):
            listed = _read_list(Path(draws))
            self.names = [str(name) for name in listed["adapters"]]
            self.softmax_temperature = float(listed["softmax_temperature"])
        else:
            self.names = list(draws)
        if not self.names:
            raise ValueError("`draws` must name at least one adapter, got none.")

    def next_token(self, prompt: str, top: int = 20) -> NextTokens:
        """The averaged distribution of the token after a prompt.

        The softmax temperature of the posterior is not applied: a server lists the most probable tokens only.

        Args:
            prompt: the text.
            top: how many tokens each draw lists; servers have a limit.

        Raises:
            ValueError: if the server refuses or cannot be reached.
        """
        check_whole("top", top)
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": top}
        listed = [_first_logprobs(answer)["top_logprobs"][0] for answer in self._ask_all(asked)]
        return average_tokens(listed)

    def write(self, prompt: str, max_tokens: int = 32, stop: Iterable[str] = (), top: int = 20) -> list[NextTokens]:
        """The most probable tokens after a prompt, each chosen by all draws together; a request of each for a token.

        Args:
            prompt: the text.
            max_tokens: of the answer.
            stop: tokens that end it, such as the server's end token.
            top: as for :meth:`next_token`.

        Returns:
            The distribution of each token; its first token was written.
        """
        check_whole("max_tokens", max_tokens)
        written, ends = list[NextTokens](), set(stop)
        for _ in range(max_tokens):
            written.append(self.next_token(prompt + "".join(step.tokens[0] for step in written), top))
            if written[-1].tokens[0] in ends:
                break
        return written

    def answer(self, prompt: str, options: Sequence[str], per_token: bool = False) -> Answers:
        """A choice among texts after a prompt, as ``posterior.answer`` makes it with drawn adapters.

        Args:
            prompt: the text.
            options: at least two, with their leading space if they have one.
            per_token: whether a log-likelihood is divided by the option's number of tokens.

        Raises:
            ValueError: for fewer than two options, or if the server refuses or returns no log-probabilities of prompts.
        """
        if isinstance(options, str) or len(options) < 2:
            raise ValueError(f"`options` must be at least two texts, got {options!r}.")
        logits = torch.tensor(
            [[_of_option(one, prompt, per_token) for one in self._ask_all(_echo(prompt + text))] for text in options],
            dtype=torch.float64,
        ).T
        probs = (logits / self.softmax_temperature).softmax(-1)
        mean = probs.mean(0)
        entropy, aleatoric = torch.special.entr(mean).sum(), torch.special.entr(probs).sum(-1).mean()
        parts = (entropy, aleatoric, (entropy - aleatoric).clamp_min(0.0))
        return Answers([options[int(mean.argmax())]], mean.unsqueeze(0), *(part.unsqueeze(0) for part in parts))

    def _ask_all(self, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The answers of all draws to one request, asked at the same time."""
        with ThreadPoolExecutor(len(self.names)) as pool:
            return list(pool.map(lambda name: self._ask({**asked, "model": name}), self.names))

    def _ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url}/completions", json.dumps(asked).encode(), headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
                answer: dict[str, Any] = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:200]
            raise ValueError(f"`url` must be a server with {asked['model']}, got {error.code} {said}.") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"`url` must be a server of OpenAI's protocol, got {self.url}: {error}.") from error
        return answer


def average_tokens(listed: Sequence[Mapping[str, float]]) -> NextTokens:
    """The average of the draws' lists, token -> log-probability; tokens that a draw does not list count as its rest."""
    tokens = sorted({token for one in listed for token in one})
    probs = torch.tensor([[one.get(token, -torch.inf) for token in tokens] for one in listed]).double().exp()
    rest = (1.0 - probs.sum(-1, keepdim=True)).clamp_min(0.0)
    whole = torch.cat([probs, rest], -1)
    entropy = float(torch.special.entr(whole.mean(0)).sum())
    aleatoric = float(torch.special.entr(whole).sum(-1).mean())
    order = probs.mean(0).argsort(descending=True, stable=True)
    chosen = [tokens[int(number)] for number in order]
    return NextTokens(chosen, probs.mean(0)[order], entropy, aleatoric, max(0.0, entropy - aleatoric))


def _echo(text: str) -> dict[str, Any]:
    """A request for the log-probabilities of a text's own tokens."""
    return {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}


def _of_option(answer: Mapping[str, Any], prompt: str, per_token: bool) -> float:
    """The log-likelihood of the tokens after a prompt, without the one that the server adds."""
    scored = _first_logprobs(answer)
    pairs = list(zip(scored["text_offset"], scored["token_logprobs"], strict=True))[:-1]
    own = [value for offset, value in pairs if offset >= len(prompt)]
    if not own or None in own:
        raise ValueError("`url` must be a server that returns the log-probabilities of prompts (echo), got none.")
    return sum(own) / (len(own) if per_token else 1)


def _first_logprobs(answer: Mapping[str, Any]) -> dict[str, Any]:
    try:
        logprobs = answer["choices"][0]["logprobs"]
    except (KeyError, IndexError, TypeError):
        logprobs = None
    if not isinstance(logprobs, dict):
        raise ValueError("`url` must be a server that returns log-probabilities, got an answer without.")
    return logprobs


def _read_list(folder: Path) -> dict[str, Any]:
    """The content of ``draws.json``."""
    path = folder / DRAWS_FILE
    try:
        listed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not listed["adapters"] or float(listed["softmax_temperature"]) <= 0:
            raise ValueError("no adapters, or no softmax temperature")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`draws` must be a folder with {DRAWS_FILE}, got {folder}: {error}.") from error
    return listed
