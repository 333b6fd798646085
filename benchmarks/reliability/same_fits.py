"""Hashes of small fits, by which two versions of the package are compared to the bit.

Each fit takes seconds and uses only the public interface. Its hashes are those of the mean, the marginal variances, the
predictions, the history, the scores of a report and every file of the saved posterior. Wall times and the prose of the
model card are left out. The hashes depend on the processor, the thread count and the version of torch: compare two
versions of the package on one machine.

    python -m benchmarks.reliability.same_fits --output before.json
    python -m benchmarks.reliability.same_fits --compare before.json

The file imports nothing else from ``benchmarks``, so a copy of it also runs against another checkout:

    PYTHONPATH=<checkout> python same_fits.py --output there.json
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import bayes_kf as bkf
from bayes_kf import evaluation
from bayes_kf.inference.baselines import KFAC, RENG, RING, SophiaG, SparseOptimization
from bayes_kf.models.language import NextToken, OptionTokens
from bayes_kf.models.zoo import lora_digits_vit

Batches = list[tuple[Any, Tensor]]

STATE_FILE = "kalman_state.safetensors"

TIMED = ("seconds", "history.seconds")  # tensors that differ between any two runs

LEFT_OUT = ("README.md", "SHA256SUMS", "SHA256SUMS.draws")  # the card's sentences may change; the sums cover it

CLASSES = 5


class Hashes:
    """Hashes by the name of what was hashed."""

    def __init__(self) -> None:
        self.by_name: dict[str, str] = {}

    def add(self, name: str, content: bytes) -> None:
        """The hash of some bytes under ``name``."""
        self.by_name[name] = hashlib.sha256(content).hexdigest()[:16]

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """The hash of a tensor's type, shape and numbers."""
        tensor = tensor.detach().cpu().contiguous()
        self.add(name, f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.view(-1).numpy().tobytes())

    def add_scores(self, name: str, scores: Mapping[str, float]) -> None:
        """The hash of named numbers."""
        self.add(name, json.dumps(dict(scores), sort_keys=True).encode())

    def add_prediction(self, name: str, prediction: bkf.Prediction) -> None:
        """One hash for all tensors of a prediction."""
        fields = {key: value for key, value in sorted(vars(prediction).items()) if isinstance(value, Tensor)}
        parts = [f"{key} {tuple(value.shape)} ".encode() + _bytes(value) for key, value in fields.items()]
        self.add(name, b"".join(parts))

    def add_folder(self, name: str, folder: Path) -> None:
        """The hash of every file of a saved posterior."""
        for path in sorted(folder.rglob("*")):
            label = f"{name}/{path.relative_to(folder)}"
            if path.name == STATE_FILE:
                self._add_state(label, path)
            elif path.name == "adapter_config.json":
                settings = json.loads(path.read_bytes())
                settings["target_modules"] = sorted(settings["target_modules"])  # PEFT holds a set, whose order varies
                self.add(label, json.dumps(settings, sort_keys=True).encode())
            elif path.is_file() and path.name not in LEFT_OUT:
                self.add(label, path.read_bytes())

    def _add_state(self, label: str, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in sorted(file.metadata().items())}
            for key in sorted(file.keys()):
                if key not in TIMED:
                    self.add_tensor(f"{label}/{key}", file.get_tensor(key))
        for values in metadata.values():
            values.pop("editable", None)  # hashes of the model card
        self.add(f"{label}/metadata", json.dumps(metadata, sort_keys=True).encode())

    def add_posterior(
        self, posterior: bkf.Posterior | bkf.MixturePosterior, heldout: Batches, *, report: bool = False
    ) -> None:
        """The hashes of a posterior, its predictions of ``heldout`` and, where asked, a report's scores."""
        members = posterior.members if isinstance(posterior, bkf.MixturePosterior) else [posterior]
        for number, member in enumerate(members):
            place = f" of member {number}" if number else ""
            self.add_tensor(f"mean{place}", member.mean_vector)
            self.add_tensor(f"variance{place}", member.variance_vector)
            if member.mean_vector.numel() <= 1000:
                self.add_tensor(f"covariance{place}", member.covariance_matrix())
        self.add_tensor("draws", posterior.sample(3))
        self.add("temperature", repr((posterior.temperature, posterior.softmax_temperature)).encode())
        for key, series in posterior.history.items():
            if key not in TIMED:
                self.add_tensor(f"history/{key}", series)
        methods = ["linearized", "sampled", "mean"] + ["probit"] * (posterior.config.likelihood != "poisson")
        for method in methods:
            self.add_prediction(f"predict/{method}", posterior.predict_loader(heldout, method, 6))
        if report:
            self.add_scores("scores", bkf.evaluate(posterior, heldout).scores)
        with TemporaryDirectory() as scratch:
            posterior.save_pretrained(scratch)
            self.add_folder("saved", Path(scratch))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).numpy().tobytes()


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as tuples of numbers, so that a renamed class changes no hash."""
    if dataclasses.is_dataclass(value):
        value = tuple(vars(value).values())
    return tuple(_plain(part) for part in value) if isinstance(value, tuple) else value


# Models and data.


def network(outputs: int = CLASSES) -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, outputs))


def convolutional() -> nn.Module:
    """Convolution, batch norm in evaluation mode, pooling, group norm and a head; images of 8 by 8."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES)).eval()


