"""The package on a GPU: the same posteriors as on the CPU, autocast, 4 bits, compiled models, text, two processes.

BAYES_KF_DEVICE=cpu runs them on the CPU, to try the tests themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import language_models as lm
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig

import bayes_kf as bkf
from bayes_kf.inference.covariance.structure import STRUCTURES
from bayes_kf.models.language import OptionTokens

DEVICE = torch.device(os.environ.get("BAYES_KF_DEVICE", "cuda"))
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X @ torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).argmax(1)
BATCHES = list(zip(X.split(12), Y.split(12), strict=True))
IDS = torch.randint(1, 30, (48, 7), generator=torch.Generator().manual_seed(2))
LABELS = IDS[:, 0] % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def bert(dtype=torch.float32):
    """A small BERT with LoRA and a new head."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **small)).to(dtype)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])).eval()


def texts():
    return [{"input_ids": ids, "labels": y} for ids, y in zip(IDS.split(8), LABELS.split(8), strict=True)]


@pytest.mark.parametrize("covariance", sorted(STRUCTURES))
@pytest.mark.parametrize("curvature", ["exact", "truncated", "sampled"])
def test_a_pass_ends_as_on_the_cpu(covariance, curvature):
    config = bkf.KalmanConfig(covariance=covariance, curvature=curvature, rank=8, curvature_classes=3)
    expected = bkf.fit(network(), BATCHES, config, progress=False)
    found = bkf.fit(network().to(DEVICE), BATCHES, config, progress=False)
    assert {t.device.type for t in (found.mean_vector, found.variance_vector)} == {DEVICE.type}
    if curvature == "sampled":  # the draws of a GPU are others
        assert torch.isfinite(found.mean_vector).all()
        return
    torch.testing.assert_close(found.mean_vector.cpu(), expected.mean_vector, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.variance_vector.cpu(), expected.variance_vector, rtol=1e-6, atol=1e-8)
    here, there = found.predict(X[:20], method="probit"), expected.predict(X[:20], method="probit")
    torch.testing.assert_close(here.probs.cpu(), there.probs, rtol=1e-6, atol=1e-8)


def test_the_default_fit_predicts_calibrates_and_moves_to_the_cpu(tmp_path):
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    posterior = bkf.fit(network().to(DEVICE), loader, progress=False)
    for method in ("linearized", "sampled", "mean"):
        probs = posterior.predict(X[:30], method=method).probs
        assert probs.device.type == DEVICE.type
        assert bool(torch.isfinite(probs).all())
    posterior = posterior.calibrate(BATCHES[:5])
    posterior.save_pretrained(tmp_path)
    loaded = bkf.Posterior.from_pretrained(tmp_path, network())
    here, there = (p.predict(X[:30], method="mean").probs.cpu() for p in (posterior, loaded))
    torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-10)
    accuracy = (posterior.predict_loader(BATCHES).probs.argmax(1) == Y).double().mean()
    assert accuracy > 0.8


def test_a_peft_model_in_single_precision_is_near_the_cpus():
    config = bkf.KalmanConfig(rank=8, initial_logit_sd=1.0)
    expected = bkf.fit(bert(), texts(), config, progress=False)
    found = bkf.fit(bert().to(DEVICE), texts(), config, progress=False)
    error = (found.mean_vector.cpu() - expected.mean_vector).norm() / expected.mean_vector.norm()
    assert error < 1e-3


def test_autocast_in_bfloat16():
    plain = bkf.fit(bert().to(DEVICE), texts(), bkf.KalmanConfig(rank=8, initial_logit_sd=1.0), progress=False)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        rounded = bkf.fit(bert().to(DEVICE), texts(), bkf.KalmanConfig(rank=8, initial_logit_sd=1.0), progress=False)
        probs = rounded.predict({"input_ids": IDS}).probs
    assert rounded.mean_vector.dtype == torch.float32
    expected = plain.predict({"input_ids": IDS}).probs
    assert (probs - expected).abs().mean() < 0.05


def test_a_base_of_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **small)).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    base = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, quantization_config=four, device_map={"": DEVICE}
    )
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    posterior = bkf.fit(model, texts(), bkf.KalmanConfig(rank=8), progress=False)
    assert posterior.state.examples == len(IDS)
    assert bool(torch.isfinite(posterior.predict({"input_ids": IDS[:9]}).probs).all())


def test_a_compiled_base():
    config = bkf.KalmanConfig(covariance="diagonal")
    expected = bkf.fit(network().to(DEVICE), BATCHES, config, progress=False)
    found = bkf.fit(torch.compile(network().to(DEVICE)), BATCHES, config, progress=False)
    torch.testing.assert_close(found.mean_vector, expected.mean_vector, rtol=1e-6, atol=1e-8)


def test_a_language_model_learns_answers_and_writes():
    asked = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(lm.base(), asked).to(DEVICE)
    ids = torch.stack([lm.ids(text) for text in ("the cat sat", "a dog ran i", "to be or no", "it is what ")] * 2)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(2)]
    posterior = bkf.fit(model, batches, bkf.KalmanConfig(likelihood="tokens", curvature="sampled"), progress=False)
    assert posterior.state.examples == 8
    asked = posterior.with_adapter(OptionTokens(model, [4, 5]))
    assert asked.predict({"input_ids": ids[:3]}).probs.shape == (3, 2)
    written = posterior.generate({"input_ids": ids[:1].to(DEVICE)}, max_new_tokens=3)
    assert written.tokens.shape == (1, 3)


def test_two_processes_on_this_machine(tmp_path):
    """Shared work over NCCL, which wants a GPU for each process."""
    if DEVICE.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each process, and there is one")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "import bayes_kf as bkf\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda as given\n"
        "device = torch.device(given.DEVICE.type, int(os.environ.get('LOCAL_RANK', 0)) if given.DEVICE.type == 'cuda'"
        " else None)\n"
        "posterior = bkf.fit(given.network().to(device), given.BATCHES, bkf.KalmanConfig(), progress=False)\n"
        "posterior.save_pretrained(sys.argv[1])\n",
        encoding="utf-8",
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    expected = bkf.fit(network().to(DEVICE), BATCHES, bkf.KalmanConfig(), progress=False)
    found = bkf.Posterior.from_pretrained(tmp_path / "out", network())
    torch.testing.assert_close(found.mean_vector, expected.mean_vector.cpu(), rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*", "ignore:The 'train_dataloader' does not have many"
)
@pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many")
def test_a_posterior_of_lightning_follows_the_model_to_the_cpu():
    """Lightning moves the module to the CPU after training."""
    lightning = pytest.importorskip("lightning")
    from bayes_kf.integrations.lightning import KalmanModule

    module = KalmanModule(network().float())
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="gpu" if DEVICE.type == "cuda" else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(X.float(), Y)
    trainer.fit(module, DataLoader(data, batch_size=12), DataLoader(data, batch_size=60))
    device = module.posterior.adapter.device
    assert module.posterior.mean_vector.device == device
    assert module.posterior.predict(X.float().to(device)).probs.argmax(1).cpu().eq(Y).double().mean() > 0.7
    trainer.test(module, DataLoader(data, batch_size=60), verbose=False)
