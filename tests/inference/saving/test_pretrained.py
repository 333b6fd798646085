"""Saved posteriors: read back bit for bit, refused if damaged, and exported draws."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_problems import X, linear, loader
from torch import nn

import bayes_kf as bkf
from bayes_kf.models.zoo import digits_vit, lora_digits_vit


def test_saved_posterior_reads_back_bit_for_bit(fitted, digits, tmp_path):
    fitted.save_pretrained(tmp_path / "posterior")
    assert {p.name for p in (tmp_path / "posterior").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "kalman_config.json", "kalman_state.safetensors",
        "README.md", "SHA256SUMS",
    }  # fmt: skip
    images, labels = digits[1].images[:20], digits[1].labels[:20]
    for base in (digits_vit(), lora_digits_vit(rank=2)):
        again = bkf.Posterior.from_pretrained(tmp_path / "posterior", base)
        assert again.config == fitted.config
        assert torch.equal(again.predict(images).probs, fitted.predict(images).probs)
        assert all(torch.equal(again.history[k], fitted.history[k]) for k in fitted.history)
        after, _ = again.filter().update(again.state, images, labels)
        expected, _ = fitted.filter().update(fitted.state, images, labels)
        assert torch.equal(after.belief.mean, expected.belief.mean)
    plain = PeftModel.from_pretrained(digits_vit(), str(tmp_path / "posterior")).eval()  # without this package
    with torch.no_grad():
        torch.testing.assert_close(plain(images).logits.softmax(-1), fitted.predict(images, "mean").probs)
    fitted.save_pretrained(tmp_path / "posterior")  # replaces
    assert sorted(p.name for p in tmp_path.iterdir()) == ["posterior"]


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "full"])
def test_plain_modules_and_every_state_read_back(covariance, tmp_path):
    config = bkf.KalmanConfig(likelihood="gaussian", covariance=covariance, noise_variance="estimated")
    posterior = bkf.fit(linear(), loader(), config, progress=False)
    posterior.save_pretrained(tmp_path / "p")
    again = bkf.Posterior.from_pretrained(tmp_path / "p", linear(seed=5))
    assert torch.equal(again.predict(X).variance, posterior.predict(X).variance)
    assert torch.equal(load_file(tmp_path / "p" / "model.safetensors")["weight"], posterior.mean["weight"])


def test_damaged_folders_and_other_bases_are_refused_and_nothing_changes(fitted, tmp_path):
    folder = tmp_path / "p"
    fitted.save_pretrained(folder)
    other = digits_vit(pretrained=False, seed=1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"`base_model` must be the model that .* was fitted on"):
        bkf.Posterior.from_pretrained(folder, other)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    state = folder / "kalman_state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"`folder` must hold a readable kalman_state\.safetensors"):
        bkf.Posterior.from_pretrained(folder, digits_vit())
    save_file({"belief.mean": torch.zeros(2)}, state, metadata={"bayes_kf": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match=r"`folder` must be of format 1, got 99"):
        bkf.Posterior.from_pretrained(folder, digits_vit())
    (folder / "kalman_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"`folder` must hold a readable kalman_config\.json"):
        bkf.Posterior.from_pretrained(folder, digits_vit())
    with pytest.raises(ValueError, match=r"readable kalman_config\.json, got .*nowhere"):
        bkf.Posterior.from_pretrained(tmp_path / "nowhere", digits_vit())


def test_other_files_stay_beside_a_posterior(fitted, tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    for _ in range(2):
        fitted.save_pretrained(tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "all my work"
    (tmp_path / "empty").mkdir()
    fitted.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_model.safetensors").stat().st_mode & 0o077 == 0o044


def test_a_failed_save_keeps_the_old_folder(fitted, tmp_path, monkeypatch):
    fitted.save_pretrained(tmp_path / "p")
    from bayes_kf.inference.saving import state_file

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(state_file, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        fitted.save_pretrained(tmp_path / "p")
    monkeypatch.undo()
    bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_exported_draws_are_ordinary_adapters(fitted, digits, tmp_path):
    folders = fitted.export_adapters(tmp_path / "draws", num_samples=2, generator=torch.Generator().manual_seed(5))
    draws = fitted.sample(2, torch.Generator().manual_seed(5))
    images = digits[1].images[:5]
    for folder, draw in zip(folders, draws, strict=True):
        model = PeftModel.from_pretrained(digits_vit(), str(folder)).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, fitted.adapter.outputs(draw, images), rtol=1e-4, atol=1e-4)


def test_adapters_of_other_names_read_back(tmp_path, digits):
    images, labels = digits[0].images[:8], digits[0].labels[:8]
    model = get_peft_model(digits_vit(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    posterior = bkf.fit(model, [(images, labels)], progress=False)
    posterior.save_pretrained(tmp_path / "p")
    again = bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())
    assert again.adapter.names == posterior.adapter.names
    assert torch.equal(again.predict(images).probs, posterior.predict(images).probs)
    folders = posterior.export_adapters(tmp_path / "draws", 2)
    PeftModel.from_pretrained(digits_vit(), str(folders[0]))


def test_trainable_biases_read_back(tmp_path, digits):
    images, labels = digits[0].images[:8], digits[0].labels[:8]
    model = get_peft_model(digits_vit(), LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    posterior = bkf.fit(model, [(images, labels)], progress=False)
    posterior.save_pretrained(tmp_path / "p")
    again = bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())
    torch.testing.assert_close(again.predict(images).probs, posterior.predict(images).probs)


def test_loading_changes_no_weights_and_names_a_damaged_adapter(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "p")
    ready = lora_digits_vit(rank=2)
    before = {k: v.clone() for k, v in ready.state_dict().items()}
    bkf.Posterior.from_pretrained(tmp_path / "p", ready)
    assert all(torch.equal(before[k], v) for k, v in ready.state_dict().items())
    file = tmp_path / "p" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    base = digits_vit()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=r"`folder` must hold adapter_model\.safetensors as it was saved, got another"):
        bkf.Posterior.from_pretrained(tmp_path / "p", base)
    (tmp_path / "p" / "SHA256SUMS").unlink()  # as in folders of earlier versions
    with pytest.raises(ValueError, match=r"`folder` must hold a readable adapter_model\.safetensors"):
        bkf.Posterior.from_pretrained(tmp_path / "p", base)
    assert list(base.state_dict()) == names


def test_an_adapter_of_another_scale_is_refused(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "p")
    other = lora_digits_vit(rank=2)
    other.peft_config["default"].lora_alpha = 64
    with pytest.raises(
        ValueError, match="`base_model` must have an adapter with lora_alpha 2 as it was fitted, got 64"
    ):
        bkf.Posterior.from_pretrained(tmp_path / "p", other)
    path = tmp_path / "p" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 2', '"lora_alpha": 3'))
    with pytest.raises(ValueError, match=r"`folder` must hold an adapter_config\.json with lora_alpha 2 as it was"):
        bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())


def test_other_adapters_are_not_overwritten(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=0.1))
    posterior = bkf.Posterior(kf, kf.init())
    for name in ("sst2_run", "draw_0"):
        model.save_pretrained(tmp_path / "mine" / name)
    kept = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"got adapter_model\.safetensors \(not written by bayes_kf\) in .*sst2_run"):
        posterior.save_pretrained(tmp_path / "mine" / "sst2_run")
    with pytest.raises(
        ValueError, match=r"got draw_0/adapter_config\.json \(not written by bayes_kf\), draw_0/adapter_"
    ):
        posterior.export_adapters(tmp_path / "mine", 2)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == kept
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["draw_0", "sst2_run"]
    posterior.save_pretrained(tmp_path / "mine")
    assert (
        kept.items() <= {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}.items()
    )
    posterior.export_adapters(tmp_path / "draws", 3)
    assert len(posterior.export_adapters(tmp_path / "draws", 2)) == 2  # draws make way for draws
    written = sorted(path.name for path in (tmp_path / "draws").iterdir())
    assert written == ["SHA256SUMS.draws", "draw_0", "draw_1", "draws.json"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig(initial_variance=0.1))
    posterior = bkf.Posterior(kf, kf.init())
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        posterior.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "kalman_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
