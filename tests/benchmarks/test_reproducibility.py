"""The same seed gives the same bits in another process: belief, folder, predictions, report page."""

import hashlib
import os
import subprocess
import sys

RUN = """
import sys
from pathlib import Path
import torch
import bayes_kf as bkf

out, draws = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(draws)  # whatever the global generator has given
torch.randn(draws)
state = torch.random.get_rng_state()
with torch.random.fork_rng():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(12, 4))
    inputs = torch.randn(120, 6)
    labels = (inputs @ torch.randn(6, 4)).argmax(1)
batches = list(zip(inputs.split(4), labels.split(4)))
for covariance in ("diagonal", "low_rank"):
    posterior = bkf.fit(model, batches[:20], bkf.KalmanConfig(covariance=covariance, passes=2), progress=False)
    posterior.save_pretrained(out / covariance)
    predicted = posterior.predict_loader(batches[20:], method="linearized", keep_samples=True)
    sampled = posterior.predict(inputs[-4:], method="sampled", num_samples=6)
    torch.save({"p": predicted.probs, "s": predicted.samples, "d": sampled.samples}, out / f"{covariance}.pt")
bkf.evaluate(posterior, batches[20:], ood={"far": [x + 5 for x, _ in batches[20:]]}).save(out / "report.html")
assert torch.equal(torch.random.get_rng_state(), state), "the global generator was drawn from"
"""
TIMED = ("kalman_state.safetensors", "SHA256SUMS")  # the history has the seconds that updates took


def digests(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(posterior):
    from safetensors.torch import load_file

    actual = load_file(posterior / "kalman_state.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in actual.items() if "seconds" not in name}


def test_two_processes_write_the_same_bits(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for draws, folder in enumerate(folders, 1):
        folder.mkdir()
        command = [sys.executable, "-W", "ignore", "-c", RUN, folder, str(draws)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(draws)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    first, second = map(digests, folders)
    assert {"report.html", "report.json", "diagonal.pt", "low_rank/kalman_config.json"} <= set(first)
    assert first == second
    for covariance in ("diagonal", "low_rank"):
        one, two = (tensors(folder / covariance) for folder in folders)
        assert one == two
        assert len(one) >= 3
