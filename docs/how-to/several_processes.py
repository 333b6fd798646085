"""Fits one posterior on several processes: `torchrun --nproc-per-node 2 several_processes.py OUTPUT`."""

import sys

import torch.distributed as dist

import bayes_kf as bkf
from bayes_kf import distributed
from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit

dist.init_process_group("gloo")  # "nccl" with GPUs
rank, size = dist.get_rank(), dist.get_world_size()
stream, _ = uci_digits_split()
batches = zip(stream.images[:160].split(8), stream.labels[:160].split(8), strict=True)
mine = [(images[rank::size], labels[rank::size]) for images, labels in batches]  # this process's share of every batch

posterior = distributed.fit(lora_digits_vit(rank=4), mine, bkf.KalmanConfig(), progress=False)
if rank == 0:
    posterior.save_pretrained(sys.argv[1])
dist.destroy_process_group()
