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


def loader(first=0, last=70, shuffle=False):
    return DataLoader(TensorDataset(X[first:last], Y[first:last]), batch_size=16, shuffle=shuffle)


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **settings)


def test_an_epoch_is_a_pass_of_fit():
    module = KalmanModule(network(), CONFIG)
    trainer(max_epochs=1).fit(module, loader())
    expected = bkf.fit(network(), loader(), CONFIG, progress=False)
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
    assert bkf.Posterior.from_pretrained(tmp_path, network()).state.step == 2
    module = KalmanModule(network(), CONFIG, checkpoint=tmp_path, every=2)
    trainer(max_epochs=1).fit(module, loader())
    whole = KalmanModule(network(), CONFIG)
    trainer(max_epochs=1).fit(whole, loader())
    assert torch.equal(module.posterior.mean_vector, whole.posterior.mean_vector)
    saved = bkf.Posterior.from_pretrained(tmp_path, network())
    assert torch.equal(saved.variance_vector, whole.posterior.variance_vector)
    assert (tmp_path / "notes.txt").read_text() == "mine"


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
