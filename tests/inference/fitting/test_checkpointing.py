"""A pass that is stopped and goes on is the pass that was never stopped, to the bit."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.models.language import OptionTokens

G = torch.Generator().manual_seed(0)
DATA = [(torch.randn(3, 4, generator=G), torch.randint(3, (3,), generator=G)) for _ in range(40)]
SETTINGS = {
    "low_rank": bkf.KalmanConfig(rank=5, forgetting=0.99, drift_variance=1e-4),
    "diagonal": bkf.KalmanConfig(covariance="diagonal", noise="ema_taylor"),
    "diagonal_information": bkf.KalmanConfig(covariance="diagonal_information"),
    "diagonal_mixed": bkf.KalmanConfig(covariance="diagonal_mixed", prior_pull=0.01),
    "block_diagonal": bkf.KalmanConfig(covariance="block_diagonal"),
    "full": bkf.KalmanConfig(covariance="full", gate_quantile=0.95),
    "sampled": bkf.KalmanConfig(curvature="sampled", gradient_penalty=0.1),
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def stopping(after, error=KeyboardInterrupt):
    yield from DATA[:after]
    raise error


def same(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first.state.belief, second.state.belief, strict=True))
    assert torch.equal(first.state.temperature_scores.total, second.state.temperature_scores.total)
    assert (first.state.step, first.state.examples) == (second.state.step, second.state.examples)
    for name in ("log_loss", "correct", "innovation"):
        assert torch.equal(first.history[name], second.history[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_pass_stopped_twice_ends_like_an_uninterrupted_one(name, tmp_path):
    config, folder = SETTINGS[name], tmp_path / "pass"
    whole = bkf.fit(network(), DATA, config, progress=False)
    model = network()
    before = [p.clone() for p in model.parameters()]
    for after in (13, 27):
        with pytest.raises(KeyboardInterrupt):
            bkf.fit(model, stopping(after), config, checkpoint=folder, every=5, progress=False)
        assert bkf.Posterior.from_pretrained(folder, network()).state.step == after
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    actual = bkf.fit(network(), DATA, config, checkpoint=folder, progress=False)
    same(actual, whole)
    same(bkf.Posterior.from_pretrained(folder, network()), whole)
    written = (folder / "kalman_state.safetensors").stat().st_mtime_ns
    same(bkf.fit(network(), DATA, config, checkpoint=folder, progress=False), whole)  # nothing left to learn
    assert (folder / "kalman_state.safetensors").stat().st_mtime_ns == written


def test_a_bad_batch_leaves_a_checkpoint_of_the_updates_before_it(tmp_path):
    bad = [*DATA[:7], (DATA[7][0], torch.tensor([0, 1, 9])), *DATA[8:]]
    with pytest.raises(ValueError, match=r"`targets` must .* \(batch 7 of `loader`\)"):
        bkf.fit(network(), bad, bkf.KalmanConfig(), checkpoint=tmp_path / "pass", every=5, progress=False)
    assert bkf.Posterior.from_pretrained(tmp_path / "pass", network()).state.step == 7
    actual = bkf.fit(network(), DATA, bkf.KalmanConfig(), checkpoint=tmp_path / "pass", progress=False)
    same(actual, bkf.fit(network(), DATA, bkf.KalmanConfig(), progress=False))


def test_adapters_of_language_models_resume(tmp_path):
    import language_models as lm

    read = [OptionTokens(lm.llama(), [3, 7]) for _ in range(3)]
    data = [({"input_ids": torch.randint(1, 50, (2, 6), generator=G)}, torch.tensor([0, 1])) for _ in range(6)]
    whole = bkf.fit(read[0], data, bkf.KalmanConfig(), progress=False)
    bkf.fit(read[1], data[:4], bkf.KalmanConfig(), checkpoint=tmp_path / "pass", progress=False)
    actual = bkf.fit(read[2], data, bkf.KalmanConfig(), checkpoint=tmp_path / "pass", progress=False)
    same(actual, whole)
    assert torch.equal(actual.predict(data[0][0]).probs, whole.predict(data[0][0]).probs)


def test_another_pass_another_model_or_foreign_files_raise(tmp_path):
    folder, config = tmp_path / "pass", bkf.KalmanConfig()
    bkf.fit(network(), DATA[:10], config, checkpoint=folder, progress=False)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    cases = [
        (
            DATA,
            bkf.KalmanConfig(rank=7),
            folder,
            r"`checkpoint` must hold a pass with the same settings, got another rank",
        ),
        (DATA[:4], config, folder, r"`loader` must yield the 10 batches of the pass in .*pass, got 4"),
        ([DATA[0]] * 9 + [(DATA[0][0][:1], DATA[0][1][:1])], config, folder, r"with 30 examples, got 28"),
        (DATA, bkf.KalmanConfig(passes=2), folder, r"`passes` must be 1 with a `checkpoint`, got 2"),
        (DATA, bkf.KalmanConfig.dataset(), folder, r"`mean_passes` must be 0 with a `checkpoint`, got 3"),
        (DATA, bkf.KalmanConfig.stream(), folder, r"`tune` must be None with a `checkpoint`"),
        (DATA, [config, config], folder, r"`config` must be one KalmanConfig with a `checkpoint`, got several"),
        ([], config, tmp_path / "new", r"^`loader` must yield at least one batch, got none\.$"),
    ]
    for loader, setting, where, message in cases:
        with pytest.raises(ValueError, match=message):
            bkf.fit(network(), loader, setting, checkpoint=where, progress=False)
    other = network()
    with torch.no_grad():
        other[0].weight.requires_grad_(False).add_(1.0)
    with pytest.raises(ValueError, match=r"`folder` must hold adapter_config"):
        bkf.fit(other, DATA, config, checkpoint=folder, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("keep")
    with pytest.raises(ValueError, match=r"got model\.safetensors \(not written by bayes_kf\) in .*mine"):  # at once
        bkf.fit(network(), stopping(0), config, checkpoint=tmp_path / "mine", progress=False)
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["keep"]
    with pytest.raises(ValueError, match=r"`every` must be a whole number >= 1, got 0"):
        bkf.fit(network(), DATA, config, checkpoint=tmp_path / "new", every=0, progress=False)
    with pytest.raises(ValueError, match=r"`start` must be 'prior' with a `checkpoint`, got 'trained'"):
        bkf.fit(network(), DATA, config, start="trained", checkpoint=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_hundred_updates_after_loading_equal_uninterrupted_ones(name, tmp_path):
    g = torch.Generator().manual_seed(2)
    batches = [(torch.randn(2, 4, generator=g), torch.randint(3, (2,), generator=g)) for _ in range(120)]
    kf = bkf.KalmanFilter(network(), SETTINGS[name])
    state = kf.init(batches[0][0])
    for x, y in batches[:20]:
        state, _ = kf.update(state, x, y)
    bkf.Posterior(kf, state).save_pretrained(tmp_path / "posterior")
    other = network()
    with torch.no_grad():
        [p.add_(1.0) for p in other.parameters()]  # whatever a plain module holds, the folder decides
    loaded = bkf.Posterior.from_pretrained(tmp_path / "posterior", other)
    again, kf_again = loaded.state, loaded.filter()
    for x, y in batches[20:]:
        state, info = kf.update(state, x, y)
        again, info_again = kf_again.update(again, x, y)
        assert torch.equal(info.log_loss, info_again.log_loss)
    assert all(torch.equal(a, b) for a, b in zip(state.belief, again.belief, strict=True))
    assert torch.equal(state.temperature_scores.total, again.temperature_scores.total)
    assert state.step == again.step == 120


def test_a_loader_that_shuffles_without_a_generator_raises(tmp_path):
    data = TensorDataset(torch.cat([x for x, _ in DATA]), torch.cat([y for _, y in DATA]))
    config = bkf.KalmanConfig()
    loader = DataLoader(data, batch_size=3, shuffle=True)
    with pytest.raises(ValueError, match=r"`loader` must yield the same order in every call .* give it `generator="):
        bkf.fit(network(), loader, config, checkpoint=tmp_path / "pass", progress=False)
    assert not (tmp_path / "pass").exists()
    loader = DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    actual = bkf.fit(network(), loader, config, checkpoint=tmp_path / "pass", progress=False)
    assert actual.state.examples == len(data)
