"""The memory of an update against its budget, in a separate process that returns freed memory at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.adapter import AdapterModel

SETUP = """
import ctypes, gc, resource, sys, warnings
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification
import bayes_kf as bkf

torch.set_num_threads(1)
torch.manual_seed(0)
base = BertForSequenceClassification(BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=10, vocab_size=500))
lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"], init_lora_weights=False)
ids = torch.randint(5, 500, (256, 32))
inputs, targets = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.randint(10, (256,))
model = get_peft_model(base, lora)
few = {name: t[:4] for name, t in inputs.items()}

def field(name):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) / 1024
"""
PEAK = """
for budget in map(int, sys.argv[1:]):
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(bytes_budget=budget * 2**20))
    state, _ = kf.update(kf.init(few), few, targets[:4])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kf.update(state, inputs, targets)
    print(field("VmHWM") - before)
"""

NO_ROOM = """
inputs, targets = {name: t[:128] for name, t in inputs.items()}, targets[:128]
kf = bkf.KalmanFilter(model, bkf.KalmanConfig(bytes_budget=int(sys.argv[1]) * 2**20))
state = kf.init(few)
kf.update(state, few, targets[:4])
expected, _ = bkf.KalmanFilter(model, bkf.KalmanConfig(bytes_budget=32 * 2**20)).update(state, inputs, targets)
gc.collect()
resource.setrlimit(resource.RLIMIT_AS, (int((field("VmSize") + 80) * 2**20), resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    after, _ = kf.update(state, inputs, targets)
    probs = bkf.Posterior(kf, after).predict(inputs).probs
said = [str(w.message) for w in caught if "Memory ran out on 128 examples" in str(w.message)]
torch.testing.assert_close(after.belief.mean, expected.belief.mean, rtol=1e-3, atol=1e-4)
variances = kf.marginal_variance(after), kf.marginal_variance(expected)
torch.testing.assert_close(*variances, rtol=1e-3, atol=1e-6)
assert torch.isfinite(probs).all()
kf.update(after, inputs, targets)
print(len(said), kf.linearize._max_bytes / 2**20)
"""


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux lets a process reset its peak of resident memory (/proc/self/clear_refs)",
)
def test_a_step_keeps_to_its_budget():
    budgets, unlimited = (64, 128), 4000
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP + PEAK, *map(str, (*budgets, unlimited))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *kept, whole = map(float, done.stdout.splitlines())
    for budget, taken in zip(budgets, kept, strict=True):
        assert 0.4 * budget < taken < 1.2 * budget  # MiB; the budget is used
    assert whole > 1.5 * max(budgets)  # or it would say nothing that the budget is kept


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux enforces a limit on the address space (RLIMIT_AS), which makes memory run out here",
)
def test_chunks_get_smaller_if_memory_runs_out_with_one_warning():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP + NO_ROOM, "2000"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, most = done.stdout.split()[-2:]
    assert said == "1"
    assert float(most) < 2000


def test_an_error_that_is_not_about_memory_is_raised_at_once_and_one_example_cannot_shrink():
    linearize = Linearizer(AdapterModel(nn.Linear(3, 2)))
    linearize.prepare(linearize.adapter.vector(), torch.ones(4, 3))
    calls = []

    def failing(error):
        def call():
            calls.append(1)
            raise error

        return call

    with pytest.raises(RuntimeError, match="shape"):
        linearize.retry_in_smaller_chunks(failing(RuntimeError("shape")), 4)
    with pytest.raises(torch.OutOfMemoryError):
        linearize.retry_in_smaller_chunks(failing(torch.OutOfMemoryError("CUDA out of memory")), 1)
    assert len(calls) == 2
    with pytest.warns(UserWarning, match="Memory ran out on 4 examples"), pytest.raises(MemoryError):
        linearize.retry_in_smaller_chunks(failing(MemoryError()), 4)
    assert len(calls) < 40  # it ends where single examples do not fit either
