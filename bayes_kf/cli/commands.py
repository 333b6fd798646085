"""What each command does."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bayes_kf.cli.adapters import add_adapter
from bayes_kf.cli.base_model import choose_names, kind_of, load_base, model_folder, own_names, read_config, restore_head
from bayes_kf.cli.folder import Labels, check_output, read_labels, read_new_head, save_posterior
from bayes_kf.cli.settings import read_settings
from bayes_kf.data import LabelledData, open_dataset
from bayes_kf.demo import FULL, QUICK, RANK, caption, markdown_table, run_demo
from bayes_kf.evaluation import Report, evaluate
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fit import fit
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.adapter import AdapterModel, Inputs, split_batch

NUMERIC = ("gaussian", "poisson")  # likelihoods whose targets are no classes


def run_demo_command(args: argparse.Namespace) -> None:
    """``bayes-kf demo``."""
    size, seed = QUICK if args.quick else FULL, args.seed or 0
    rows = run_demo(args.output, size, seed=seed, progress=not args.quiet)
    if not args.quiet:
        print(f"\n{markdown_table(rows)}\n\n{caption(rows, size, RANK, seed)}\n")
        print(f"Report on the last row: {args.output / 'report.html'}; pictures beside it: online.png, reliability.png")


def run_fit(args: argparse.Namespace) -> None:
    """``bayes-kf fit``."""
    settings = read_settings(args)
    check_output(args.output)
    device, folder, kind = _device(args.device), model_folder(args.model), kind_of(args.data)
    data, labels = _open_to_learn(args, settings, folder, kind)
    base = load_base(folder, kind, labels.num_outputs, settings.seed)
    model = _on(add_adapter(base, args, settings.seed), device)
    _check_batch(model, data.loader, args.data)
    posterior = fit(model, data.loader, settings, start=args.start, progress=not args.quiet)
    save_posterior(posterior, args.output, labels, base.new_head)
    if not args.quiet:
        print(_summary(posterior, labels, base.new_modules, args))


def run_evaluate(args: argparse.Namespace) -> None:
    """``bayes-kf evaluate``."""
    if args.output.suffix != ".html":
        raise ValueError(f"`--output` must end in .html, got {args.output}.")
    settings = KalmanConfig.from_pretrained(args.posterior)
    device, folder, kind = _device(args.device), model_folder(args.model), kind_of(args.data)
    labels = read_labels(args.posterior)
    names = own_names(read_config(folder, kind)) if labels is None else labels.class_names
    names = () if settings.likelihood in NUMERIC else names
    data = _open(args, args.data, folder, settings, names or None)
    foreign = {name: _open(args, path, folder, settings, None, foreign=True) for name, path in args.ood}
    if len(foreign) < len(args.ood):
        raise ValueError(
            f"`--ood` must give each set a name of its own, got {', '.join(name for name, _ in args.ood)}."
        )
    base = load_base(folder, kind, None if labels is None else labels.num_outputs, settings.seed)
    restore_head(base, read_new_head(args.posterior), args.posterior)
    posterior = Posterior.from_pretrained(args.posterior, _on(base.model, device))
    for path, opened in [(args.data, data), *((p, foreign[n]) for n, p in args.ood)]:
        _check_batch(posterior.adapter.model, opened.loader, path)
    report = evaluate(
        posterior,
        _watched(data.loader, args.data.name, args.quiet),
        ood={name: _inputs(_watched(d.loader, name, args.quiet)) for name, d in foreign.items()},
        method=args.method,
        num_samples=args.num_samples,
        class_names=names if len(names) > 1 else None,
        title=f"{args.posterior.name or args.posterior} on {args.data.name}",
        seed=args.seed or 0,
    )
    _save_report(report, args.output)
    if not args.quiet:
        print("\n".join([*report.sections.verdict, f"The whole report: {args.output}"]))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": run_demo_command,
    "fit": run_fit,
    "evaluate": run_evaluate,
}


def _open_to_learn(
    args: argparse.Namespace, settings: KalmanConfig, folder: Path, kind: str
) -> tuple[LabelledData, Labels]:
    """The data with the classes that fit model and likelihood."""
    config = read_config(folder, kind)
    data = _open(args, args.data, folder, settings, None, shuffle=not args.in_order, seed=settings.seed)
    if settings.likelihood == "categorical":
        if not data.class_names:
            raise ValueError(f"`--likelihood` categorical needs labels, got numbers in {args.data}.")
        names = choose_names(data.class_names, config)
        if names != data.class_names:
            data = _open(args, args.data, folder, settings, names, shuffle=not args.in_order, seed=settings.seed)
        return data, Labels(names, len(names))
    if settings.likelihood == "bernoulli" and len(data.class_names) > 2:
        raise ValueError(f"`--likelihood` bernoulli needs two classes, got {len(data.class_names)} in {args.data}.")
    targets = _first(data.loader, args.data)[1]
    names = data.class_names if settings.likelihood == "bernoulli" else ()
    return data, Labels(names, targets.shape[1] if targets is not None and targets.ndim == 2 else 1)


def _open(
    args: argparse.Namespace,
    path: Path,
    folder: Path,
    settings: KalmanConfig,
    names: tuple[str, ...] | None,
    *,
    foreign: bool = False,
    shuffle: bool = False,
    seed: int = 0,
) -> LabelledData:
    """A data set with the command's options; the labels of a foreign one are not looked at."""
    options: dict[str, Any] = {}
    if kind_of(path) == "text":
        options = {"text_column": args.text_column, "label_column": args.label_column, "max_length": args.max_length}
        options["numeric"] = settings.likelihood in NUMERIC and not foreign
    common: dict[str, Any] = {"class_names": names, "batch_size": args.batch_size, "shuffle": shuffle, "seed": seed}
    return open_dataset(path, model=folder, **common, **options)


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device; what torch says of a device that is not there becomes a sentence."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` must be there, got {device}: {error}") from error


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`--device` must be a torch device, got {name!r}.") from error


