"""The loop over a loader: its order of calls, its numbers of batches, and its errors."""

import pytest
import torch

from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.loop import LoopStep, every_updates, inputs_and_targets, run_loop
from bayes_kf.inference.fitting.progress import ProgressBar

BATCHES = [(torch.full((2, 1), float(k)), torch.tensor([k, k])) for k in range(5)]


def add(state, inputs, targets):
    return state + float(inputs.sum()), int(targets[0])


def test_callbacks_get_every_step_in_order_and_the_summary_follows_them():
    calls, bar = [], ProgressBar()

    def summary():
        calls.append("summary")
        return ""

    callbacks = [lambda step: calls.append(("first", step)), lambda step: calls.append(("second", step.number))]
    assert run_loop(BATCHES[:2], 1.0, add, callbacks, bar, summary) == 3.0
    steps = [call[1] for call in calls if call[0] == "first"]
    assert [(s.number, s.before, s.state, s.info) for s in steps] == [(0, 1.0, 1.0, 0), (1, 1.0, 3.0, 1)]
    assert torch.equal(steps[1].targets, BATCHES[1][1])
    assert [call if call == "summary" else call[0] for call in calls] == ["first", "second", "summary"] * 2
    assert bar.done == 2


def test_a_resumed_loop_continues_the_numbers_of_the_batches():
    bar, numbers = ProgressBar(), []
    bar.skip(3)
    run_loop(BATCHES[3:], 0.0, add, [lambda step: numbers.append(step.number)], bar)
    assert numbers == [3, 4]
    assert run_loop([], "unchanged", add) == "unchanged"


def test_an_action_runs_after_every_third_update():
    states = []
    callback = every_updates(3, states.append)
    for number in range(7):
        callback(LoopStep(number, None, number, None, None))
    assert states == [2, 5]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, DivergenceError])
def test_errors_name_the_batch(kind):
    def failing(state, inputs, targets):
        if targets[0] == 3:
            raise DivergenceError(7, "a test", None) if kind is DivergenceError else kind("a test")
        return state, None

    recorded = []
    with pytest.raises(kind) as caught:
        run_loop(BATCHES, 0.0, failing, [lambda step: recorded.append(step.number)])
    assert recorded == [0, 1, 2]
    expected = {
        ValueError: "a test (batch 3 of `loader`)",
        RuntimeError: "a test",
        DivergenceError: "update 7 refused: a test; the state before it is kept",
    }
    assert str(caught.value) == expected[kind]
    notes = getattr(caught.value, "__notes__", [])
    assert notes == (["in batch 3 of `loader`"] if kind is RuntimeError else [])


def test_batches_have_targets():
    with pytest.raises(ValueError, match=r"`loader` must yield targets with every batch, got none in batch 1\."):
        run_loop([BATCHES[0], BATCHES[1][0]], 0.0, add)
    with pytest.raises(ValueError, match=r"`batch` must be \(inputs, targets\)"):
        inputs_and_targets("text", 0)


def test_another_split_may_return_no_examples():
    def keep(state, inputs, targets):
        return [*state, (inputs, targets)], None

    assert run_loop([(None, None)], [], keep, split=lambda batch, number: batch) == [(None, None)]
