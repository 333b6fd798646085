"""Coarser looks at the outputs: exact in what they claim to be, bounded in what they leave out."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from bayes_kf.inference import KalmanConfig, KalmanFilter
from bayes_kf.inference.linearization import linearizer
from bayes_kf.inference.linearization.row_buffer import Directions
from bayes_kf.inference.measurement_model.output_directions import (
    log_odds_direction_square,
    num_directions,
    num_rows,
    project_outputs,
    random_signs,
)
from bayes_kf.models.batch import Batch
from bayes_kf.models.likelihood import Categorical

FAMILY = Categorical()


def outputs_of(size=4, m=30, scale=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, m, generator=g).double(), torch.randint(m, (size,), generator=g)


def matrix(directions: Directions, size):
    """All directions, (B, c, m)."""
    example, which = torch.meshgrid(torch.arange(size), torch.arange(directions.num_rows), indexing="ij")
    return directions.seeds(example.flatten(), which.flatten()).view(size, directions.num_rows, -1)


def fisher(outputs):
    return FAMILY.variance(outputs)


@pytest.mark.parametrize(("curvature", "epsilon"), [("truncated", 1e-3), ("truncated", 0.2), ("sampled", 1e-3)])
def test_likelihood_and_gradient_of_the_label_stay_exact(curvature, epsilon):
    outputs, targets = outputs_of()
    seen = project_outputs(
        KalmanConfig(curvature=curvature, curvature_epsilon=epsilon).curvature_settings, FAMILY, outputs, targets
    )
    torch.testing.assert_close(seen.family.log_prob(seen.outputs, seen.targets), FAMILY.log_prob(outputs, targets))
    directions = matrix(seen.directions, len(outputs))[:, : seen.outputs.shape[1]]
    gradient = (directions.mT @ seen.family.residual(seen.outputs, seen.targets).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(gradient, FAMILY.residual(outputs, targets), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", ["exact", "sampled"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_innovation_s_mean_over_labels_is_its_degrees_of_freedom(curvature, classes):
    """Exactly so where the belief has no variance: Σ_y π_y (1/π_y − 1) = m − 1."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, classes).double(), torch.randn(2, 4).double()
    kf = KalmanFilter(model, KalmanConfig(covariance="full", initial_variance=1e-13, curvature=curvature))
    state, mean = kf.init(), 0.0
    for labels in itertools.product(range(classes), repeat=2):
        _, info = kf.update(state, x, torch.tensor(labels))
        assert info.degrees_of_freedom == 2 * (classes - 1)
        mean += float((-info.log_loss.double().sum()).exp()) * info.innovation
    assert mean == pytest.approx(2 * (classes - 1), rel=1e-6)


@pytest.mark.parametrize("curvature", ["exact", "sampled"])
def test_a_consistent_filter_s_innovations_and_gate(curvature):
    """Weights drawn from the prior: ν per degree of freedom is 1 on average, and the gate opens as for all classes."""
    ratios, gated = [], 0
    for seed in range(150):
        torch.manual_seed(seed)
        model, spread = nn.Linear(5, 10).double(), 0.05
        kf = KalmanFilter(
            model,
            KalmanConfig(
                covariance="full",
                initial_variance=spread,
                bound_prior=False,
                curvature=curvature,
                gate_quantile=0.99,
            ),
        )
        state = kf.init()
        truth = state.belief.mean + spread**0.5 * torch.randn(len(state.belief.mean)).double()
        for _ in range(4):
            x = torch.randn(2, 5).double()
            y = torch.distributions.Categorical(logits=kf.adapter.outputs(truth, x)).sample()
            state, info = kf.update(state, x, y)
            ratios.append(info.innovation / info.degrees_of_freedom)
            gated += info.damping < 1
    ratios = torch.tensor(ratios)
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / len(ratios) ** 0.5
    assert float(ratios.std()) / len(ratios) ** 0.5 < 0.05  # so that 9 in place of 1 is seen
    assert gated / len(ratios) < 0.15


