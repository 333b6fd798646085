"""A filter in Lightning's loop: as ``fit``, on one and several processes, with checkpoints, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf

lightning = pytest.importorskip("lightning")
from bayes_kf.integrations.lightning import KalmanModule  # noqa: E402 (after the skip)

SCRIPT = Path(__file__).parents[2] / "docs" / "how-to" / "lightning_fit.py"
CONFIG = bkf.KalmanConfig(rank=4)
X = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # in Lightning
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


class Named(nn.Module):
    """A model with keyword arguments and logits."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x)


def loader(first=0, last=70, shuffle=False, size=16):
    return DataLoader(TensorDataset(X[first:last], Y[first:last]), batch_size=size, shuffle=shuffle)


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **settings)


@pytest.mark.parametrize("size", [16, 20, 64])
def test_an_epoch_is_a_pass_of_fit(size):
    module, run = KalmanModule(network(), CONFIG), trainer(max_epochs=1)
    run.fit(module, loader(size=size))
    expected = bkf.fit(network(), loader(size=size), CONFIG, progress=False)
    assert run.global_step == expected.state.step
    for found, wanted in zip(module.posterior.state.belief, expected.state.belief, strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(module.posterior.adapter.vector(), expected.mean_vector, rtol=0, atol=1e-7)


def test_mappings_are_taken():
    batches = DataLoader([{"x": x, "labels": y} for x, y in zip(X[:64], Y[:64], strict=True)], batch_size=16)
    module = KalmanModule(Named(), CONFIG)
    trainer(max_epochs=1).fit(module, batches)
    expected = bkf.fit(Named(), batches, CONFIG, progress=False)
    assert torch.equal(module.posterior.mean_vector, expected.mean_vector)


def test_later_epochs_move_the_mean_and_validation_sets_size_and_sharpness():
    module, run = KalmanModule(network()), trainer(max_epochs=3)
    run.fit(module, loader(), loader(70, 100))
    assert module.posterior.state.examples == 70
    assert module.posterior.state.step == 5
    assert {"size", "sharpness"} <= set(module.posterior.history)
    assert float(run.callback_metrics["val_accuracy"]) > 0.8
    (scores,) = run.test(module, loader(70, 100), verbose=False)
    own = module.posterior.predict_loader(loader(70, 100))
    assert scores["test_log_loss"] == pytest.approx(-float(own.log_prob.mean()), abs=0.02)  # other draws a batch
    predicted = run.predict(module, loader(70, 100))
    assert [len(batch["probs"]) for batch in predicted] == [16, 14]
    for batch in predicted:
        torch.testing.assert_close(batch["entropy"] - batch["aleatoric"], batch["epistemic"])
    inputs = X[70:86]
    torch.testing.assert_close(predicted[0]["probs"], module.posterior.predict(inputs).probs)


def test_a_given_temperature_is_kept():
    module = KalmanModule(network(), bkf.KalmanConfig(rank=4, temperature=0.5))
    trainer(max_epochs=1).fit(module, loader(), loader(70, 100))
    assert module.posterior.temperature == 0.5
    assert "sharpness" not in module.posterior.history


class Stop(lightning.Callback):
    """Ends training with an error before a batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            raise OSError("the machine is off")


def test_a_stopped_pass_resumes_to_the_bit(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="the machine is off"):
        trainer(max_epochs=1, callbacks=[Stop()]).fit(
            KalmanModule(network(), CONFIG, checkpoint=tmp_path, every=2), loader()
        )
    assert bkf.Posterior.from_pretrained(tmp_path, network()).state.step == 3  # saved when it was stopped
    module = KalmanModule(network(), CONFIG, checkpoint=tmp_path, every=2)
    with pytest.raises(ValueError, match=r"must yield the batches of the pass in .* with 48 examples, got 24"):
        trainer(max_epochs=1).fit(module, loader(size=8))
    with pytest.raises(ValueError, match=r"must yield the batches of the pass in .* with 48 examples, got 20"):
        trainer(max_epochs=1).fit(module, loader(0, 20))
    trainer(max_epochs=1).fit(module, loader())
    whole = KalmanModule(network(), CONFIG)
    trainer(max_epochs=1).fit(whole, loader())
    assert torch.equal(module.posterior.mean_vector, whole.posterior.mean_vector)
    saved = bkf.Posterior.from_pretrained(tmp_path, network())
    assert torch.equal(saved.variance_vector, whole.posterior.variance_vector)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_whole_pass_is_not_sized_again(tmp_path):
    first, again = (KalmanModule(network(), CONFIG, checkpoint=tmp_path / "pass") for _ in range(2))
    trainer(max_epochs=1).fit(first, loader(), loader(70, 100))
    trainer(max_epochs=1).fit(again, loader(), loader(70, 100))
    assert "size" in first.posterior.history
    assert torch.equal(again.posterior.variance_vector, first.posterior.variance_vector)
    assert again.posterior.config == first.posterior.config


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`kalman` must be a KalmanConfig or None, got dict"):
        KalmanModule(network(), {})
    with pytest.raises(ValueError, match="`method` must be one of"):
        KalmanModule(network(), method="dreamt")
    module = KalmanModule(network(), CONFIG)
    with pytest.raises(ValueError, match="`posterior` needs a trainer that has trained"):
        _ = module.posterior
    data = loader()
    trainer(max_epochs=1).fit(module, data)
    before = module.posterior.mean_vector.clone()
    with pytest.raises(ValueError, match="the training loader must be a new one to continue training"):
        trainer(max_epochs=1).fit(module, data)
    with pytest.raises(ValueError, match="`max_epochs` must be 1 with a second loader, got 2"):
        trainer(max_epochs=2).fit(module, loader(70, 100))
    assert torch.equal(module.posterior.mean_vector, before)
    with pytest.raises(ValueError, match="`max_epochs` must be 1 with a `checkpoint`, got 2"):
        trainer(max_epochs=2).fit(KalmanModule(network(), CONFIG, checkpoint=tmp_path / "new"), loader())
    assert not (tmp_path / "new").exists()
    sampled = DataLoader(
        TensorDataset(X, Y), 16, sampler=torch.utils.data.DistributedSampler(X, num_replicas=2, rank=0)
    )
    with pytest.raises(ValueError, match="`Trainer` must have use_distributed_sampler=False"):
        trainer(max_epochs=1).fit(KalmanModule(network(), CONFIG), sampled)
    with pytest.raises(ValueError, match="`Trainer` must have use_distributed_sampler=False"):
        trainer().test(module, sampled)
    with pytest.raises(ValueError, match="`max_epochs` must be 1 or more for a KalmanModule, got -1"):
        trainer(max_epochs=-1, max_steps=3).fit(KalmanModule(network(), CONFIG), loader())
    with pytest.raises(ValueError, match="`max_epochs` must be 1 with these settings"):
        trainer(max_epochs=2).fit(KalmanModule(network(), bkf.KalmanConfig(forgetting=0.99)), loader())
    with pytest.raises(ValueError, match="must yield the same order in every call with a `checkpoint`"):
        trainer(max_epochs=1).fit(KalmanModule(network(), CONFIG, checkpoint=tmp_path / "new"), loader(shuffle=True))
    with pytest.raises(ValueError, match="must yield targets with every batch"):
        trainer(max_epochs=1).fit(KalmanModule(network(), CONFIG), DataLoader(X))


def test_lightnings_checkpoints_have_the_mean_alone_and_do_not_resume(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    module = KalmanModule(model, CONFIG)
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {"model.2.weight", "model.2.bias"}
    with pytest.raises(ValueError, match="`ckpt_path` must be None for a KalmanModule"):
        trainer(max_epochs=1).fit(KalmanModule(network(), CONFIG), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_the_guides_script_ends_alike_on_one_and_two_processes(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, launcher in {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }.items():
        command = [sys.executable, *launcher, str(SCRIPT), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "test_accuracy" in done.stdout
    from bayes_kf.models.zoo import lora_digits_vit

    one, two = (bkf.Posterior.from_pretrained(tmp_path / name, lora_digits_vit(rank=4)) for name in ("one", "two"))
    for found, wanted in [(two.mean_vector, one.mean_vector), (two.variance_vector, one.variance_vector)]:
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5  # float32 over two epochs


def test_forked_processes_are_refused():
    run = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False, max_epochs=1
    )
    module = KalmanModule(network(), CONFIG)
    with pytest.raises(Exception, match='must be one device or "ddp" for a KalmanModule, got DDPStrategy'):
        run.fit(module, loader())


def test_steps_are_counted_and_stop():
    module, run = KalmanModule(network(), CONFIG), trainer(max_epochs=5, max_steps=7)
    run.fit(module, loader())
    assert run.global_step == 7
    assert module.posterior.state.step == 5  # the others moved the mean


def test_estimated_noise_is_refitted_at_the_mean_of_later_epochs():
    targets = X @ torch.randn(6, 1, generator=torch.Generator().manual_seed(2)) + 0.5 * torch.randn(
        100, 1, generator=torch.Generator().manual_seed(3)
    )
    data = DataLoader(TensorDataset(X[:80], targets[:80]), batch_size=16)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated", rank=8)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    module = KalmanModule(model, config)
    trainer(max_epochs=4).fit(module, data)
    with torch.no_grad():
        error = float((model(X[:80]) - targets[:80]).square().mean())
    assert 0.5 * error < float(module.posterior.state.noise.variance) < 2.5 * error


def test_several_validation_loaders_and_limits_are_read():
    module = KalmanModule(network())
    trainer(max_epochs=1, limit_val_batches=1).fit(module, loader(), [loader(70, 90), loader(90, 100)])
    assert "sharpness" in module.posterior.history


def test_texts_whose_tokens_are_learned_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, num_key_value_heads=2, **small))
    ids = torch.randint(9, (8, 5), generator=torch.Generator().manual_seed(0))
    data = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    with pytest.raises(ValueError, match="`model` must not learn tokens in a KalmanModule"):
        trainer(max_epochs=1).fit(KalmanModule(model), data)
