"""Runs a function in several processes that form a group, each with one thread, and collects what they return."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def run(size, function, folder, *args):
    """What ``function(rank, *args)`` returned in every process: a dict of tensors and plain values each."""
    with socket.socket() as actual:
        actual.bind(("127.0.0.1", 0))
        port = actual.getsockname()[1]
    set_forkserver_preload(["peft", "transformers.models.bert.modeling_bert", "bayes_kf.distributed"])  # imported once
    arguments = size, port, str(folder), function, args
    multiprocessing.start_processes(_started, arguments, nprocs=size, start_method="forkserver")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _started(rank, size, port, folder, function, args):
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