def lora_bert(**settings: Any) -> PeftModel:
    """BERT with random weights, LoRA on all matrices and a trained head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16, num_labels=3)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value", "dense"], **settings)
    return get_peft_model(BertForSequenceClassification(config), lora).eval()


def lora_gpt2() -> PeftModel:
    """GPT-2 with random weights and LoRA on its attention."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), lora).eval()


def vectors(examples: int, size: int) -> tuple[Tensor, Tensor]:
    """Inputs (N, 6) and the outputs (N, 5) of a random linear map."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, 6, generator=generator)
    return inputs, inputs @ torch.randn(6, size, generator=generator)


def labelled(examples: int = 120, batch: int = 4) -> Batches:
    """Vectors with class labels."""
    inputs, outputs = vectors(examples, CLASSES)
    return list(zip(inputs.split(batch), outputs.argmax(1).split(batch), strict=True))


def images(examples: int = 80, batch: int = 4) -> Batches:
    """Noise with a bright square, whose place is the class."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES, (examples,), generator=generator)
    pictures = torch.randn(examples, 1, 8, 8, generator=generator)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[0, label : label + 3, label : label + 3] += 2.0
    return list(zip(pictures.split(batch), labels.split(batch), strict=True))


def sentences(examples: int = 64, batch: int = 4, vocabulary: int = 60) -> Batches:
    """Token sequences with padding; the class is the first token modulo 3."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, vocabulary, (examples, 8), generator=generator)
    lengths = torch.randint(3, 9, (examples, 1), generator=generator)
    mask = (torch.arange(8) < lengths).long()
    inputs = [{"input_ids": i, "attention_mask": m} for i, m in zip((ids * mask).split(batch), mask.split(batch))]  # noqa: B905
    return list(zip(inputs, (ids[:, 0] % 3).split(batch), strict=True))


def fitted(model: nn.Module, batches: Batches, config: bkf.KalmanConfig | None, **settings: Any) -> bkf.Posterior:
    """A fit without a progress bar."""
    return bkf.fit(model, batches, config, progress=False, **settings)


# The fits. Each adds its hashes, under names of its own where it makes several posteriors.


def covariance_structures() -> Iterator[tuple[str, Hashes]]:
    """Every covariance structure on one stream."""
    batches = labelled()
    names = ("low_rank", "diagonal", "diagonal_information", "diagonal_mixed", "block_diagonal", "full")
    for name in names:
        hashes = Hashes()
        config = bkf.KalmanConfig(covariance=name, rank=8)
        hashes.add_posterior(fitted(network(), batches[:20], config), batches[20:], report=name == "full")
        yield name, hashes


def curvatures() -> Iterator[tuple[str, Hashes]]:
    """The curvatures other than the exact one, on images."""
    batches = images()
    settings: dict[str, dict[str, Any]] = {
        "truncated": {"curvature": "truncated", "curvature_classes": 2},
        "sampled": {"curvature": "sampled", "curvature_draws": 2},
        "pieces": {"outputs_per_pass": 2, "bytes_budget": 20_000},
    }
    for name, setting in settings.items():
        hashes = Hashes()
        hashes.add_posterior(fitted(convolutional(), batches[:15], bkf.KalmanConfig(rank=8, **setting)), batches[15:])
        yield name, hashes


def noise_models() -> Iterator[tuple[str, Hashes]]:
    """LoKO's setting and the other noise models."""
    batches = labelled()
    configs = {
        "loko": bkf.KalmanConfig.loko(),
        "ema_residual": bkf.KalmanConfig(noise="ema_residual", covariance="diagonal"),
        "identity": bkf.KalmanConfig(noise="identity", covariance="block_diagonal", blocks="tensors"),
        "decaying": bkf.KalmanConfig(noise="decaying", rank=8, expansion="mean"),
    }
    for name, config in configs.items():
        hashes = Hashes()
        hashes.add_posterior(fitted(network(), batches[:20], config), batches[20:])
        yield name, hashes


