"""The model card of a saved posterior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayes_kf.inference.predictive.gaussian_posterior import GaussianPosterior
from bayes_kf.models.peft_adapters.in_use import is_peft

TAGS = ["bayes_kf", "uncertainty", "calibration", "kalman-filter"]
SCORES = {
    "accuracy": "accuracy",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "crps": "CRPS",
}
SETTINGS = ("likelihood", "covariance", "noise", "curvature", "initial_logit_sd", "forgetting", "drift_variance")

LOADING = """## Use

```python
import bayes_kf as bkf

posterior = bkf.Posterior.from_pretrained("{folder}", base_model)
prediction = posterior.predict(inputs)  # .probs .entropy .aleatoric .epistemic
```
"""
ADAPTER = """
The posterior mean alone is an ordinary PEFT adapter: `PeftModel.from_pretrained(base_model, "{folder}")`.
"""


def text(
    posterior: GaussianPosterior, folder: str, scores: Mapping[str, float] | None = None, num_members: int = 1
) -> str:
    """The card in Markdown, with the metadata that the Hub reads.

    Args:
        posterior: the saved posterior.
        folder: name of its folder, for the code example.
        scores: of an evaluation, as ``Report.scores``; intervals and null bands are shown for those that have them.
        num_members: of the mixture whose best member the posterior is; 1 if there is no mixture.
    """
    from huggingface_hub import ModelCardData

    base, of_peft = _base_name(posterior), is_peft(posterior.adapter.model)
    data = ModelCardData(
        library_name="peft" if of_peft else "bayes_kf", base_model=base, tags=TAGS + (["lora"] if of_peft else [])
    )
    lines = [
        "---",
        data.to_yaml().strip(),
        "---",
        "",
        f"# A posterior over {posterior.adapter.num_parameters:,} adapter parameters",
        "",
        _summary(posterior, base, num_members),
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {getattr(posterior.config, name)} |" for name in SETTINGS),
        "",
    ]
    if scores:
        lines += ["## Scores", "", *_table(scores), ""]
    lines += [LOADING.format(folder=folder)]
    return "\n".join(lines) + (ADAPTER.format(folder=folder) if of_peft else "")


def _summary(posterior: GaussianPosterior, base: str | None, num_members: int) -> str:
    """The first paragraph: base model, size of the data, members, temperatures, and warnings about the predictions."""
    model, state = f"`{base}`" if base else "a model", posterior.state
    sentences = [
        f"A Gaussian posterior over the trainable tensors of {model}, fitted with bayes_kf on "
        f"{state.examples:,} examples in {state.step:,} updates.",
        f"Its covariance is used at temperature {posterior.temperature:g}.",
    ]
    if num_members > 1:
        sentences.append(
            f"It is the best of {num_members} members of a mixture, which `bayes_kf` loads together; other programs "
            "see this member alone."
        )
    if posterior.softmax_temperature != 1.0:
        sentences.append(f"Logits are divided by {posterior.softmax_temperature:g} in predictions.")
    return " ".join([*sentences, *posterior.notes])


def _base_name(posterior: GaussianPosterior) -> str | None:
    """The base model's name on the Hub; None if it has none, or is a local folder."""
    config: Any = getattr(posterior.adapter.model, "peft_config", {})
    name = next((c.base_model_name_or_path for c in config.values()), None) if isinstance(config, dict) else None
    if not isinstance(name, str) or name in ("", "None") or Path(name).is_absolute() or name.count("/") > 1:
        return None
    return None if name.startswith((".", "~")) or "\\" in name or Path(name).exists() else name


def _table(scores: Mapping[str, float]) -> list[str]:
    """Main scores, their 95 % intervals and their null bands."""
    rows = []
    for name, title in SCORES.items():
        if name not in scores:
            continue
        band = [scores.get(f"{name}_{end}") for end in ("low", "high")]
        null_band = [scores.get(f"{name}_null_{end}") for end in ("low", "high")]
        rows.append(f"| {title} | {scores[name]:.4g} | {_range(band)} | {_range(null_band)} |")
    head = ["| score | value | 95 % interval | null band (perfect calibration) |", "| --- | --: | --- | --- |"]
    return [*head, *rows]


def _range(ends: list[float | None]) -> str:
    low, high = ends
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
