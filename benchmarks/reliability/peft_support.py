"""Support of every adapter type of the installed PEFT: the page ``docs/peft.md``.

Every case of ``peft_cases.py`` runs all methods of a posterior. Each answer is compared with one that does not use this
package: the user's model with the weights written into it, autograd's rows one by one, PEFT's own loader.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.peft_support
"""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.models.language import NextToken
from benchmarks.common.command import Command
from benchmarks.reliability.peft_cases import CASES, EXAMPLES, Case, missing

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
STEPS = (
    "fit",
    "mean",
    "linearized",
    "probit",
    "sampled",
    "save",
    "load",
    "load with adapter",
    "plain PEFT",
    "export",
    "merge",
    "model",
)
CLOSE = 2e-5  # of probabilities and relative errors of rows: float32
DRAWS = 8

HEAD = """Made by `python -m benchmarks.reliability.peft_support` with PEFT {version}: every type that it has, and
variants of LoRA, on small models.

Each case is fitted, predicts by all methods, is saved, loaded and exported; every answer is compared with that of the
user's own model holding the same weights, autograd's rows one by one, and PEFT's own loader. A case that cannot do all
of that is refused by `fit`, before anything changes; the table has the sentence.

The prior's bound on what an adapter may change holds for LoRA exactly and for other types to first order
(`bayes_kf.models.prior.variance_bounds.largest_variances`); prompts, `modules_to_save`, biases and norms have
none.

LoRA with `init_lora_weights` "pissa" or "olora" can be loaded onto the base as it was before the initialization, which
PEFT then repeats, and onto the one that it left. Others that change the base (CorDA, LoftQ, LoRA-GA, `pissa_niter_...`)
depend on data or chance and are refused.

Rows of the Jacobian are derivatives of the outputs. What PEFT does to gradients in training beside that (OSF projects
them, AdaLoRA adds a penalty and prunes ranks) is no part of it.
"""


@dataclass
class Outcome:
    """The outcome of a case: step -> "yes" or the fault; or the sentence with which ``fit`` refuses the adapter."""

    name: str
    kind: str
    steps: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    broken: str = ""  # PEFT itself does not run it

    @property
    def right(self) -> bool:
        """Whether every step works, or the adapter is refused in one sentence."""
        return bool(self.refusal or self.broken) or all(self.steps.get(step) == "yes" for step in STEPS)