def likelihoods() -> Iterator[tuple[str, Hashes]]:
    """The likelihoods other than the categorical one."""
    inputs, outputs = vectors(120, 2)
    targets = {
        "bernoulli": (outputs > 0).float(),
        "gaussian": torch.sin(outputs),
        "poisson": outputs.clamp(-2, 2).exp().round(),
    }
    for name, target in targets.items():
        hashes = Hashes()
        batches: Batches = list(zip(inputs.split(4), target.split(4), strict=True))
        setting = {"noise_variance": "estimated"} if name == "gaussian" else {}
        config = bkf.KalmanConfig(likelihood=name, rank=8, **setting)
        report = name in ("bernoulli", "gaussian")
        hashes.add_posterior(fitted(network(2), batches[:20], config), batches[20:], report=report)
        yield name, hashes


def trained_adapter() -> Iterator[tuple[str, Hashes]]:
    """A LoRA adapter trained by AdamW, its covariance around it, calibrated by held-out data, and exported draws."""
    model, batches = lora_bert(), sentences()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for inputs, labels in batches[:8] * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
    for structure in ("low_rank", "diagonal"):
        hashes, config = Hashes(), bkf.KalmanConfig(covariance=structure)
        posterior = fitted(model, batches[:8], config, start="trained")
        hashes.add_posterior(posterior, batches[12:])
        calibrated = posterior.calibrate(batches[8:12])
        hashes.add("calibrated", repr((calibrated.temperature, calibrated.softmax_temperature)).encode())
        hashes.add_prediction("predict/calibrated", calibrated.predict_loader(batches[12:]))
        with TemporaryDirectory() as scratch:
            posterior.export_adapters(scratch, 2)
            hashes.add_folder("exported", Path(scratch))
        yield structure, hashes


def passes() -> Iterator[tuple[str, Hashes]]:
    """Passes of the mean, and Gauss-Newton passes of the filter."""
    batches = labelled()
    for name, config in {
        "mean passes": bkf.KalmanConfig.dataset(rank=8, mean_passes=2),
        "filter passes": bkf.KalmanConfig(covariance="full", passes=3),
        "filter passes, diagonal": bkf.KalmanConfig(covariance="diagonal_information", passes=2),
    }.items():
        hashes = Hashes()
        hashes.add_posterior(fitted(network(), batches[:20], config), batches[20:])
        yield name, hashes


def default_selection() -> Iterator[tuple[str, Hashes]]:
    """``fit`` without settings on a data set: a mixture of two; DoRA in a BERT."""
    hashes, batches = Hashes(), labelled(96, 8)
    hashes.add_posterior(fitted(network(), batches[:9], None), batches[9:], report=True)
    yield "network", hashes
    hashes, batches = Hashes(), sentences(40)
    hashes.add_posterior(fitted(lora_bert(use_dora=True), batches[:8], None), batches[8:])
    yield "DoRA", hashes


def stream() -> Iterator[tuple[str, Hashes]]:
    """A single pass of an iterator, whose first 200 examples choose the prior; a stream that changes; one resumed."""
    hashes, batches = Hashes(), labelled(240)
    hashes.add_posterior(bkf.fit(network(), iter(batches[:55]), progress=False), batches[55:])
    yield "prior chosen", hashes
    changing = {"forgetting": 0.99, "drift_variance": 1e-4, "prior_pull": 0.01, "gate_quantile": 0.99}
    hashes = Hashes()
    hashes.add_posterior(fitted(network(), batches[:20], bkf.KalmanConfig(rank=8, **changing)), batches[55:])
    yield "changing", hashes
    hashes = Hashes()
    with TemporaryDirectory() as scratch:
        config = bkf.KalmanConfig(rank=8)
        fitted(network(), batches[:10], config, checkpoint=scratch, every=5)
        resumed = fitted(network(), batches[:20], config, checkpoint=scratch, every=5)
        hashes.add_posterior(resumed, batches[55:])
        hashes.add_posterior(bkf.Posterior.from_pretrained(scratch, network()), batches[55:])
    yield "resumed", hashes


