"""The memory of a step against its budget, in a process of its own whose freed memory goes back at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, gc, sys
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
kf = bkf.KalmanFilter(get_peft_model(base, lora), bkf.KalmanConfig(bytes_budget=int(sys.argv[1]) * 2**20))
state = kf.init({name: t[:4] for name, t in inputs.items()})
state, _ = kf.update(state, inputs, targets)

def field(name):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) / 1024

gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = field("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
kf.update(state, inputs, targets)
print(field("VmHWM") - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux lets a process reset its peak of resident memory (/proc/self/clear_refs)",
)
@pytest.mark.parametrize("budget", [64, 128])
def test_a_step_keeps_to_its_budget(budget):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(budget)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    extra = float(done.stdout.splitlines()[-1])  # MiB
    assert extra < 1.2 * budget
    assert extra > 0.4 * budget  # the whole batch takes far more; the budget is used