def run(case: Case) -> Outcome:
    """The outcome of all steps of a case."""
    outcome = Outcome(case.name, case.kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, inputs = case.wrap(case.base()).eval(), case.inputs()
            with torch.no_grad():
                model(**_forwarded(inputs)) if isinstance(inputs, dict) else model(inputs)
        except Exception as error:
            outcome.broken = f"{type(error).__name__}: {_line(error)}"
            return outcome
        _Run(case, case.wrap(case.base()), outcome).all()
    return outcome


def _forwarded(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "place"}


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


class _Run:
    """The steps of a case."""

    def __init__(self, case: Case, model: nn.Module, outcome: Outcome) -> None:
        self.case, self.model, self.outcome = case, model, outcome
        self.inputs = case.inputs()
        self.reads = isinstance(self.inputs, dict) and "place" in self.inputs  # a language model
        self.targets = torch.arange(EXAMPLES) % 3
        self.before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.objects = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
        self.modes = [module.training for module in model.modules()]

    def all(self) -> None:
        """Run every step, also after one that fails."""
        if not self._fitted():
            return
        posterior = self.posterior
        self.draws = posterior.sample(DRAWS, torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            for name, step in (
                ("mean", self.mean),
                ("linearized", self.linearized),
                ("probit", self.probit),
                ("sampled", self.sampled),
                ("save", self.save),
                ("load", self.load),
                ("load with adapter", self.load_with_adapter),
                ("plain PEFT", self.plain),
                ("export", self.export),
                ("merge", self.merge),
                ("model", self.as_it_was),
            ):
                self._step(name, step)

    def _fitted(self) -> bool:
        config = bkf.KalmanConfig(rank=4, temperature=1.0)
        try:
            batches = [(self.inputs, self.targets)]
            self.posterior = bkf.fit(self._read(self.model), batches, config, progress=False)
        except ValueError as error:
            self.outcome.refusal = str(error)
        except Exception as error:
            self.outcome.steps["fit"] = f"{type(error).__name__}: {_line(error)}"
        else:
            self.outcome.steps["fit"] = "yes"
        if "fit" not in self.outcome.steps:
            self._step("model", self.as_it_was)
            if self.outcome.steps["model"] != "yes":
                self.outcome.refusal = ""
        return self.outcome.steps.get("fit") == "yes"

    def _step(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
            self.outcome.steps[name] = "yes"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.outcome.steps[name] = (
                f"{type(error).__name__}: {_line(error)} ({Path(where.filename).name}:{where.lineno})"
            )

    def _read(self, model: nn.Module) -> Any:
        """The model, or its language model as a classifier of the next token."""
        return NextToken(model) if self.reads else model

    def _reference(self, vector: Tensor, made: nn.Module | None = None) -> nn.Module:
        """A new copy of the user's model, or ``made``, with a parameter vector in it."""
        model = self.case.wrap(self.case.base()).eval() if made is None else made
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, tensor in self.posterior.adapter.unflatten(vector).items():
                own[name].copy_(tensor)
        return model

    def _outputs(self, model: nn.Module, rows: slice = slice(None)) -> Tensor:
        """Outputs of a model without this package, (B, m)."""
        if not isinstance(self.inputs, dict):
            return model(self.inputs[rows])
        given = {name: value[rows] for name, value in self.inputs.items()}
        place = given.pop("place", None)
        logits = model(**given).logits
        return (
            logits
            if place is None
            else logits[torch.arange(len(logits)), place + logits.shape[1] - given["input_ids"].shape[1]]
        )

    def mean(self) -> None:
        """Predictions at the mean equal those of the model with the mean in it."""
        with torch.no_grad():
            expected = self._outputs(self._reference(self.posterior.mean_vector)).softmax(-1)
        _near(self.posterior.predict(self.inputs, "mean").probs, expected)

    def linearized(self) -> None:
        """Rows of the Jacobian equal autograd's, one by one."""
        mean = self.posterior.mean_vector
        model = copy.deepcopy(self._reference(mean))  # without OSF's hooks, which change gradients
        own = [p for p in model.parameters() if p.requires_grad]
        rows = []
        for b in range(EXAMPLES):
            out = self._outputs(model, slice(b, b + 1))[0]
            for j in range(min(3, len(out))):
                by_tensor = torch.autograd.grad(out[j], own, retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).flatten()
                            for p, g in zip(own, by_tensor, strict=True)
                        ]
                    )
                )
        exact = torch.stack(rows).view(EXAMPLES, -1, len(mean))
        by_tensor = self.posterior.kf.linearize(mean, self.inputs).jacobian().dense()[:, : exact.shape[1]]
        apart = float((by_tensor - exact).norm() / exact.norm())
        if not apart < 1e-4:
            raise AssertionError(f"rows are off by {apart:.2g}")
        if not bool(torch.isfinite(self.posterior.predict(self.inputs, "linearized").probs).all()):
            raise AssertionError("not finite")

    def probit(self) -> None:
        """Probit predictions are close to draws of the same moments, if these are narrow."""
        belief, jacobian = (
            self.posterior.state.belief,
            self.posterior.kf.linearize(self.posterior.mean_vector, self.inputs).jacobian(),
        )
        widest = float(belief.output_covariance(jacobian).diagonal(dim1=1, dim2=2).max())
        posterior = self.posterior.with_settings(temperature=min(0.01, 0.1 / widest))
        one = posterior.predict(self.inputs, "probit").probs
        two = posterior.predict(self.inputs, "linearized", num_samples=2000).probs
        assert one is not None
        assert two is not None
        apart = float((one - two).abs().sum(-1).max()) / 2
        if not apart < 0.03:
            raise AssertionError(f"total variation {apart:.2g}")

    def sampled(self) -> None:
        """Sampled predictions equal the mean over models with the draws in them."""
        probs = self.posterior.predict(self.inputs, "sampled", DRAWS, torch.Generator().manual_seed(0)).probs
        with torch.no_grad():
            made = self._reference(self.draws[0])
            drawn = [self._outputs(self._reference(draw, made)).softmax(-1) for draw in self.draws]
            expected = torch.stack(drawn).mean(0)
        _near(probs, expected)

    def save(self) -> None:
        """Save into a new folder."""
        self.posterior.save_pretrained(self.folder / "saved")

    def load(self) -> None:
        """Load onto a new base; the predictions are unchanged."""
        self._loaded(self.case.base())

    def load_with_adapter(self) -> None:
        """Load onto a base that has a new adapter of the same settings."""
        self._loaded(self.case.wrap(self.case.base()))

    def _loaded(self, base: nn.Module) -> None:
        loaded = bkf.Posterior.from_pretrained(self.folder / "saved", base)
        loaded = loaded.with_adapter(self._read(loaded.adapter.model)) if self.reads else loaded
        for method in ("mean", "linearized"):
            _near(loaded.predict(self.inputs, method).probs, self.posterior.predict(self.inputs, method).probs)

    def plain(self) -> None:
        """PEFT's own loader gives the mean's predictions."""
        self._plain("saved", self.posterior.mean_vector)

    def export(self) -> None:
        """PEFT's own loader gives a draw's predictions."""
        (path,) = self.posterior.export_adapters(self.folder / "draws", 1, torch.Generator().manual_seed(0))
        draw = self.posterior.sample(1, torch.Generator().manual_seed(0))[0]
        self._plain(path.relative_to(self.folder), draw)

    def _plain(self, folder: Any, vector: Tensor) -> None:
        loaded = peft.PeftModel.from_pretrained(self.case.base(), str(self.folder / folder)).eval()
        with torch.no_grad():
            _near(self._outputs(loaded).softmax(-1), self._outputs(self._reference(vector)).softmax(-1))

    def merge(self) -> None:
        """Merge two posteriors of different data from one prior; the merged one predicts."""
        kf = self.posterior.kf
        state, halves = kf.init(self.inputs), []
        for part in (slice(0, 3), slice(3, 6)):
            given = {k: v[part] for k, v in self.inputs.items()} if isinstance(self.inputs, dict) else self.inputs[part]
            halves.append(bkf.Posterior(kf, kf.update(state, given, self.targets[part])[0]))
        merged = bkf.merge(halves)
        if not bool(torch.isfinite(merged.predict(self.inputs).probs).all()):
            raise AssertionError("not finite")

    def as_it_was(self) -> None:
        """The user's model has the same values, trainable parameters and modes as before the first step."""
        now = self.model.state_dict()
        changed = [name for name in self.before if name not in now or not torch.equal(self.before[name], now[name])]
        if changed or len(now) != len(self.before):
            raise AssertionError(f"changed: {changed[:3]}")
        if {name: id(p) for name, p in self.model.named_parameters() if p.requires_grad} != self.objects:
            raise AssertionError("other trainable parameters")
        if [module.training for module in self.model.modules()] != self.modes:
            raise AssertionError("other modes")


