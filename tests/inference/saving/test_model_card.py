"""The model card in a saved folder."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import bayes_kf as bkf


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=2,
        )
    )


def lora(name):
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    model.peft_config["default"].base_model_name_or_path = name
    return model


def fitted(model, inputs):
    return bkf.fit(model, [(inputs, torch.tensor([0, 1, 1]))] * 4, bkf.KalmanConfig(), progress=False)


def test_a_module_has_a_card_with_its_scores_and_their_bands(tmp_path):
    inputs = torch.randn(3, 3)
    posterior = fitted(network(), inputs)
    report = bkf.evaluate(posterior, [(inputs.repeat(20, 1), torch.tensor([0, 1, 1]).repeat(20))], num_simulations=100)
    posterior.save_pretrained(tmp_path / "mine", report.scores)
    actual = ModelCard.load(tmp_path / "mine" / "README.md")
    assert actual.data.library_name == "bayes_kf"
    assert "lora" not in actual.data.tags
    assert "A posterior over 26 adapter parameters" in actual.text
    assert "12 examples in 4 updates" in actual.text
    scores = report.scores
    assert "ece_low" not in scores  # calibration errors have null bands, and no intervals
    ece = f"| expected calibration error | {scores['ece']:.4g} |  | "
    assert ece + f"{scores['ece_null_low']:.4g} to {scores['ece_null_high']:.4g} |" in actual.text
    accuracy = (
        f"| accuracy | {scores['accuracy']:.4g} | {scores['accuracy_low']:.4g} to {scores['accuracy_high']:.4g} |"
    )
    assert accuracy in actual.text
    assert "PeftModel" not in actual.text
    loaded = bkf.Posterior.from_pretrained(tmp_path / "mine", network())
    assert torch.equal(loaded.mean_vector, posterior.mean_vector)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/bert-mini", "google/bert-mini"),
        ("/home/someone/models/bert", None),
        ("./bert", None),
        ("C:\\bert", None),
        ("models/bert", None),
    ],
)
def test_an_adapter_card_names_its_base_but_no_local_folder(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    inputs = {"input_ids": torch.randint(30, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    posterior = fitted(lora(name), inputs)
    posterior.save_pretrained(tmp_path / "adapter")
    actual = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert actual.data.base_model == expected
    assert actual.data.library_name == "peft"
    assert "lora" in actual.data.tags
    assert "Scores" not in actual.text
    assert 'PeftModel.from_pretrained(base_model, "adapter")' in actual.text
    assert expected is not None or name not in actual.content
    plain = PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, posterior.adapter.outputs(posterior.mean_vector, inputs))