def test_classes_that_an_example_does_not_have_count_for_nothing():
    outputs = torch.stack([torch.linspace(2.0, 0.0, 12), 40.0 * (torch.arange(12) == 3)]).double()
    targets = torch.tensor([0, 3])
    config = KalmanConfig(curvature="truncated", curvature_epsilon=0.05)
    both = project_outputs(config.curvature_settings, FAMILY, outputs, targets)
    alone = [
        project_outputs(config.curvature_settings, FAMILY, outputs[i : i + 1], targets[i : i + 1]) for i in range(2)
    ]
    assert both.degrees_of_freedom.tolist() == [int(one.degrees_of_freedom) for one in alone]
    assert both.degrees_of_freedom[1] == 1  # its class against the rest
    assert [one.outputs.shape[1] - 1 for one in alone] == both.degrees_of_freedom.tolist()


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 0.3])
def test_directions_are_the_slopes_of_what_is_seen(epsilon):
    outputs, targets = outputs_of()
    for curvature in ("truncated", "sampled"):
        config = KalmanConfig(curvature=curvature, curvature_epsilon=epsilon)
        seen = project_outputs(config.curvature_settings, FAMILY, outputs, targets)
        slope = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).double()
        moved = [
            project_outputs(config.curvature_settings, FAMILY, outputs + h * slope, targets).outputs
            for h in (1e-6, -1e-6)
        ]
        numeric = (moved[0] - moved[1]) / 2e-6
        directions = matrix(seen.directions, len(outputs))[:, : seen.outputs.shape[1]]
        exact = (directions @ slope.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 0.3])
def test_truncation_loses_information_within_its_bound(epsilon):
    outputs, targets = outputs_of(size=6)
    seen = project_outputs(
        KalmanConfig(curvature="truncated", curvature_epsilon=epsilon).curvature_settings, FAMILY, outputs, targets
    )
    d = matrix(seen.directions, len(outputs))
    coarse = d.mT @ seen.family.variance(seen.outputs) @ d
    lost = fisher(outputs) - coarse
    assert float(torch.linalg.eigvalsh(lost).min()) > -1e-12
    kept = d[:, 1:].sum(1) > 0  # classes seen by themselves
    steps = torch.randn(200, *outputs.shape, generator=torch.Generator().manual_seed(2)).double()
    quadratic = torch.einsum("sbi,bij,sbj->sb", steps, lost, steps)
    rest = (outputs.softmax(-1) * ~kept).sum(-1)
    highest = steps.masked_fill(kept, -torch.inf).amax(-1)
    lowest = steps.masked_fill(kept, torch.inf).amin(-1)
    assert (quadratic <= rest / 4 * (highest - lowest).square() + 1e-12).all()
    assert float(quadratic.max()) > 0
    assert seen.lumped == pytest.approx(float(rest.max()))
    assert seen.lumped <= epsilon + 1e-12


def test_truncation_keeps_the_label_however_unlikely_and_no_more_classes_than_told():
    outputs = torch.zeros(2, 50).double()
    outputs[:, 3] = 30.0
    targets = torch.tensor([3, 17])
    seen = project_outputs(KalmanConfig(curvature="truncated").curvature_settings, FAMILY, outputs, targets)
    assert seen.directions.num_rows == 3  # the rest, the likely class, the label
    assert seen.directions.rows_per_example.tolist() == [2, 3]
    assert matrix(seen.directions, len(outputs))[1, 2, 17] == 1.0
    assert seen.targets.tolist() == [1, 2]
    flat = project_outputs(
        KalmanConfig(curvature="truncated", curvature_classes=5).curvature_settings,
        FAMILY,
        torch.zeros(1, 50).double(),
        targets[:1],
    )
    assert flat.directions.num_rows in (6, 7)  # with the label or beside it
    assert flat.lumped == pytest.approx(1 - (flat.directions.num_rows - 1) / 50)
    few = project_outputs(
        KalmanConfig(curvature="truncated").curvature_settings, FAMILY, torch.zeros(1, 5).double(), targets[:1]
    )
    assert few.directions.num_rows == 5  # the least likely class is what is left, by itself
    assert few.lumped == 0.0


@pytest.mark.parametrize(
    ("setting", "outputs", "rows", "directions"),
    [
        ({}, 10, 10, 9),
        ({"likelihood": "bernoulli"}, 10, 10, 10),
        ({"curvature": "truncated"}, 2, 2, 1),
        ({"curvature": "truncated", "curvature_classes": 5}, 50, 7, 7),
        ({"curvature": "truncated", "curvature_classes": 5}, 4, 4, 4),
        ({"curvature": "sampled", "curvature_draws": 4}, 2, 5, 5),
    ],
)
def test_rows_known_beforehand(setting, outputs, rows, directions):
    config = KalmanConfig(**setting)
    assert (
        num_rows(config.curvature_settings, outputs),
        num_directions(config.curvature_settings, config.likelihood, outputs),
    ) == (rows, directions)


