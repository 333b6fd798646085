"""Folders that earlier versions wrote open, and their predictions are those of then.

``python tests/inference/saving/test_formats.py`` writes those of today's format; once released,
they are never written again.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import bayes_kf as bkf

FORMATS = Path(__file__).parents[2] / "formats"
CASES = {
    "low_rank": {"rank": 3},
    "diagonal": {"covariance": "diagonal"},
    "diagonal_information": {"covariance": "diagonal_information"},
    "diagonal_mixed": {"covariance": "diagonal_mixed"},
    "block_diagonal": {"covariance": "block_diagonal"},
    "full": {"covariance": "full"},
    "ema": {"covariance": "diagonal", "noise": "ema_taylor"},
    "gaussian": {"likelihood": "gaussian", "noise_variance": "estimated"},
    "lora": {"rank": 2},
}
FOLDERS = sorted(path.parent for path in FORMATS.glob("*/*/expected.json"))


def numbers(shape, step):
    """Numbers that are the same on every machine."""
    count = torch.Size(shape).numel()
    return torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64)).view(shape)


def filled(model):
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values(), 1):
            if tensor.is_floating_point():
                tensor.copy_(0.5 * numbers(tensor.shape, 0.7 + number))
    return model.double().eval()


def base(name):
    if name != "lora":
        return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    config = BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2,
        max_position_embeddings=8,
    )  # fmt: skip
    return filled(BertForSequenceClassification(config))


def inputs(name):
    if name != "lora":
        return numbers((6, 3), 1.3)
    ids = torch.arange(24).view(6, 4) % 12
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def targets(name):
    return numbers((6, 2), 0.4) if name == "gaussian" else torch.arange(6) % 2


def predicted(name, posterior):
    """Predictions without draws."""
    if name == "gaussian":
        actual = posterior.predict(inputs(name), method="mean", targets=targets(name))
        mean, log_prob = actual.mean, actual.log_prob
    else:
        linearized = posterior.kf.linearize(posterior.mean_vector, inputs(name))
        output_cov = posterior.state.belief.output_covariance(linearized.jacobian())
        variance = posterior.temperature * output_cov.diagonal(dim1=1, dim2=2)
        mean = (linearized.outputs / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)  # "probit" as version 1 had it
        log_prob = mean.gather(1, targets(name)[:, None])[:, 0].log()
    return {
        "mean": mean.tolist(),
        "log_prob": log_prob.tolist(),
        "variance": posterior.variance_vector.sum().item(),
        "temperature": posterior.temperature,
        "examples": posterior.state.examples,
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_folders_of_earlier_versions_open_and_predict_the_same(folder):
    name, expected = folder.name, json.loads((folder / "expected.json").read_text())
    posterior = bkf.Posterior.from_pretrained(folder / "posterior", base(name))
    actual = predicted(name, posterior)
    kept = torch.tensor(expected["mean"], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(actual["mean"], dtype=torch.float64), kept, rtol=1e-9, atol=1e-12)
    assert actual["log_prob"] == pytest.approx(expected["log_prob"], rel=1e-9)
    assert actual["variance"] == pytest.approx(expected["variance"], rel=1e-12)
    assert actual["temperature"] == expected["temperature"]
    assert actual["examples"] == expected["examples"] == 24
    after, info = posterior.kf.update(posterior.state, inputs(name), targets(name))  # and goes on
    assert after.examples == 30
    assert info.log_loss.mean() == pytest.approx(-sum(expected["next"]) / 6, rel=1e-9)


def test_every_case_has_a_folder():
    assert {path.name for path in FOLDERS if path.parent.name == "1"} == set(CASES)


def write():
    for name, setting in CASES.items():
        model = base(name)
        if name == "lora":
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=1, target_modules=["query"])).double()
            with torch.no_grad():
                for number, (key, tensor) in enumerate(model.named_parameters()):
                    if tensor.requires_grad:
                        tensor.copy_(0.3 * numbers(tensor.shape, 0.2 + number) if "lora" in key else tensor)
        data = [(inputs(name), targets(name))] * 4
        posterior = bkf.fit(model, data, bkf.KalmanConfig(**setting), progress=False)
        folder = FORMATS / "1" / name
        posterior.save_pretrained(folder / "posterior")
        kept = predicted(name, posterior)
        _, info = posterior.kf.update(posterior.state, inputs(name), targets(name))
        (folder / "expected.json").write_text(json.dumps(kept | {"next": (-info.log_loss).tolist()}) + "\n")


if __name__ == "__main__":
    write()
