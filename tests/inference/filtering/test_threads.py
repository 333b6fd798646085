"""Many threads on one posterior, and on two posteriors of one model, get what one thread gets."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import bayes_kf as bkf

THREADS, CALLS = 64, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))


def fitted(model, seed):
    g = torch.Generator().manual_seed(seed)
    data = [(torch.randn(4, 4, generator=g), torch.randint(3, (4,), generator=g)) for _ in range(10)]
    return bkf.fit(model, data, bkf.KalmanConfig(), progress=False)


def answers(posterior, inputs):
    return [
        posterior.predict(inputs, method=m, num_samples=8).probs for m in ("linearized", "sampled", "probit", "mean")
    ]


@pytest.mark.filterwarnings("ignore:linearized and sampled:UserWarning")
def test_64_threads_get_the_answers_of_one():
    model = network().train()  # in training, and it must be again afterwards
    first, second = fitted(model, 1), fitted(model, 2)
    inputs = [torch.randn(5, 4, generator=torch.Generator().manual_seed(s)) for s in range(THREADS)]
    expected = {id(p): [answers(p, x) for x in inputs] for p in (first, second)}
    assert not torch.equal(expected[id(first)][0][3], expected[id(second)][0][3])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together = threading.Barrier(THREADS)

    def work(number):
        posterior = (first, second)[number % 2]
        together.wait()
        return [answers(posterior, inputs[number]) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        actual = list(pool.map(work, range(THREADS)))
    for number, calls in enumerate(actual):
        wanted = expected[id((first, second)[number % 2])][number]
        for call in calls:
            assert all(torch.equal(a, b) for a, b in zip(call, wanted, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_learning_beside_predictions_changes_neither():
    model = network()
    posterior = fitted(model, 1)
    inputs, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected, alone = posterior.predict(inputs).probs, posterior.state
    for _ in range(20):
        alone, _ = posterior.kf.update(alone, inputs, labels)
    stop = threading.Event()

    def predicting():
        same = True
        while not stop.is_set():
            same &= torch.equal(posterior.predict(inputs).probs, expected)
        return same

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(predicting) for _ in range(4)]
        state = posterior.state
        for _ in range(20):
            state, _ = posterior.kf.update(state, inputs, labels)
        stop.set()
        assert all(future.result() for future in busy)
    assert all(torch.equal(a, b) for a, b in zip(state.belief, alone.belief, strict=True))
