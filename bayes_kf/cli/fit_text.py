"""``bayes-kf fit`` on text to be learned: a causal language model, and prompts with completions, messages or texts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from bayes_kf.cli.base_model import BaseModel, model_folder
from bayes_kf.cli.config_flags import gives_settings, read_settings
from bayes_kf.cli.inputs import move, naming_options, read_device
from bayes_kf.cli.lora_adapters import add_adapter
from bayes_kf.cli.posterior_folder import check_output
from bayes_kf.cli.stream_files import STDIN, open_lines, sigterm_as_interrupt
from bayes_kf.data.supervised_text import batches_of_lines, causal_tokenizer, supervised_text
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.fitting.defaults.default_likelihood import as_text
from bayes_kf.inference.fitting.fit import fit, fit_default
from bayes_kf.inference.fitting.progress import shows_progress
from bayes_kf.inference.posterior import Posterior


class LanguageModel(BaseModel):
    """A causal language model; its head is not trained."""

    @property
    def head_modules(self) -> list[str]:
        """None."""
        return []


def run_fit_text(args: argparse.Namespace) -> None:
    """Fit a posterior over an adapter to text, in one pass over a pipe with ``--online``."""
    if args.members is not None:
        raise ValueError("`--members` needs labels, got text to be learned, which has one posterior.")
    if args.classes:
        raise ValueError("`--classes` needs labels, got text to be learned.")
    settings = _settings(args)
    if not args.online:
        check_output(args.output)
    device, folder = read_device(args.device), model_folder(args.model)
    with naming_options(tokenizer="--model", path="--data"):
        tokenizer = causal_tokenizer(folder)
    model = move(add_adapter(_load(folder, args.dtype), args, settings.seed), device)
    begun = time.perf_counter()
    if args.online:
        posterior = _fit_online(model, tokenizer, settings, args)
    else:
        posterior = _fit(model, tokenizer, settings, args)
        posterior.save_pretrained(args.output)
    if not args.quiet:
        print(_summary(posterior, time.perf_counter() - begun, args.output))


def _settings(args: argparse.Namespace) -> KalmanConfig:
    """The settings, for the likelihood of tokens."""
    settings = read_settings(args)
    if settings.likelihood not in ("categorical", "tokens"):
        raise ValueError(f"`--likelihood` must be tokens for text to be learned, got {settings.likelihood}.")
    return settings if settings.likelihood == "tokens" else as_text(settings)


def _load(folder: Path, dtype: str) -> LanguageModel:
    """The language model in a folder.

    Raises:
        ValueError: if the architecture does not write text.
        OSError: if there are no safetensors weights.
    """
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"`--model` must be a causal language model for text, got a {config.model_type} in {folder}.")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        dtype=dtype,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"`--model` must hold all weights of a language model, got none for {missing[0]} in {folder}.")
    return LanguageModel(model.eval(), {})


def _fit(model: Any, tokenizer: Any, settings: KalmanConfig, args: argparse.Namespace) -> Posterior:
    with naming_options(path="--data"):
        data = supervised_text(
            args.data,
            tokenizer,
            max_length=args.max_length,
            batch_size=args.batch_size,
            shuffle=not args.in_order,
            seed=settings.seed,
        )
    progress = False if args.quiet else None
    if gives_settings(args):
        return fit(model, data.loader, settings, start=args.start, progress=progress)
    with naming_options(config="--likelihood"):
        posterior = fit_default(model, data.loader, args.start, shows_progress(progress), settings.seed)
    prequential_temperature.warn_of_edge(posterior.temperature)
    assert isinstance(posterior, Posterior)  # text has one member
    return posterior


def _fit_online(model: Any, tokenizer: Any, settings: KalmanConfig, args: argparse.Namespace) -> Posterior:
    """One pass over lines as they come, with checkpoints in the output folder."""
    if args.skip_bad or args.start != "prior":
        raise ValueError("`--online` with text to be learned takes no `--skip-bad`, and `--start` prior.")
    if not gives_settings(args):
        settings = as_text(KalmanConfig.stream(seed=settings.seed))
    settings = replace(settings, tune=None)

    def batches() -> Iterator[dict[str, Tensor]]:
        with open_lines(args.data) as lines, naming_options(path="--data"):
            yield from batches_of_lines(lines, tokenizer, args.max_length)

    with sigterm_as_interrupt():
        return fit(
            model,
            batches(),
            settings,
            checkpoint=args.output,
            every=args.checkpoint_every,
            progress=False if args.quiet else None,
        )


def learns_text(args: argparse.Namespace, is_supervised: bool) -> bool:
    """Whether the data is text to be learned; a pipe is, if it has no classes."""
    return is_supervised if args.data != STDIN else args.online and not args.classes


def _summary(posterior: Posterior, seconds: float, output: Path) -> str:
    """The summary of a fit that took ``seconds``, in lines of text."""
    count, parameters = posterior.state.examples, posterior.adapter.num_parameters
    lines = [f"{count:,} texts, {parameters:,} trainable parameters -> {output}, in {seconds:.1f} s"]
    losses = posterior.history.get("log_loss")
    if losses is not None:
        lines.append(
            f"log loss {losses.mean():.1f} nats a text before its update, {losses[-50:].mean():.1f} at the end"
        )
    if "size" in posterior.history:
        value, low, high = posterior.history["size"].tolist()
        lines.append(f"size {value:.3g} (90 % interval {low:.3g} to {high:.3g})")
    return "\n".join(lines)