@pytest.mark.parametrize("moved", [False, True])
def test_probes_average_to_the_fisher_information(moved):
    outputs, targets = outputs_of(size=3, m=5, scale=1.5)
    odds = torch.tensor([[0.3], [-1.0], [2.0]]).double() if moved else None
    config = KalmanConfig(curvature="sampled", curvature_draws=4)
    actual = []
    for seed in range(5000):
        seen = project_outputs(config.curvature_settings, FAMILY, outputs, targets, seed)
        actual.append(seen.probes.factor(seen.outputs if odds is None else odds) @ matrix(seen.directions, 3))
    draws = torch.cat(actual, 1)  # (B, S, m)
    products = draws.unsqueeze(-1) * draws.unsqueeze(-2) * 4  # each probe was divided by √4
    probs = outputs.softmax(-1)
    if moved:
        probs = probs.scatter(1, targets[:, None], 0.0)
        probs = probs / probs.sum(1, keepdim=True) * (-odds).sigmoid()
        probs = probs.scatter(1, targets[:, None], odds.sigmoid())
    expected = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    error = products.std(1) / draws.shape[1] ** 0.5
    assert ((products.mean(1) - expected).abs() < 5 * error + 1e-12).all()


def test_signs_average_to_the_identity():
    outputs = torch.zeros(2, 6).double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([matrix(random_signs(outputs, 8, generator), 2) for _ in range(2000)], 1) * 8**0.5
    mean = (draws.mT @ draws) / draws.shape[1]
    error = (1.0 - torch.eye(6).double()) / draws.shape[1] ** 0.5
    assert ((mean - torch.eye(6).double()).abs() <= 5 * error).all()


def test_length_of_the_odds_direction():
    outputs, targets = outputs_of()
    direction = matrix(
        project_outputs(KalmanConfig(curvature="sampled").curvature_settings, FAMILY, outputs, targets).directions, 4
    )[:, :1]
    torch.testing.assert_close(log_odds_direction_square(outputs, targets), direction.square().sum((1, 2)))


def model_of(m, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, m)).double()


def batch_of(size, m, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=g).double(), torch.randint(m, (size,), generator=g)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "low_rank"])
def test_with_two_classes_the_sampled_mean_is_the_exact_one(covariance):
    """The label's log odds are then all there is."""
    x, y = batch_of(5, 2)
    means = {}
    for curvature in ("exact", "sampled"):
        config = KalmanConfig(
            covariance=covariance, curvature=curvature, initial_variance=0.3, bound_prior=False, rank=60, damping=False
        )
        kf = KalmanFilter(model_of(2), config)
        state, _ = kf.update(kf.init(), x, y)
        means[curvature] = state.belief.mean
    torch.testing.assert_close(means["sampled"], means["exact"], rtol=1e-6, atol=1e-8)


def test_sampled_covariance_with_many_probes_is_the_exact_one():
    """At the prior mean, information form: its precision is linear in the observation's."""
    x, y = batch_of(3, 4)
    setting = {
        "covariance": "diagonal_information",
        "initial_variance": 0.3,
        "bound_prior": False,
        "expansion": "mean",
        "damping": False,
    }
    exact = KalmanFilter(model_of(4), KalmanConfig(**setting))
    expected = 1 / exact.update(exact.init(), x, y)[0].belief.variance
    actual = []
    for seed in range(60):
        kf = KalmanFilter(model_of(4), KalmanConfig(curvature="sampled", curvature_draws=8, seed=seed, **setting))
        actual.append(1 / kf.update(kf.init(), x, y)[0].belief.variance)
    draws = torch.stack(actual)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error + 1e-9).all()
    assert float((draws.mean(0) / expected - 1).abs().max()) < 0.2


