"""Fits a posterior with `python several_processes.py OUTPUT`, and with `torchrun` or `accelerate launch` alike."""

import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit

torch.manual_seed(0)  # the same model in every process
model = lora_digits_vit(rank=4)
stream, test = uci_digits_split()
loader = DataLoader(TensorDataset(stream.images[:160], stream.labels[:160]), batch_size=16, shuffle=True)

posterior = bkf.fit(model, loader, bkf.KalmanConfig(mean_passes=1))
predicted = posterior.predict_loader([(test.images[:200], test.labels[:200])])
print(f"log loss {-predicted.log_prob.mean():.4f}")
posterior.save_pretrained(sys.argv[1])
