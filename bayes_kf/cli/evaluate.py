"""``bayes-kf evaluate`` and ``bayes-kf compare``: reports on posteriors and on saved predictions."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayes_kf.cli.base_model import kind_of, load_base, model_class_names, model_folder, read_config, restore_head
from bayes_kf.cli.inputs import check_takes, move, naming_options, open_data, read_device
from bayes_kf.cli.posterior_folder import read_labels, read_new_head
from bayes_kf.data import SavedPredictions, read_predictions
from bayes_kf.data.predictions import PREDICTION_SUFFIXES
from bayes_kf.evaluation import (
    ConformalSets,
    Recalibration,
    Report,
    evaluate,
    evaluate_predictions,
    evaluate_regression,
    report_comparison,
)
from bayes_kf.evaluation.posterior_report import class_predictions
from bayes_kf.evaluation.recalibration.scaling import RECALIBRATIONS
from bayes_kf.evaluation.report.files import check_page
from bayes_kf.inference.config import KalmanConfig
from bayes_kf.inference.fitting.progress import shows_progress
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Inputs, split_batch
from bayes_kf.models.likelihood import NUMERIC


def run_evaluate(args: argparse.Namespace) -> None:
    """``bayes-kf evaluate``."""
    _check_page(args)
    if len({name for name, _ in args.ood}) < len(args.ood):
        raise ValueError(
            f"`--ood` must give each data set a different name, got {', '.join(name for name, _ in args.ood)}."
        )
    if args.recalibrate and not args.calibration:
        raise ValueError(f"`--calibration` must name examples to fit --recalibrate {args.recalibrate} on, got none.")
    if args.conformal is not None and not args.calibration:
        raise ValueError("`--calibration` must name examples to fit --conformal on, got none.")
    is_file = _is_predictions(args.posterior)
    _check_model_and_data(args, needed=not is_file, path=args.posterior)
    report = _report_predictions(args) if is_file else _report_posterior(args)
    _save(report, args)


def run_compare(args: argparse.Namespace) -> None:
    """``bayes-kf compare``."""
    _check_page(args)
    names = [name for name, _ in args.models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`NAME=PATH` must be given at least twice, with different names, got {', '.join(names)}.")
    folders = [path for _, path in args.models if not _is_predictions(path)]
    _check_model_and_data(args, needed=bool(folders), path=folders[0] if folders else args.models[0][1])
    probs: dict[str, Any] = {}
    histories: dict[str, Any] = {}
    targets: Tensor | None = None
    for name, path in args.models:
        probs[name], own_targets, history = _read_model(args, name, path)
        histories |= {name: history} if history else {}
        if targets is not None and not torch.equal(targets, own_targets):
            raise ValueError(
                f"`NAME=PATH` must hold the same targets in the same order, got different targets for {name}."
            )
        targets = own_targets
    assert targets is not None
    title = args.title or f"{', '.join(names)}" + (f" on {args.data.name}" if args.data else "")
    _save(report_comparison(probs, targets, histories=histories, title=title, seed=args.seed or 0), args)


@dataclass(frozen=True)
class _Opened:
    """A posterior, its settings and the classes that it predicts."""

    posterior: Posterior
    settings: KalmanConfig
    class_names: tuple[str, ...]
    folder: Path  # of the model


class _Model(NamedTuple):
    """Predictions of one model in a comparison."""

    probs: Any
    targets: Tensor
    history: Any


def _report_posterior(args: argparse.Namespace) -> Report:
    """The report on a saved posterior."""
    opened = _open_posterior(args, args.posterior)
    data = _loader(args, opened, args.data)
    ood_loaders = {name: _loader(args, opened, path, option="--ood") for name, path in args.ood}
    recalibration, conformal = None, None
    if args.calibration:
        split = _loader(args, opened, args.calibration, option="--calibration")
        heldout = opened.posterior.predict_loader(
            _with_progress_bar(split, args.calibration.name, args.quiet),
            method=args.method,
            num_samples=args.num_samples,
        )
        probs, targets = class_predictions(opened.posterior, heldout, "POSTERIOR")
        recalibration, conformal = _fit_recalibration(args, probs, targets)
    return evaluate(
        opened.posterior,
        _with_progress_bar(data, args.data.name, args.quiet),
        ood={name: _inputs(_with_progress_bar(loader, name, args.quiet)) for name, loader in ood_loaders.items()}
        or None,
        examples=_Examples(data.dataset) if args.show_examples and opened.class_names else None,
        recalibration=recalibration,
        conformal=conformal,
        ordered=args.ordered,
        method=args.method,
        num_samples=args.num_samples,
        class_names=opened.class_names if len(opened.class_names) > 1 else None,
        title=args.title or f"{args.posterior.name or args.posterior} on {args.data.name}",
        seed=args.seed or 0,
    )


def _report_predictions(args: argparse.Namespace) -> Report:
    """The report on a file of predictions."""
    saved = _predictions(args.posterior, "POSTERIOR")
    title = args.title or args.posterior.name
    if saved.probs is None:
        if args.ood or args.calibration:
            raise ValueError("`--ood` and `--calibration` must be left out for predictions of real values.")
        assert saved.mean is not None
        assert saved.targets is not None
        return evaluate_regression(
            saved.mean, saved.targets, variance=saved.variance, samples=saved.samples, title=title, seed=args.seed or 0
        )
    ood_probs = {name: _probs(_predictions(path, "--ood", need_targets=False), path) for name, path in args.ood}
    recalibration, conformal = None, None
    if args.calibration:
        heldout = _predictions(args.calibration, "--calibration")
        recalibration, conformal = _fit_recalibration(args, _probs(heldout, args.calibration), heldout.targets)
    assert saved.targets is not None
    return evaluate_predictions(
        saved.probs,
        saved.targets,
        samples=saved.samples,
        ood=ood_probs,
        recalibration=recalibration,
        conformal=conformal,
        ordered=args.ordered,
        class_names=saved.class_names,
        title=title,
        seed=args.seed or 0,
    )


def _fit_recalibration(
    args: argparse.Namespace, probs: Any, targets: Any
) -> tuple[Recalibration | None, ConformalSets | None]:
    """The recalibration and the conformal sets of the options, fitted on `--calibration`."""
    split = args.calibration.name
    recalibration = RECALIBRATIONS[args.recalibrate].fit(probs, targets, split=split) if args.recalibrate else None
    conformal = None
    if args.conformal is not None:
        conformal = ConformalSets.fit(probs, targets, level=args.conformal, split=split)
    return recalibration, conformal


def _read_model(args: argparse.Namespace, name: str, path: Path) -> _Model:
    """Class probabilities, targets and history of one of several models."""
    if _is_predictions(path):
        saved = _predictions(path, "NAME=PATH")
        probs = _probs(saved, path)
        assert saved.targets is not None
        return _Model(probs, torch.as_tensor(saved.targets).long(), None)
    opened = _open_posterior(args, path)
    loader = _with_progress_bar(_loader(args, opened, args.data), name, args.quiet)
    generator = torch.Generator().manual_seed(args.seed or 0)
    prediction = opened.posterior.predict_loader(
        loader, method=args.method, num_samples=args.num_samples, generator=generator
    )
    return _Model(*class_predictions(opened.posterior, prediction, str(path)), opened.posterior.history)


def _open_posterior(args: argparse.Namespace, path: Path) -> _Opened:
    """A posterior on its model."""
    with naming_options(folder="POSTERIOR"):
        settings = KalmanConfig.from_pretrained(path)
    device, folder, kind = read_device(args.device), model_folder(args.model), kind_of(args.data)
    labels = read_labels(path)
    names = model_class_names(read_config(folder, kind)) if labels is None else labels.class_names
    base = load_base(folder, kind, None if labels is None else labels.num_outputs, settings.seed, args.dtype)
    restore_head(base, read_new_head(path), path)
    with naming_options(folder="POSTERIOR"):
        posterior = Posterior.from_pretrained(path, move(base.model, device))
    return _Opened(posterior, settings, () if settings.likelihood in NUMERIC else names, folder)


def _loader(args: argparse.Namespace, opened: _Opened, path: Path, *, option: str = "--data") -> Any:
    """Batches of a data set, checked against the model."""
    is_ood = option == "--ood"
    names = None if is_ood else opened.class_names or None
    data = open_data(args, path, opened.folder, opened.settings, names, option=option, is_ood=is_ood)
    check_takes(opened.posterior.adapter.model, data.loader, path)
    return data.loader


def _predictions(path: Path, option: str, *, need_targets: bool = True) -> SavedPredictions:
    """Saved predictions; errors name the option that gave the path."""
    with naming_options(path=option):
        return read_predictions(path, need_targets=need_targets)


class _Examples(Sequence[Any]):
    """The inputs of a data set, read one at a time."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][0]


