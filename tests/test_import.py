"""What ``import bayes_kf`` does not wait for, and that models without PEFT never do."""

import subprocess
import sys

import pytest

import bayes_kf as bkf

HEAVY = ("peft", "transformers", "scipy.stats", "sklearn", "matplotlib", "torchvision")
SCRIPT = f"""
import sys, tempfile, torch
import bayes_kf as bkf

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(8)]
for start in ("prior", "trained"):
    posterior = bkf.fit(model, batches, bkf.KalmanConfig(), start=start, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        posterior.save_pretrained(folder + "/saved")
        again = bkf.Posterior.from_pretrained(folder + "/saved", model)
    assert torch.equal(again.predict(batches[0][0]).probs, posterior.predict(batches[0][0]).probs)
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_a_plain_module_is_learned_saved_and_loaded_without_them():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_is_imported_later_is_there_as_if_at_once():
    from bayes_kf.evaluation import Report, compare, evaluate

    assert (bkf.Report, bkf.compare, bkf.evaluate) == (Report, compare, evaluate)
    assert bkf.evaluation.evaluate is evaluate
    assert set(bkf.__all__) <= set(dir(bkf))
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        _ = bkf.evalute