def bank_and_merge() -> Iterator[tuple[str, Hashes]]:
    """A bank of filters with its averaged prediction, and a posterior merged of two."""
    hashes, batches = Hashes(), labelled()
    configs = [bkf.KalmanConfig(rank=8, initial_logit_sd=sd) for sd in (0.3, 3.0, 30.0)]
    bank = bkf.Bank(network(), configs, margin=1.0)
    state = bank.init(batches[0][0])
    for inputs, labels in batches[:20]:
        state, info = bank.update(state, inputs, labels)
    hashes.add_tensor("evidence", bank.evidence(state))
    hashes.add_tensor("log_loss", info.log_loss)
    hashes.add_prediction("predict/bank", bank.predict(state, batches[20][0]))
    hashes.add_posterior(bank.posterior(state), batches[20:])
    yield "bank", hashes
    hashes, kf = Hashes(), bkf.KalmanFilter(network(), bkf.KalmanConfig(covariance="full"))
    parts, start = [], kf.init(batches[0][0])
    for half in (batches[:10], batches[10:20]):
        state = start
        for inputs, labels in half:
            state, _ = kf.update(state, inputs, labels)
        parts.append(bkf.Posterior(kf, state))
    hashes.add_posterior(bkf.merge(parts), batches[20:])
    yield "merge", hashes


def gradient_penalty() -> Iterator[tuple[str, Hashes]]:
    """Both forms of R-Kalman's penalty."""
    batches = labelled()
    for form in ("transient", "permanent"):
        hashes = Hashes()
        config = bkf.KalmanConfig(rank=8, gradient_penalty=0.1, gradient_penalty_form=form)
        hashes.add_posterior(fitted(network(), batches[:20], config), batches[20:])
        yield form, hashes


def language_models() -> Iterator[tuple[str, Hashes]]:
    """Options and next tokens of a causal language model, and text generated by its posterior."""
    hashes = Hashes()
    batches = [(inputs, labels) for inputs, labels in sentences(48, vocabulary=40)]
    posterior = fitted(OptionTokens(lora_gpt2(), [3, 5, 7]), batches[:8], bkf.KalmanConfig(rank=8))
    hashes.add_posterior(posterior, batches[8:])
    yield "options", hashes
    hashes = Hashes()
    following = [({**inputs, "place": torch.full((len(labels),), 2)}, labels + 1) for inputs, labels in batches]
    posterior = fitted(NextToken(lora_gpt2()), following[:8], bkf.KalmanConfig(rank=8, curvature="sampled"))
    hashes.add_posterior(posterior, following[8:])
    prompts = {"input_ids": batches[8][0]["input_ids"][:, :3]}  # no padding
    generated = posterior.generate(prompts, max_new_tokens=3, num_samples=3)
    for key, value in sorted(generated._asdict().items()):
        if isinstance(value, Tensor):
            hashes.add_tensor(f"generated/{key}", value)
    yield "next token", hashes


def digit_transformer() -> Iterator[tuple[str, Hashes]]:
    """The bundled transformer with LoRA and a trained head; noise in the place of digits."""
    generator = torch.Generator().manual_seed(4)
    pictures, labels = torch.rand(24, 1, 28, 28, generator=generator), torch.arange(24) % 10
    batches: Batches = list(zip(pictures.split(2), labels.split(2), strict=True))
    hashes = Hashes()
    hashes.add_posterior(fitted(lora_digits_vit(), batches[:8], bkf.KalmanConfig(rank=8)), batches[8:])
    yield "LoRA", hashes


