"""The state of a guide in Pyro's parameter store: rolled back, saved without pickle, restored to the bit."""

import pyro
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.covariance.structure import STRUCTURES

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, generator=G), torch.randint(0, 3, (24,), generator=G)
NUMBERS = torch.randn(24, 2, generator=G)


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def tensors(guide):
    """Every number of the state, by name."""
    state = guide.state
    parts = {f"belief.{k}": v for k, v in state.belief._asdict().items()}
    parts |= {f"prior.{k}": v for k, v in state.prior._asdict().items()}
    parts |= {f"noise.{k}": v for k, v in state.noise._asdict().items()}
    parts |= {f"scores.{k}": v for k, v in state.temperature_scores._asdict().items()}
    return parts | {"counts": (state.step, state.examples, state.prior_is_scaled)}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name
            assert actual[name].dtype == value.dtype, name
        else:
            assert actual[name] == value, name


@pytest.mark.parametrize("covariance", list(STRUCTURES))
def test_set_state_rolls_the_filter_back_to_the_bit(covariance):
    store = pyro.get_param_store()
    guide = bkf.KalmanGuide(network(), bkf.KalmanConfig(covariance=covariance, rank=5))
    before = store.get_state()
    empty = tensors(guide)
    guide.update(X[:8], Y[:8])
    middle, first = store.get_state(), tensors(guide)
    guide.update(X[8:16], Y[8:16])
    second = tensors(guide)
    store.set_state(middle)
    assert_same(tensors(guide), first)
    guide.update(X[8:16], Y[8:16])
    assert_same(tensors(guide), second)
    store.set_state(before)
    assert_same(tensors(guide), empty)


@pytest.mark.parametrize("settings", [{"noise_variance": "estimated"}, {"noise": "ema_taylor"}])
def test_the_noise_is_rolled_back_too(settings):
    store = pyro.get_param_store()
    guide = bkf.KalmanGuide(network(2), bkf.KalmanConfig(likelihood="gaussian", covariance="diagonal", **settings))
    before, empty = store.get_state(), tensors(guide)
    guide.update(X[:8], NUMBERS[:8])
    middle, first = store.get_state(), tensors(guide)
    assert any(value is not None for name, value in first.items() if name in ("noise.variance", "noise.covariance"))
    store.set_state(before)
    assert_same(tensors(guide), empty)
    store.set_state(middle)
    assert_same(tensors(guide), first)


@pytest.mark.parametrize("covariance", ["low_rank", "block_diagonal"])
def test_safetensors_restore_a_named_guide_in_a_new_store(covariance, tmp_path):
    store, config = pyro.get_param_store(), bkf.KalmanConfig(covariance=covariance, rank=5)
    guide = bkf.KalmanGuide(network(), config, name="adapter")
    for start in (0, 8):
        guide.update(X[start : start + 8], Y[start : start + 8])
    with torch.no_grad():
        guide.scale_unconstrained += 0.1  # as SVI would move it
    expected, quantiles = tensors(guide), guide.quantiles([0.1, 0.9])
    entries = {name: tensor.detach().contiguous() for name, tensor in store.get_state()["params"].items()}
    assert all(tensor.is_floating_point() for tensor in entries.values())
    save_file(entries, tmp_path / "store.safetensors")
    pyro.clear_param_store()
    again = bkf.KalmanGuide(network(), config, name="adapter")
    store.set_state({"params": load_file(tmp_path / "store.safetensors"), "constraints": {}})
    assert_same(tensors(again), expected)
    for name, value in again.quantiles([0.1, 0.9]).items():
        assert torch.equal(value, quantiles[name])
    third = bkf.KalmanGuide(network(), config, name="adapter")  # takes what is in the store
    assert_same(tensors(third), expected)
    guide.update(X[16:], Y[16:])
    assert third.state.step == 3  # guides of one name share their state, as Pyro's modules do


def test_pyro_s_own_file_restores_it(tmp_path):
    guide = bkf.KalmanGuide(network(), bkf.KalmanConfig(rank=5))
    guide.update(X[:8], Y[:8])
    expected = tensors(guide)
    pyro.get_param_store().save(tmp_path / "store.pt")
    guide.update(X[8:], Y[8:])
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert_same(tensors(guide), expected)


def test_clearing_the_store_does_not_reset_a_guide():
    guide = bkf.KalmanGuide(network(), bkf.KalmanConfig(rank=5))
    guide.update(X[:8], Y[:8])
    expected = tensors(guide)
    pyro.clear_param_store()
    assert_same(tensors(guide), expected)
    with pyro.get_param_store().scope():
        assert_same(tensors(guide), expected)
    assert_same(tensors(guide), expected)


def test_updates_do_not_fill_the_store():
    guide, store = bkf.KalmanGuide(network(), bkf.KalmanConfig(rank=5)), pyro.get_param_store()
    for _ in range(5):
        guide.update(X[:8], Y[:8])
        guide(X)
    assert len(store._param_to_name) == len(store)


def test_new_guides_have_new_names_and_a_given_state_replaces_the_stored_one():
    first, second = (bkf.KalmanGuide(network(), bkf.KalmanConfig()) for _ in range(2))
    first.update(X[:8], Y[:8])
    assert second.state.step == 0
    named = bkf.KalmanGuide(network(), bkf.KalmanConfig(), state=first.state, name="mine")
    other = bkf.KalmanGuide(network(), bkf.KalmanConfig(), state=second.state, name="mine")
    assert (named.state.step, other.state.step) == (0, 0)


def test_a_state_of_another_model_or_config_is_refused():
    bkf.KalmanGuide(network(), bkf.KalmanConfig(rank=5), name="mine")
    with pytest.raises(ValueError, match=r"`name` 'mine' must have a state of this model and config, got: belief"):
        bkf.KalmanGuide(network(), bkf.KalmanConfig(rank=6), name="mine")
    with pytest.raises(ValueError, match=r"`name` 'mine' must have a whole state.*got no belief.variance"):
        bkf.KalmanGuide(network(), bkf.KalmanConfig(covariance="diagonal"), name="mine")
    with pytest.raises(ValueError, match=r"`name` 'mine' must have a state of this model and config, got: belief.mean"):
        bkf.KalmanGuide(network(2), bkf.KalmanConfig(rank=5), name="mine")


def test_module_local_params_are_refused():
    message = r"`module_local_params` of pyro\.settings must be False"
    with pyro.settings.context(module_local_params=True), pytest.raises(ValueError, match=message):
        bkf.KalmanGuide(network(), bkf.KalmanConfig())
