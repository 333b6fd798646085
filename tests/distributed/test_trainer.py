"""KalmanTrainer on several processes ends as on one: epochs, held-out examples, a mixture, evaluation, checkpoints."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

import bayes_kf as bkf
from bayes_kf.integrations import KalmanTrainer

from . import cases
from .processes import run

MIXTURE = [bkf.KalmanConfig(rank=4), bkf.KalmanConfig(covariance="diagonal")]


def examples(count, seed):
    """Texts of seven tokens with a label that one of them decides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (count, 7), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] % 3)} for row in ids]


class Streamed(IterableDataset):
    """Examples without a length."""

    def __iter__(self):
        return iter(examples(40, 1))


def trained(rank, folder, case):
    """What a training ends with: the posterior's numbers, and the metrics of an evaluation."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}  # the group is there already
    arguments = TrainingArguments(
        f"{folder}/{case}",
        num_train_epochs=2 if case in ("epochs", "resumed") else 1,
        per_device_train_batch_size=7,
        per_device_eval_batch_size=5,
        save_steps=3,
        max_steps=4 if case == "stream" else -1,
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    test = examples(23, 2)
    trainer = KalmanTrainer(
        cases.new_lora(),
        arguments,
        train_dataset=Streamed() if case == "stream" else examples(40, 1),
        eval_dataset=test if case == "evaluation" else None,
        kalman=MIXTURE if case == "mixture" else None,
    )
    trainer.train(resume_from_checkpoint=f"{folder}/epochs/checkpoint-6" if case == "resumed" else None)
    metrics = trainer.evaluate(test)
    found = {name: torch.tensor(value) for name, value in metrics.items() if not name.endswith(("time", "second"))}
    posterior = trainer.posterior
    for number, member in enumerate(getattr(posterior, "members", (posterior,))):
        found |= {f"mean {number}": member.mean_vector, f"variance {number}": member.variance_vector}
    trainer.save_model(f"{folder}/{case}/saved")
    return found


@pytest.mark.parametrize("case", ["evaluation", "epochs", "stream", pytest.param("mixture", marks=pytest.mark.slow)])
def test_two_processes_end_as_one(case, tmp_path):
    (expected,) = run(1, trained, tmp_path, str(tmp_path / "one"), case)
    folder = str(tmp_path / "several")
    every = run(2, trained, tmp_path, folder, case)
    if case == "epochs":  # the end again, from a checkpoint of two processes, on three
        every += run(3, trained, tmp_path, folder, "resumed")
    for found in every:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            where = partial("{}: {}".format, name)
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=where)
    saved = bkf.Posterior.from_pretrained(f"{folder}/{case}/saved", cases.new_lora())
    best = getattr(saved, "best", saved)
    assert any(torch.equal(best.mean_vector, every[0][name]) for name in every[0] if name.startswith("mean"))