def reports() -> Iterator[tuple[str, Hashes]]:
    """Scores of reports with all their parts, comparisons, recalibration, conformal sets, streams."""
    batches, hashes = labelled(400, 8), Hashes()
    ours, theirs = (fitted(network(), batches[:n], bkf.KalmanConfig(rank=8)) for n in (10, 5))
    calibration = ours.predict_loader(batches[10:30])
    test = ours.predict_loader(batches[30:])
    for kind in (evaluation.TemperatureScaling, evaluation.VectorScaling, evaluation.IsotonicCalibration):
        recalibration = kind.fit(calibration.probs, calibration.targets)
        hashes.add_tensor(kind.__name__, recalibration(test.probs))
    conformal = evaluation.ConformalSets.fit(calibration.probs, calibration.targets, level=0.9)
    far = [(inputs + 4.0, labels) for inputs, labels in batches[30:]]
    settings = {"recalibration": recalibration, "conformal": conformal, "ordered": True}
    page = bkf.evaluate(ours, batches[30:], ood={"far": far}, num_simulations=200, **settings)
    hashes.add_scores("evaluate", page.scores)
    page = bkf.compare({"ours": ours, "theirs": theirs}, batches[30:], num_simulations=200)
    hashes.add_scores("compare", page.scores)
    streaming = evaluation.StreamingScores(CLASSES)
    streaming.update(test.probs, test.targets)
    hashes.add_scores("StreamingScores", streaming.scores(num_simulations=200))
    shifted = {0.0: (test.probs, test.targets), 1.0: (test.probs.roll(1, 0), test.targets)}
    hashes.add("shift_curve", repr(_plain(evaluation.shift_curve(shifted, num_simulations=200))).encode())
    hashes.add_tensor("drift_alarm", evaluation.drift_alarm(test.probs, test.targets).statistic)
    yield "classes", hashes


def baselines() -> Iterator[tuple[str, Hashes]]:
    """Ten steps of every optimizer in ``inference.baselines``."""
    hashes = Hashes()
    optimizers: dict[str, Callable[[nn.Module], Any]] = {
        "kfac": lambda model: KFAC(model, lr=0.01),
        "sophia": lambda model: SophiaG(model, lr=0.01),
        "sparse": lambda model: SparseOptimization(model, lr=0.01),
        "ring": lambda model: RING(model, lr=0.01),
        "reng": lambda model: RENG(model, lr=0.01),
    }
    for name, build in optimizers.items():
        model = network()
        optimizer = build(model)
        torch.manual_seed(0)
        for inputs, labels in labelled(40):
            optimizer.zero_grad()
            logits = model(inputs)
            optimizer.backward(F.cross_entropy(logits, labels), logits)
            optimizer.step()
        hashes.add_tensor(name, torch.cat([p.detach().view(-1) for p in model.parameters()]))
    yield "weights", hashes


FITS: dict[str, Callable[[], Iterator[tuple[str, Hashes]]]] = {
    "covariance": covariance_structures,
    "curvature": curvatures,
    "noise": noise_models,
    "likelihood": likelihoods,
    "trained": trained_adapter,
    "passes": passes,
    "default": default_selection,
    "stream": stream,
    "bank": bank_and_merge,
    "penalty": gradient_penalty,
    "language": language_models,
    "digits": digit_transformer,
    "reports": reports,
    "baselines": baselines,
}


def compute(names: list[str]) -> dict[str, dict[str, str]]:
    """Hashes of the named fits: "fit/variant" -> name -> hash."""
    torch.set_num_threads(1)
    fits: dict[str, dict[str, str]] = {}
    for name in names:
        begun = time.perf_counter()
        for variant, hashes in FITS[name]():
            fits[f"{name}/{variant}"] = dict(sorted(hashes.by_name.items()))
        print(f"{name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    return fits


def differences(here: Mapping[str, Mapping[str, str]], there: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for every hash that is not the same in both, or that only one has."""
    lines = []
    for fit in sorted({*here, *there}):
        ours, theirs = here.get(fit, {}), there.get(fit, {})
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                lines.append(f"{fit}: {name}: {ours.get(name, 'missing')} here, {theirs.get(name, 'missing')} there")
    return lines


def main() -> None:
    """The command line; the exit status is 1 where a comparison finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FITS), default=list(FITS), help="fits to run (all)")
    parser.add_argument("--output", type=Path, help="JSON file to write; without it, standard output")
    parser.add_argument("--compare", type=Path, help="JSON file of another version, to compare with")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    here = compute(args.only)
    text = json.dumps(here, indent=1, sort_keys=True) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    elif not args.compare:
        print(text, end="")
    if args.compare:
        there = json.loads(args.compare.read_text(encoding="utf-8"))
        there = {fit: hashes for fit, hashes in there.items() if fit.partition("/")[0] in args.only}
        lines = differences(here, there)
        total = sum(len(hashes) for hashes in here.values())
        print("\n".join(lines or [f"All {total} hashes of {len(here)} fits are the same."]))
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