def _first(loader: Iterable[Any], path: Path) -> tuple[Inputs, Any]:
    for batch in loader:
        return split_batch(batch)
    raise ValueError(f"`--data` must hold at least one example, got none in {path}.")


def _check_batch(model: nn.Module, loader: Iterable[Any], path: Path) -> None:
    """Raises ValueError where the model cannot take the data, whatever it is that the model raises."""
    inputs, _ = _first(loader, path)
    adapter = AdapterModel(model)
    try:
        adapter.outputs(adapter.vector(), inputs)
    except Exception as error:
        raise ValueError(f"`--model` must take the inputs of {path}, got {type(error).__name__}: {error}") from error


def _watched(loader: Iterable[Any], name: str, quiet: bool) -> Iterator[Any]:
    """Batches behind a bar that appears with the first of them."""
    yield from tqdm(loader, desc=name, unit="batch", disable=quiet)


def _inputs(loader: Iterable[Any]) -> Iterator[Inputs]:
    """Batches without their labels."""
    return (split_batch(batch)[0] for batch in loader)


def _save_report(report: Report, path: Path) -> None:
    """Page, numbers and sheet, each put in its place only when all are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        report.save(Path(scratch) / path.name)
        for file in Path(scratch).iterdir():
            os.replace(file, path.parent / file.name)


def _summary(posterior: Posterior, labels: Labels, new_modules: list[str], args: argparse.Namespace) -> str:
    """What a pass did, in a few lines."""
    history = posterior.history
    lines = [
        f"{posterior.state.examples:,} examples, {posterior.adapter.num_parameters:,} trainable numbers"
        f" -> {args.output}, in {history['seconds'].sum():.1f} s",
        f"log loss {history['log_loss'].mean():.3f} nats an example before its update"
        + (f", accuracy {history['correct'].mean():.3f}" if "correct" in history else ""),
        f"innovation² / degrees of freedom {history['innovation'].sum() / history['dof'].sum():.2f}"
        f" (1: consistent), temperature {posterior.temperature:g}",
    ]
    if labels.class_names:
        shown = ", ".join(labels.class_names[:8]) + (", ..." if len(labels.class_names) > 8 else "")
        lines.append(f"{len(labels.class_names)} classes: {shown}")
    if new_modules:
        lines.append(f"new, as the model had none of this size: {', '.join(new_modules)}")
    return "\n".join(lines)
