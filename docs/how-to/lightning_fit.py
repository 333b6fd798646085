"""Fits a posterior in Lightning's loop: `python lightning_fit.py OUTPUT`, or with `torchrun --nproc-per-node 2`."""

import os
import sys

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.integrations.lightning import KalmanModule
from bayes_kf.models.zoo import lora_digits_vit

torch.manual_seed(0)  # the same model in every process
stream, test = uci_digits_split()
train = DataLoader(TensorDataset(stream.images[:160], stream.labels[:160]), batch_size=16, shuffle=True)
held_out = DataLoader(TensorDataset(stream.images[160:240], stream.labels[160:240]), batch_size=40)
tests = DataLoader(TensorDataset(test.images[:200], test.labels[:200]), batch_size=100)

module = KalmanModule(lora_digits_vit(rank=4), bkf.KalmanConfig())
trainer = lightning.Trainer(
    max_epochs=2,  # the second one moves the mean
    accelerator="cpu",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    use_distributed_sampler=False,  # each process does its part of every batch
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(module, train, held_out)
trainer.test(module, tests)
module.posterior.save_pretrained(sys.argv[1])
