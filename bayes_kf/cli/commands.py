"""The commands of the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from bayes_kf.cli.base_model import choose_names, kind_of, load_base, model_folder, read_config
from bayes_kf.cli.config_flags import gives_settings, read_settings
from bayes_kf.cli.evaluate import run_compare, run_evaluate
from bayes_kf.cli.fit_online import run_online
from bayes_kf.cli.fit_text import learns_text, run_fit_text
from bayes_kf.cli.inputs import check_takes, first_batch, move, naming_options, open_data, read_device
from bayes_kf.cli.lora_adapters import add_adapter
from bayes_kf.cli.posterior_folder import Labels, check_output, save_posterior
from bayes_kf.data import LabelledData
from bayes_kf.data.supervised_text import holds_supervised_text
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.fitting.fit import fit, fit_default
from bayes_kf.inference.fitting.progress import shows_progress
from bayes_kf.inference.mixture.mixture_posterior import MixturePosterior
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.likelihood import LIKELIHOODS
from bayes_kf.validation import check_whole


def run_fit(args: argparse.Namespace) -> None:
    """``bayes-kf fit``."""
    if learns_text(args, holds_supervised_text(args.data, args.label_column)):
        run_fit_text(args)
        return
    if args.members is not None:
        check_whole("--members", args.members)
        if args.online or gives_settings(args) or args.start != "prior":
            raise ValueError(
                "`--members` needs a fit without settings and `--online`, and `--start` prior, got another."
            )
    if args.online:
        run_online(args)
        return
    for option in ("classes", "skip_bad"):
        if getattr(args, option):
            raise ValueError(f"`--{option.replace('_', '-')}` needs `--online`, got none.")
    settings = read_settings(args)
    check_output(args.output)
    device, folder, kind = read_device(args.device), model_folder(args.model), kind_of(args.data)
    data, labels = _open_training_data(args, settings, folder, kind)
    base = load_base(folder, kind, labels.num_outputs, settings.seed, args.dtype)
    model = move(add_adapter(base, args, settings.seed), device)
    check_takes(model, data.loader, args.data)
    progress = False if args.quiet else None
    begun = time.perf_counter()
    posterior: Posterior | MixturePosterior
    if gives_settings(args):
        posterior = fit(model, data.loader, settings, start=args.start, progress=progress)
    else:  # no settings: as `bkf.fit` without a config
        with naming_options(config="--likelihood"):
            posterior = fit_default(
                model, data.loader, args.start, shows_progress(progress), settings.seed, args.members
            )
        prequential_temperature.warn_of_edge(posterior.temperature)
    seconds = time.perf_counter() - begun
    save_posterior(posterior, args.output, labels, base.new_head)
    if not args.quiet:
        print(_summary(posterior, seconds, labels, base.new_modules, args))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "fit": run_fit,
    "evaluate": run_evaluate,
    "compare": run_compare,
}


def _open_training_data(
    args: argparse.Namespace, settings: KalmanConfig, folder: Path, kind: str
) -> tuple[LabelledData, Labels]:
    """The training data and its labels, with the class names of the model if they match."""
    config = read_config(folder, kind)
    data = open_data(args, args.data, folder, settings, None, shuffle=not args.in_order, seed=settings.seed)
    inferred = not gives_settings(args)  # `fit_default` finds the likelihood of numbers
    if settings.likelihood == "categorical" and (data.class_names or not inferred):
        if not data.class_names:
            raise ValueError(f"`--likelihood` categorical needs labels, got numbers in {args.data}.")
        names = choose_names(data.class_names, config)
        if names != data.class_names:
            data = open_data(args, args.data, folder, settings, names, shuffle=not args.in_order, seed=settings.seed)
        return data, Labels(names, len(names))
    if settings.likelihood == "bernoulli" and len(data.class_names) > 2:
        raise ValueError(f"`--likelihood` bernoulli needs two classes, got {len(data.class_names)} in {args.data}.")
    if settings.likelihood == "ordinal":
        raise ValueError("`--likelihood` must not be ordinal, which needs an OrdinalHead in Python, got ordinal.")
    targets = first_batch(data.loader, args.data)[1]
    names = data.class_names if settings.likelihood == "bernoulli" else ()
    num_targets = targets.shape[1] if targets is not None and targets.ndim == 2 else 1
    return data, Labels(names, num_targets * LIKELIHOODS[settings.likelihood].outputs_per_target)


def _scores(posterior: Posterior) -> list[str]:
    """Prequential scores, or training scores for `--start trained`, in lines of text."""
    history = posterior.history
    if "log_loss" not in history:
        correct = history.get("training_correct")
        accuracy = "" if correct is None else f", accuracy {correct.mean():.3f}"
        loss = f"training log loss {history['training_log_loss'].mean():.3f} nats an example"
        return [f"{loss}{accuracy} (training examples of the adapter)", _spread(posterior)]
    return [
        f"log loss {history['log_loss'].mean():.3f} nats an example before its update"
        + (f", accuracy {history['correct'].mean():.3f}" if "correct" in history else ""),
        f"innovation² / degrees of freedom {history['innovation'].sum() / history['dof'].sum():.2f}"
        f" (1: consistent), {_spread(posterior)}",
    ]


def _spread(posterior: Posterior) -> str:
    """The temperature, and the size if one was chosen."""
    size = posterior.history.get("size")
    return f"temperature {posterior.temperature:g}" + ("" if size is None else f", size {float(size[0]):g}")


def _mixture_scores(posterior: MixturePosterior) -> list[str]:
    """Sharpness, weights and sizes of a mixture, in lines of text."""
    count = len(posterior.members)
    lines = [f"mixture of {count} member{'s' if count > 1 else ''}{_chosen(posterior.best, 'sharpness')}"]
    for number, (weight, member) in enumerate(zip(posterior.weights, posterior.members, strict=True), 1):
        lines.append(f"member {number}: weight {weight:.2f}{_chosen(member, 'size')}")
    return lines


def _chosen(member: Posterior, name: str) -> str:
    """A value that held-out examples chose, with its 90 % interval; empty if they did not choose one."""
    if name not in member.history:
        return ""
    value, low, high = member.history[name].tolist()
    return f", {name} {value:.3g} (90 % interval {low:.3g} to {high:.3g})"


def _summary(
    posterior: Posterior | MixturePosterior,
    seconds: float,
    labels: Labels,
    new_modules: list[str],
    args: argparse.Namespace,
) -> str:
    """The summary of a fit that took ``seconds``, in lines of text."""
    if isinstance(posterior, MixturePosterior):
        examples, scores = posterior.best.state.examples, _mixture_scores(posterior)
    else:
        examples, scores = posterior.state.examples, _scores(posterior)
    lines = [
        f"{examples:,} examples, {posterior.adapter.num_parameters:,} trainable parameters"
        f" -> {args.output}, in {seconds:.1f} s",
        *scores,
    ]
    if labels.class_names:
        shown = ", ".join(labels.class_names[:8]) + (", ..." if len(labels.class_names) > 8 else "")
        lines.append(f"{len(labels.class_names)} classes: {shown}")
    if new_modules:
        lines.append(f"new modules, which the model lacks at this size: {', '.join(new_modules)}")
    return "\n".join(lines)
