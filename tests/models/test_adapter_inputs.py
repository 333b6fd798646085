"""Inputs of another floating-point dtype than the model's."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.models.adapter import AdapterModel


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_become_the_models_dtype(model_dtype, dtype):
    adapter = AdapterModel(network(model_dtype))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = adapter.outputs(adapter.vector(), x.to(model_dtype))
    assert torch.equal(adapter.outputs(adapter.vector(), x), expected)


def test_fit_and_predict_accept_numpys_float64():
    """NumPy's default is float64, which torch's layers refuse."""
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(40, 3))), torch.from_numpy(rng.integers(0, 2, size=40))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    with pytest.raises(RuntimeError, match="dtype"):
        network()(x)
    config = bkf.KalmanConfig(covariance="diagonal")
    actual = bkf.fit(network(), loader, config=config, progress=False)
    single = DataLoader(TensorDataset(x.float(), y), batch_size=8)
    expected = bkf.fit(network(), single, config=config, progress=False)
    assert torch.equal(actual.mean_vector, expected.mean_vector)
    assert torch.equal(actual.predict(x).probs, expected.predict(x.float()).probs)


class Clock(nn.Module):
    """Needs float64 inputs, and has a float64 buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)
        self.register_buffer("origin", torch.tensor(1.7e9, dtype=torch.float64))

    def forward(self, x):
        return self.layer((x - self.origin).float())


def test_inputs_of_models_with_several_dtypes_are_not_cast():
    adapter = AdapterModel(Clock())
    x = torch.tensor([[1.7e9 + 1.0], [1.7e9 + 2.0]], dtype=torch.float64)
    seconds = torch.tensor([[1.0], [2.0]])
    torch.testing.assert_close(adapter.outputs(adapter.vector(), x), adapter.model.layer(seconds).detach())


def test_autocast_casts_by_itself():
    adapter = AdapterModel(network())
    x = torch.randn(5, 3).double()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(adapter.run(x), adapter.model(x.float()))
        assert torch.equal(adapter.run(x.bfloat16()), adapter.model(x.bfloat16()))