def _probs(saved: SavedPredictions, path: Path) -> np.ndarray:
    """Class probabilities of a file."""
    if saved.probs is None:
        raise ValueError(f"`PATH` must hold class probabilities, got real values in {path}.")
    return saved.probs


def _is_predictions(path: Path) -> bool:
    """Whether a path is a file of predictions, not the folder of a posterior."""
    return path.suffix in PREDICTION_SUFFIXES and not path.is_dir()


def _check_page(args: argparse.Namespace) -> None:
    """Raise ValueError unless the report can be written to ``--output``."""
    check_page(args.output, "--output")


def _check_model_and_data(args: argparse.Namespace, *, needed: bool, path: Path) -> None:
    """Raise ValueError unless a posterior has both options, and saved predictions neither."""
    for option, given in (("--model", args.model), ("--data", args.data)):
        if needed and given is None:
            raise ValueError(f"`{option}` must be given for the posterior {path}, got none.")
        if not needed and given is not None:
            raise ValueError(f"`{option}` must be left out for saved predictions, got {given}.")


def _with_progress_bar(loader: Iterable[Any], name: str, quiet: bool) -> Iterator[Any]:
    """Batches with a progress bar, which appears with the first batch."""
    yield from tqdm(loader, desc=name, unit="batch", disable=not shows_progress(False if quiet else None))


def _inputs(loader: Iterable[Any]) -> Iterator[Inputs]:
    """Batches without their labels."""
    return (split_batch(batch)[0] for batch in loader)


def _save(report: Report, args: argparse.Namespace) -> None:
    """Write the report and print its verdict."""
    report.save(args.output)
    if not args.quiet:
        print("\n".join([*report.sections.verdict, f"Full report: {args.output}"]))