def test_truncated_update_is_the_exact_one_as_epsilon_vanishes():
    x, y = batch_of(3, 8)
    beliefs = {}
    for epsilon in (None, 1e-12, 0.5):
        config = KalmanConfig(covariance="diagonal", initial_variance=0.5, bound_prior=False)
        if epsilon:
            config = dataclasses.replace(config, curvature="truncated", curvature_epsilon=epsilon)
        kf = KalmanFilter(model_of(8), config)
        state, info = kf.update(kf.init(), x, y)
        beliefs[epsilon] = state.belief
        assert (info.lumped > 1e-6) == (epsilon == 0.5)
    torch.testing.assert_close(beliefs[1e-12].mean, beliefs[None].mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(beliefs[1e-12].variance, beliefs[None].variance, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(beliefs[0.5].variance, beliefs[None].variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature", ["truncated", "sampled"])
def test_a_vocabulary_of_classes(curvature):
    """An m×m matrix would take 10 GB; tied heads and probes take megabytes."""
    m = 50_000
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, m))
    x, y = (t.float() if t.is_floating_point() else t for t in batch_of(2, m))
    kf = KalmanFilter(model, KalmanConfig(covariance="diagonal", curvature=curvature, curvature_classes=20))
    state, info = kf.update(kf.init(x), x, y)
    after, again = kf.update(state, x, y)
    assert torch.isfinite(after.belief.mean).all()
    assert (after.belief.variance <= state.belief.variance).all()
    assert float(again.log_loss.sum()) < float(info.log_loss.sum())
    assert info.lumped == (pytest.approx(1.0, abs=1e-2) if curvature == "truncated" else 0.0)


@pytest.mark.parametrize("curvature", ["exact", "truncated"])
def test_the_memory_budget_changes_only_rounding(curvature):
    x, y = batch_of(90, 12)
    results, pieces = [], []
    for budget in (None, 2**24 + 2**17):
        kf = KalmanFilter(
            model_of(12),
            KalmanConfig(curvature=curvature, bytes_budget=budget, initial_variance=0.2, bound_prior=False),
        )
        state, info = kf.update(kf.init(), x, y)
        results.append((*state.belief, torch.tensor(info.innovation), info.outputs))
        pieces.append(len(list(kf.linearize.chunks(state.belief.mean, x, 12))))
    assert pieces[0] == 1
    assert pieces[1] > 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_look_ahead_at_how_many_classes_each_example_needs_changes_nothing(covariance, monkeypatch):
    """A large graph goes forward once without being kept, and each example is then pulled back as often as it needs."""
    x, y = batch_of(20, 12)
    model = model_of(12)
    with torch.no_grad():
        model[-1].weight.mul_(8.0)  # so that some examples need few classes
    config = KalmanConfig(curvature="truncated", covariance=covariance, initial_variance=0.05, bound_prior=False)
    actual, asked = [], []
    for limit in (None, 1):
        if limit:
            monkeypatch.setattr(linearizer, "MAX_PASS_BYTES", limit)
        kf = KalmanFilter(model, config)
        state = kf.init()
        kf.linearize.prepare(state.belief.mean, x)
        needed, _, _ = kf._rows_per_example(state, state.belief.mean, Batch.of(x, y), 12)
        asked.append(needed)
        state, info = kf.update(state, x, y)
        actual.append((*state.belief, info.log_loss, torch.tensor(info.lumped)))
    assert len(set(asked[0])) == 1
    assert len(set(asked[1])) > 1
    assert max(asked[1]) <= asked[0][0]
    torch.testing.assert_close(actual[0], actual[1], rtol=1e-8, atol=1e-10)


def test_probes_need_their_batch_and_follow_the_seed():
    x, y = batch_of(5, 12)
    actual = []
    for seed in (0, 0, 1):
        config = KalmanConfig(
            covariance="diagonal", curvature="sampled", seed=seed, initial_variance=0.2, bound_prior=False
        )
        kf = KalmanFilter(model_of(12), config)
        actual.append(kf.update(kf.init(), x, y)[0].belief)
    assert torch.equal(actual[0].variance, actual[1].variance)
    assert not torch.equal(actual[0].variance, actual[2].variance)
    torch.testing.assert_close(actual[0].mean, actual[2].mean)  # the mean sees no probes


def test_large_batches_follow_in_parts_that_are_exact_for_a_full_covariance():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    x, y = torch.randn(300, 3).double(), torch.randn(300, 2).double()  # 600 rows, several parts
    results = []
    for size in (300, 1):
        config = KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=2.0, noise_variance=0.5)
        kf = KalmanFilter(model, config)
        state = kf.init()
        for start in range(0, 300, size):
            state, _ = kf.update(state, x[start : start + size], y[start : start + size])
        results.append(state.belief)
    torch.testing.assert_close(results[0].mean, results[1].mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0].covariance, results[1].covariance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"curvature": "some"}, r"`curvature` must be one of exact, truncated, sampled, got 'some'\."),
        ({"curvature_epsilon": 0.0}, r"`curvature_epsilon` must lie strictly between 0 and 1, got 0\.0\."),
        ({"curvature_draws": 0}, r"`curvature_draws` must be a whole number >= 1, got 0\."),
        ({"curvature_classes": 2.5}, r"`curvature_classes` must be a whole number >= 1, got 2\.5\."),
        ({"outputs_per_pass": 0}, r"`outputs_per_pass` must be a whole number >= 1, got 0\."),
        ({"bytes_budget": -1}, r"`bytes_budget` must be a whole number >= 1, got -1\."),
        (
            {"curvature": "sampled", "likelihood": "gaussian"},
            r"`curvature` 'sampled' needs `likelihood` 'categorical' and `noise` 'exponential_family', got 'gaussian'",
        ),
        ({"curvature": "truncated", "noise": "ema_taylor"}, r"`curvature` 'truncated' needs .*, got 'categorical' and"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        KalmanConfig(**fields)
