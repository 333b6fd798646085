"""Data and a posterior that tests of several folders share."""

import pytest
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit


@pytest.fixture(scope="session")
def digits():
    stream, held_out = uci_digits_split()
    return stream, held_out


@pytest.fixture(scope="session")
def fitted(digits):
    stream, _ = digits
    data = TensorDataset(stream.images[:60], stream.labels[:60])
    return bkf.fit(lora_digits_vit(rank=2), DataLoader(data, batch_size=4), bkf.KalmanConfig(), progress=False)
