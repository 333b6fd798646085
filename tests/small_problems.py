"""Small models and data that several tests share."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 3, generator=G).double(), torch.randn(40, 2, generator=G).double()
EXACT = {"likelihood": "gaussian", "covariance": "full", "initial_variance": 1.0, "temperature": 1.0}


def linear(outputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, outputs, bias=False).double()


def loader(x=X, y=Y, size=4):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def many(outputs=90):
    """A network with many outputs, and no last layer of fewer features."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs), nn.Tanh()).double()


def in_batches(size, held_out, number=30):
    return DataLoader(TensorDataset(held_out.images[:number], held_out.labels[:number]), batch_size=size)
