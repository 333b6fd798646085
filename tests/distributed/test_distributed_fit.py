"""A pass on several processes: uneven shares, errors on one of them, a process that dies, scores together."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import bayes_kf as bkf
from bayes_kf import distributed
from bayes_kf.evaluation import StreamingScores

from . import cases
from .processes import run

X = torch.randn(246, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X @ torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).argmax(1)
BATCH = 8


def shares(rank, size):
    """Every size-th batch; the first process has one batch more than others where they do not divide."""
    batches = list(zip(X.split(BATCH), Y.split(BATCH), strict=True))
    return batches[rank::size]


def fitted(rank, size, form, folder):
    posterior = distributed.fit(
        cases.network(), shares(rank, size), form=form, checkpoint=f"{folder}/posterior", every=2, progress=rank == 0
    )
    scores = StreamingScores(4)
    for x, y in shares(rank, size):
        scores.update(posterior.predict(x).probs, y)
    distributed.merge_scores(scores)
    loaded = bkf.Posterior.from_pretrained(f"{folder}/posterior", cases.network())
    return {
        "mean": posterior.mean_vector,
        "covariance": posterior.covariance_matrix(),
        "saved": torch.equal(loaded.mean_vector, posterior.mean_vector),
        "examples": posterior.state.examples,
        "scores": {k: torch.tensor(v) for k, v in scores.scores(num_simulations=50).items()},
        "history": len(posterior.history["log_loss"]),
    }


@pytest.mark.parametrize(
    ("form", "size"), [("sharded", 2), pytest.param("sharded", 3, marks=pytest.mark.slow), ("data_parallel", 2)]
)
def test_a_pass_equals_that_of_one_process_with_joined_batches(form, size, tmp_path):
    actual = run(size, fitted, tmp_path, size, form, tmp_path)
    rounds = list(zip(*(shares(rank, size) + [None] * 3 for rank in range(size)), strict=False))
    rounds = [[share for share in some if share is not None] for some in rounds]
    joined = [(torch.cat([x for x, _ in some]), torch.cat([y for _, y in some])) for some in rounds if some]
    assert {len(some) for some in rounds if some} == {1, size}  # uneven
    information = {"covariance": "diagonal_information", "expansion": "mean"} if form == "data_parallel" else {}
    kf = bkf.KalmanFilter(cases.network(), bkf.KalmanConfig(**information))
    state = kf.init(torch.cat([x for x, _ in shares(0, size)][:4]))
    for x, y in joined:
        state, _ = kf.update(state, x, y)
    alone = bkf.Posterior(kf, state)
    scores = StreamingScores(4)
    for x, y in zip(X.split(BATCH), Y.split(BATCH), strict=True):
        scores.update(alone.predict(x).probs, y)
    expected = scores.scores(num_simulations=50)
    for here in actual:
        torch.testing.assert_close(here["mean"], alone.mean_vector, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(here["covariance"], alone.covariance_matrix(), rtol=1e-7, atol=1e-9)
        assert here["saved"]
        assert here["examples"] == len(X)
        if form == "sharded":  # the other draws for temperatures, each process for itself
            assert here["scores"]["nll"] == pytest.approx(expected["nll"], rel=1e-6)
            assert here["scores"]["accuracy"] == expected["accuracy"]
            assert here["scores"]["ece"] == pytest.approx(expected["ece"], rel=1e-6)
            assert here["history"] == len(X)
        assert here["scores"].keys() == expected.keys()


class Breaking:
    """A loader of the second process that comes to a bad end."""

    def __init__(self, batches, end):
        self.batches, self.end = batches, end

    def __iter__(self):
        yield from self.batches[:5]
        yield self.end()


def raising():
    raise OSError("the disk is gone")


def of_five_features():
    return torch.randn(3, 7, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)


def of_nine_classes():
    return X[:3], torch.tensor([0, 1, 9])


def of_too_few_targets():
    return X[:3], torch.tensor([0, 1])


def broken(rank, size, end, folder):
    loader = Breaking(shares(rank, size), end) if rank == 1 else shares(rank, size)
    try:
        distributed.fit(cases.network(), loader, checkpoint=f"{folder}/posterior", every=2, progress=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


@pytest.mark.parametrize(
    ("end", "own"),
    [
        (raising, r"OSError: the disk is gone"),
        (of_five_features, r"RuntimeError: .*shapes cannot be multiplied"),
        (of_too_few_targets, r"ValueError: `targets` must have one entry per example \(3\), got 2\. \(batch 5 of"),
    ],
    ids=["loader", "features", "targets"],
)
def test_an_error_on_one_process_raises_on_all(end, own, tmp_path):
    begun = time.monotonic()
    actual = run(3, broken, tmp_path, 3, end, tmp_path)
    assert time.monotonic() - begun < 50  # no process waited for another until the group's timeout
    errors = [process["error"] for process in actual]
    assert re.search(own, errors[1])
    assert errors[0].startswith("OtherProcessError: process 1 could not")
    assert errors[2] == errors[0]
    kept = bkf.Posterior.from_pretrained(tmp_path / "posterior", cases.network())
    assert kept.state.step == 4  # the fifth was not saved yet


def test_a_label_without_a_class_raises_on_all_processes(tmp_path):
    errors = [process["error"] for process in run(2, broken, tmp_path, 2, of_nine_classes, tmp_path)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("ValueError: `targets` must")


def of_another_shape():
    return X[:3], torch.zeros(3, 2, dtype=torch.float64)


def test_targets_of_different_shapes_raise_on_all_processes(tmp_path):
    errors = [process["error"] for process in run(2, broken, tmp_path, 2, of_another_shape, tmp_path)]
    assert all(
        error.startswith("ValueError: `targets` must have the same shape per example on all processes")
        for error in errors
    )
    assert "here (8,)" in errors[0]
    assert "here (3, 2)" in errors[1]


def dying(rank, size, folder):
    class Dying:
        def __iter__(self):
            yield from shares(rank, size)[:6]
            os._exit(7)

    loader = Dying() if rank == 1 else shares(rank, size)
    distributed.fit(cases.network(), loader, checkpoint=f"{folder}/posterior", every=1, progress=False)
    return {}


def test_a_process_that_dies_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run(3, dying, tmp_path, 3, tmp_path)
    kept = bkf.Posterior.from_pretrained(tmp_path / "posterior", cases.network())
    assert kept.state.step == 6
    assert kept.state.examples == 18 * BATCH


def test_arguments_are_checked(alone):
    with pytest.raises(ValueError, match=r"`form` must be one of sharded, data_parallel, got 'rows'"):
        distributed.fit(cases.network(), [], form="rows")
    with pytest.raises(ValueError, match=r"`every` must be a whole number >= 1, got 0"):
        distributed.fit(cases.network(), [], every=0)
    with pytest.raises(ValueError, match=r"`loader` must yield at least one batch on the first process, got none"):
        distributed.fit(cases.network(), [], progress=False)
    for name, value in (
        ("tune", {"initial_logit_sd": [1.0]}),
        ("passes", 2),
        ("mean_passes", 1),
        ("gradient_penalty", 1.0),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` must be .* on several processes"):
            distributed.ShardedFilter(cases.network(), bkf.KalmanConfig(**{name: value}))
    with pytest.raises(ValueError, match=r"`covariance` must be one of diagonal, .*low_rank to be sharded, got 'full'"):
        distributed.ShardedFilter(cases.network(), bkf.KalmanConfig(covariance="full"))
    kf = distributed.ShardedFilter(cases.network())
    with pytest.raises(ValueError, match=r"`inputs` must be given on the first process"):
        kf.init()
    state = kf.init(X[:8])
    with pytest.raises(ValueError, match=r"`inputs` and `targets` must both be given or both be None"):
        kf.update(state, X[:3], None)
    with pytest.raises(ValueError, match=r"`inputs` must be given on at least one process, got none on all"):
        kf.update(state, None, None)


def test_without_a_process_group_the_error_says_how_to_start_one():
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be initialized first \(torchrun"):
        distributed.ShardedFilter(cases.network())


def differing(rank, size):
    torch.manual_seed(rank)
    model = cases.network()
    with torch.no_grad():
        next(model.parameters()).add_(0.1 * rank)
    try:
        distributed.ShardedFilter(model)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "none"}


def test_different_models_raise(tmp_path):
    actual = run(2, differing, tmp_path, 2)
    assert [process["error"] for process in actual] == [
        "`model` and `config` must be the same in every process, got different ones."
    ] * 2


class Ends:
    """A loader that raises an error before a batch."""

    def __init__(self, batches, number):
        self.batches, self.number = batches, number

    def __iter__(self):
        yield from self.batches[: self.number]
        raise OSError("no disk")


def resumed_divided(rank, size, folder):
    """A pass that ends early, the whole one from its divided checkpoint, and one that was never stopped."""
    own, settings = shares(rank, size), {"checkpoint": f"{folder}/divided", "every": 2, "divided": True}
    with pytest.raises((OSError, distributed.OtherProcessError)):
        distributed.fit(cases.network(), Ends(own, 5 if rank else 9), progress=False, **settings)
    saved = sorted(path.name for path in Path(f"{folder}/divided").iterdir())
    posterior = distributed.fit(cases.network(), own, progress=False, **settings)
    with pytest.raises(ValueError, match="`loader` must yield the batches of the pass in"):
        distributed.fit(cases.network(), own[:3], progress=False, **settings)
    whole = distributed.fit(cases.network(), own, progress=False)
    same = all(torch.equal(a, b) for a, b in zip(posterior.state.belief, whole.state.belief, strict=True))
    return {"saved": saved, "same": same, "step": posterior.state.step}


def test_a_pass_with_divided_checkpoints_resumes_to_the_bit(tmp_path):
    for found in run(2, resumed_divided, tmp_path, 2, str(tmp_path)):
        assert found["saved"] == ["divided-4", "divided.json"]
        assert found["same"]
        assert found["step"] == 16


def test_divided_checkpoints_need_a_divided_belief(tmp_path):
    with pytest.raises(ValueError, match='`divided` must be False without `form="sharded"` and a `checkpoint`'):
        distributed.fit(cases.network(), shares(0, 1), divided=True)