def _near(value: Tensor | None, expected: Tensor) -> None:
    assert value is not None
    apart = float((value - expected).abs().max())
    if not apart <= CLOSE:
        raise AssertionError(f"a probability is off by {apart:.2g}")


def page(outcomes: list[Outcome]) -> str:
    """The page of the documentation."""
    lines = ["# PEFT types", "", HEAD.format(version=peft.__version__)]
    heads = ["adapter", *(step if step != "model" else "model unchanged" for step in STEPS)]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " :-: |" * len(STEPS)]
    works = [outcome for outcome in outcomes if not outcome.refusal and not outcome.broken]
    lines += [
        f"| {outcome.name} | " + " | ".join(_cell(outcome.steps.get(s, "")) for s in STEPS) + " |" for outcome in works
    ]
    lines += ["", "## Refused", "", "| adapter | what `fit` says |", "| --- | --- |"]
    lines += [f"| {outcome.name} | {outcome.refusal} |" for outcome in outcomes if outcome.refusal]
    lines += ["", "## What PEFT itself does not run here", "", "| adapter | what PEFT says |", "| --- | --- |"]
    lines += [f"| {outcome.name} | {outcome.broken} |" for outcome in outcomes if outcome.broken]
    faults = [
        f"- {outcome.name}: {step}: {outcome.steps[step]}"
        for outcome in works
        for step in outcome.steps
        if outcome.steps[step] != "yes"
    ]
    if faults:
        lines += ["", "## Known faults", "", *faults]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return {"yes": "yes", "": "-"}.get(text, "no")


def main() -> None:
    """The command line."""
    args = Command(__doc__).option("--only", nargs="*", help="parts of names; prints without writing the page").parse()
    outcomes = []
    for case in CASES:
        if args.only and not any(part in case.name for part in args.only):
            continue
        outcome = run(case)
        outcomes.append(outcome)
        bad = {step: text for step, text in outcome.steps.items() if text != "yes"}
        print(
            outcome.name,
            "|",
            "PEFT: " + outcome.broken if outcome.broken else "",
            "|",
            outcome.refusal and "REFUSED " + outcome.refusal,
            "|",
            bad or "all right",
            flush=True,
        )
    print("without a case:", missing())
    if not args.only:
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
