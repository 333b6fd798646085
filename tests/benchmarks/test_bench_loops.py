"""The bench's loops, learners and choices of settings do what they say."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import bayes_kf as bkf
from benchmarks.bench import epochs, learners, online, runner, scores, selection
from benchmarks.bench.networks import base
from benchmarks.bench.registry.optimizers import found_rows, same_settings, text_of
from benchmarks.bench.registry.problems import Sizes, found_problems
from benchmarks.bench.tables import epochs_table, online_table
from benchmarks.common import result_files
from benchmarks.common.learners import Stream

ONLINE, SEVERAL = found_rows("online"), found_rows("optimizers")
UCI = found_problems()["uci"]
LIMIT = 12


def results(monkeypatch, folder, name="cells"):
    monkeypatch.setattr(result_files, "RESULTS", folder)
    return result_files.ResultFile(name)


def test_rows_start_alike():
    first, again = UCI.model("lora", 3), UCI.model("lora", 3)
    for (name, one), (_, two) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    other = UCI.model("lora", 4)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_adamw_is_torchs_with_a_linear_decay():
    row = ONLINE["adamw"]
    choice = {"lr": 1e-3}
    stream = UCI.split("online", 0, LIMIT).stream
    model, reference = UCI.model("lora", 0), UCI.model("lora", 0)
    actual = online.run(row.make(model, choice, 0, LIMIT, None), stream)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    losses = []
    for step in range(LIMIT):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / LIMIT)
        loss = F.cross_entropy(reference(stream.inputs[step : step + 1]).logits, stream.labels[step : step + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(actual.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    for one, two in zip(learners.trainable(model), parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_the_filters_pass_is_that_of_fit():
    config = bkf.KalmanConfig(seed=0)
    split = UCI.split("online", 0, 40)
    model = UCI.model("lora", 0)
    learner = learners.KalmanLearner(model, config, split.stream.first(32).inputs)
    actual = online.run(learner, split.stream)
    posterior = bkf.fit(UCI.model("lora", 0), split.stream.batches(), config, progress=False)
    torch.testing.assert_close(learner.state.belief.mean, posterior.mean_vector, rtol=0, atol=0)
    torch.testing.assert_close(actual.losses, posterior.history["log_loss"].double(), rtol=1e-5, atol=1e-6)
    expected = posterior.predict(split.heldout.inputs[:5]).probs.double()
    torch.testing.assert_close(learner.probs(split.heldout.inputs[:5]), expected, rtol=1e-6, atol=1e-7)


def test_no_example_counts_twice_over_epochs():
    stream = UCI.split("optimizers", 0, 24).stream
    learner = learners.KalmanLearner(UCI.model("lora", 0), bkf.KalmanConfig(), stream.inputs)
    epochs.run_epoch(learner, stream, 0, 0, 3)
    first = learner.state
    for epoch in (1, 2):
        epochs.run_epoch(learner, stream, 0, epoch, 3)
    assert learner.state.examples == first.examples == 24
    variance = learner.kf.marginal_variance
    assert torch.equal(variance(first), variance(learner.state))
    assert not torch.equal(first.belief.mean, learner.state.belief.mean)


def test_bytes_are_those_of_the_optimizers_tensors():
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.Adam(parameters)
    assert learners.optimizer_bytes(optimizer) == 0
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    assert learners.optimizer_bytes(optimizer) == 2 * 17 * 4 + 2 * 4  # both moments, and a count for each tensor


# data


def test_tuning_streams_and_tests_share_nothing():
    def code(which):
        return which.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28) / 2000, which % 10

    problem = UCI._replace(train=code, test=code, network=UCI.network._replace(prepare=lambda raw: raw))

    def indices(stream):
        return set((stream.inputs[:, 0, 0, 0] * 2000).round().int().tolist())

    problem = problem._replace(sizes={"online": Sizes(stream=300, tuning=200, validation=100, heldout=500)})
    tuning = problem.tuning("online")
    first, second = (problem.split("online", seed) for seed in (0, 1))
    for part in (tuning.stream, tuning.heldout):
        assert not indices(part) & (indices(first.stream) | indices(second.stream))
    assert not indices(tuning.stream) & indices(tuning.heldout)
    assert len(indices(first.stream)) == 300
    assert len(indices(first.stream) & indices(second.stream)) < 200  # of the other 897, not the same
    assert torch.equal(first.heldout.inputs, second.heldout.inputs)


def test_images_are_framed_and_shrunk():
    prepare = base.images(3, 32)
    framed = prepare(torch.ones(2, 1, 28, 28))
    assert framed.shape == (2, 3, 32, 32)
    assert float(framed.sum()) == 2 * 3 * 28 * 28
    assert base.images(1, 28, 2.0, -1.0)(torch.zeros(1, 3, 32, 32)).unique().tolist() == [-1.0]


# choices


def test_the_best_setting_by_each_criterion():
    row = ONLINE["adamw"]
    numbers = [(1.0, 0.2), (0.5, 0.9), (0.6, 0.3), (9.0, 9.0)]
    cells = {
        selection.tuning_key("p", "adamw", choice): {"online_log_loss": a, "nll": b, "steps": 10}
        for choice, (a, b) in zip(row.grid, numbers, strict=True)
    }
    assert selection.chosen(cells, "p", row, online.CRITERIA) == {"online": row.grid[1], "final": row.grid[0]}
    best = selection.tuning_key("p", "adamw", row.grid[1])
    cells[best] |= {"cause": "it broke", "steps": 3}
    assert selection.chosen(cells, "p", row, online.CRITERIA)["online"] == row.grid[2]
    for key in cells:
        cells[key] = {"cause": "it broke", "steps": 3}
    cells[best]["steps"] = 7
    assert selection.chosen(cells, "p", row, online.CRITERIA)["online"] == row.grid[1]  # came furthest
    del cells[best]
    assert selection.chosen(cells, "p", row, online.CRITERIA) is None


def test_settings_that_did_not_exist_stand_at_their_defaults():
    row = ONLINE["default"]
    today = row.settings({})
    kept = json.loads(json.dumps(today))
    assert same_settings(kept, today)
    del kept["config"]["forgetting"]
    assert same_settings(kept, today)
    today["config"]["forgetting"] = 0.9
    assert not same_settings(kept, today)
    assert not same_settings({"lr": 1.0}, {"lr": 2.0})
    assert text_of({"lr": 1e-3, "kind": "a"}) == "lr=0.001 kind=a"


# numbers


def test_curves_are_running_and_moving_averages():
    generator = torch.Generator().manual_seed(0)
    correct, losses = torch.rand(1234, generator=generator) < 0.5, torch.rand(1234, generator=generator).double()
    kept = scores.curve(correct, losses)
    assert len(kept["steps"]) <= scores.POINTS
    for step, accuracy, loss in zip(kept["steps"], kept["accuracy"], kept["loss"], strict=True):
        assert accuracy == pytest.approx(correct[:step].double().mean().item(), abs=1e-4)
        assert loss == pytest.approx(losses[max(0, step - 100) : step].mean().item(), abs=1e-4)
    assert scores.curve(correct[:0], losses[:0])["steps"] == []


def test_a_point_is_the_whole_training_sets_loss_and_gradient():
    split = UCI.split("optimizers", 0, 150)
    model = UCI.model("lora", 0)
    actual = epochs.point(model, split)  # in two batches
    loss = F.cross_entropy(model(split.stream.inputs).logits, split.stream.labels)
    parts = torch.autograd.grad(loss, learners.trainable(model))
    assert actual.train_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert actual.gradient_norm == pytest.approx(float(torch.cat([p.flatten() for p in parts]).norm()), rel=1e-4)


def test_steps_to_a_loss():
    curve = {"steps": [50, 100, 150, 200], "accuracy": [0] * 4, "loss": [0.1, 0.9, 0.5, 0.2]}
    entry = online_table.Entry("p", ONLINE["adamw"], {}, ("online",), {0: {"curve": curve, "stream": 2000}})
    assert online_table.steps_to(entry, 0.5) == "150 (1/1)"  # the window is not yet full at 50
    assert online_table.steps_to(entry, 0.1) == "– (0/1)"
    assert online_table.level(entry) == 0.2


# divergence


class Breaks:
    """A learner that cannot go on after some batches."""

    def __init__(self, after):
        self.left = after

    def learn(self, inputs, labels):
        self.left -= 1
        if self.left < 0:
            raise FloatingPointError("the outputs are not finite")
        return F.one_hot(labels, 10).float()  # right

    def begin_epoch(self, number, epochs, examples):
        pass

    def settle(self):
        pass

    def probs(self, inputs):
        return torch.full((len(inputs), 10), 0.1, dtype=torch.float64)

    def bytes(self):
        return 0


@pytest.mark.parametrize("bench", [online, epochs], ids=["online", "optimizers"])
def test_a_divergence_is_a_result(bench, tmp_path, monkeypatch):
    row = found_rows(bench.NAME)["adamw"]._replace(
        name="breaks", grid=({},), make=lambda *_: Breaks(3 if bench is online else 1)
    )
    file = results(monkeypatch, tmp_path)
    limit = LIMIT if bench is online else 33  # two batches an epoch
    runner.run(runner.Plan(bench, [row], [UCI], seeds=[0], limit=limit), file)
    cell = file.cells["uci/breaks/default/0"]
    assert cell["cause"] == "FloatingPointError: the outputs are not finite"
    assert "accuracy" not in cell
    table = online_table if bench is online else epochs_table
    text = "\n".join(table.render(file.cells, [row], [UCI]))
    if bench is online:
        assert cell["diverged_at"] == 3
        assert cell["online_accuracy"] == 3 / LIMIT  # three right; what was left counts as wrong
        assert "(div@3, 1/1)" in text
    else:
        assert cell["diverged_at"] == 0
        assert "(div@0, 1/1)" in text


def test_infinite_logits_end_a_pass():
    model = torch.nn.Linear(2, 3)
    torch.nn.init.constant_(model.weight, math.inf)
    learner = learners.GradientLearner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    actual = online.run(learner, Stream(torch.ones(4, 2), torch.zeros(4, dtype=torch.long)))
    assert actual.cause == "FloatingPointError: the outputs are not finite"
    assert len(actual.losses) == 0
