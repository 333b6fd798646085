"""The prior of an adapter trained elsewhere, against dense float64 formulas."""

import copy
import dataclasses
import math

import peft
import pytest
import torch
from oracles import dense_jacobian, linear_posterior, log_evidence
from peft import LoraConfig, get_peft_model
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.filtering.state import FilterState
from bayes_kf.inference.fitting.passes import prior_evidence
from bayes_kf.inference.heldout.covariance_size import choose_size, with_size
from bayes_kf.inference.heldout.heldout_examples import heldout_outputs
from bayes_kf.inference.heldout.sharpness import choose_sharpness
from bayes_kf.inference.measurement_model.noise import NoiseState
from bayes_kf.models.adapter import AdapterModel

EXACT = ("full", "low_rank", "block_diagonal")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(count=6, size=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, generator=g).double(), torch.randint(3, (size,), generator=g)) for _ in range(count)]


def curvature(model, batches):
    """Σ JᵀVJ at the model's weights, (n, n)."""
    total = 0.0
    for x, _ in batches:
        outputs, jacobian = dense_jacobian(model, lambda m, x=x: m(x))
        p = outputs.softmax(1)
        v = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        total = total + (jacobian.mT @ v @ jacobian).sum(0)
    return total


def config_of(covariance):
    extra = {"rank": 40} if covariance == "low_rank" else {}
    return bkf.KalmanConfig(covariance=covariance, noise_variance=1.0, temperature=1.0, **extra)


@pytest.mark.parametrize("covariance", ["full", "low_rank"])
def test_evidence_and_covariance_are_those_of_the_dense_laplace_approximation(covariance):
    model, batches = network(), data()
    posterior = bkf.fit(model, batches, config_of(covariance), start="trained", progress=False)
    h, mean = curvature(model, batches), AdapterModel(model).vector()
    torch.testing.assert_close(posterior.mean_vector, mean, rtol=0, atol=0)
    width_of = {}
    prior = posterior.state.prior.variance
    chosen = int(posterior.history["evidence"].argmax())
    unit = prior / prior_evidence.PRIOR_SCALES[chosen]
    for width in prior_evidence.PRIOR_SCALES:
        p0 = width * unit
        inner = torch.eye(len(mean)).double() + p0.sqrt()[:, None] * h * p0.sqrt()
        width_of[width] = -0.5 * float((mean.square() / p0).sum() + torch.logdet(inner))
    expected = torch.tensor(list(width_of.values()), dtype=torch.float64)
    torch.testing.assert_close(posterior.history["evidence"], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        posterior.covariance_matrix(), torch.linalg.inv(h + torch.diag(1.0 / prior)), rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("covariance", EXACT)
@pytest.mark.parametrize("width", [1e-3, 0.1, 30.0])
def test_a_scaled_prior_is_a_pass_under_that_prior(covariance, width):
    """One module: a block is the whole."""
    torch.manual_seed(0)
    model, batches = nn.Linear(3, 3).double(), data()
    narrow = bkf.KalmanConfig(covariance=covariance, initial_variance=0.5, bound_prior=False, rank=40)
    wide = dataclasses.replace(narrow, initial_variance=0.5 * width)
    before, after = (bkf.fit(model, batches, c, start="trained", progress=False) for c in (narrow, wide))
    widened = prior_evidence.scale_prior(before.state, width)
    torch.testing.assert_close(widened.belief.covariance_matrix(), after.covariance_matrix(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(widened.prior.variance, after.state.prior.variance)
    assert "evidence" not in before.history  # the prior was given


@pytest.mark.parametrize("covariance", ["diagonal", "diagonal_information", "diagonal_mixed", "block_diagonal"])
@pytest.mark.parametrize("width", [0.1, 30.0])
def test_a_scaled_prior_is_a_pass_under_that_prior_for_approximate_structures(covariance, width):
    """Several blocks, or a diagonal: what the data add must not depend on the prior whose width is chosen later."""
    model, batches = network(), data()
    narrow = bkf.KalmanConfig(covariance=covariance, initial_variance=0.5, bound_prior=False)
    wide = dataclasses.replace(narrow, initial_variance=0.5 * width)
    before, after = (bkf.fit(model, batches, c, start="trained", progress=False) for c in (narrow, wide))
    widened = prior_evidence.scale_prior(before.state, width)
    actual = widened.belief.covariance_matrix()
    torch.testing.assert_close(actual, after.covariance_matrix(), rtol=1e-8, atol=1e-12)
    h = curvature(model, batches)
    if covariance == "block_diagonal":
        return
    expected = 1.0 / (h.diagonal() + 1.0 / (0.5 * width))  # of the generalized Gauss-Newton matrix
    torch.testing.assert_close(actual.diagonal(), expected, rtol=1e-8, atol=1e-12)


def test_evidence_of_linear_regression_is_exact():
    """With the mean at the posterior mode, Laplace's evidence is the evidence: their differences agree."""
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 4, generator=g).double(), torch.randn(30, 1, generator=g).double()
    actual, expected = [], []
    for p0 in (0.05, 0.5, 5.0):
        config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=p0)
        model = nn.Linear(4, 1, bias=False).double()
        model.weight.data.zero_()
        batches = list(zip(x.split(5), y.split(5), strict=True))
        mode = bkf.fit(model, batches, config, progress=False)
        mode.apply_to(model)
        state = bkf.fit(model, batches, config, start="trained", progress=False).state
        likelihood = torch.distributions.Normal(x @ model.weight.T.detach(), 1.0).log_prob(y).sum()
        actual.append(float(likelihood) + prior_evidence.log_evidence(state, mode.mean_vector))
        expected.append(float(log_evidence(x, y[:, 0], torch.zeros(4).double(), p0 * torch.eye(4).double(), 1.0)))
    assert actual == pytest.approx(expected, rel=1e-9)


def test_displacement_is_known_for_lora_b_and_saved_modules_only():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    adapter = AdapterModel(model)
    assert torch.equal(
        prior_evidence.displacement_from_init(adapter, adapter.vector())[:8], torch.zeros(8)
    )  # A has not moved
    assert float(prior_evidence.displacement_from_init(adapter, adapter.vector()).abs().max()) == 0.0
    moved = adapter.vector() + 1.0
    actual = adapter.unflatten(prior_evidence.displacement_from_init(adapter, moved))
    for name, part in actual.items():
        expected = 0.0 if "lora_A" in name else 1.0
        torch.testing.assert_close(part, torch.full_like(part, expected))
    nested = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    saved = AdapterModel(get_peft_model(nested, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])))
    for name, part in saved.unflatten(prior_evidence.displacement_from_init(saved, saved.vector() + 1.0)).items():
        torch.testing.assert_close(part, torch.full_like(part, 0.0 if "lora_A" in name else 1.0))
    plain = AdapterModel(nn.Linear(2, 2))
    assert torch.equal(prior_evidence.displacement_from_init(plain, plain.vector()), plain.vector())


UNTOUCHED = [
    peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    peft.LoHaConfig(r=2, target_modules=["0"]),
    peft.LoKrConfig(r=2, target_modules=["0"]),
    peft.OFTConfig(oft_block_size=2, target_modules=["0"]),
    peft.VeraConfig(r=2, target_modules=["0"]),
    peft.RoadConfig(group_size=4, target_modules=["0"]),
    LoraConfig(r=2, target_modules=["0"], lora_bias=True, bias="all", modules_to_save=["2"]),
    LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"),
    LoraConfig(r=2, target_modules=["0"], init_lora_weights="orthogonal"),
    peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0"]),
]


@pytest.mark.parametrize("config", UNTOUCHED, ids=lambda config: config.peft_type.value)
def test_an_untrained_adapter_has_no_displacement(config):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    adapter = AdapterModel(get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), config))
    torch.set_rng_state(before)
    assert float(prior_evidence.displacement_from_init(adapter, adapter.vector()).abs().max()) == 0.0
    assert torch.equal(torch.get_rng_state(), before)  # looking draws no numbers from the caller's generator


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of a LayerNorm
def test_displacement_of_other_tensors_with_known_initial_values():
    """LoRA's own biases start at zero, IA3 at ones, one factor of LoHa at zero, tuned norms where the base's are."""
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    nn.init.normal_(base[1].weight)
    cases = {
        "lora_B.default.bias": LoraConfig(r=2, target_modules=["0"], lora_bias=True),
        "ia3_l": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        "hada_w2_b": peft.LoHaConfig(r=2, target_modules=["0"]),
        "ln_tuning_layers.default.weight": peft.LNTuningConfig(target_modules=["1"]),
    }
    for part, config in cases.items():
        adapter = AdapterModel(get_peft_model(copy.deepcopy(base), config))
        actual = adapter.unflatten(prior_evidence.displacement_from_init(adapter, adapter.vector() + 0.5))
        (moved,) = [tensor for name, tensor in actual.items() if part in name]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5), msg=part)


def test_a_far_trained_adapter_gets_a_wider_prior_than_one_that_hardly_moved():
    batches = data(count=10)
    widths = []
    for scale in (0.05, 3.0):
        model = network()
        for p in model.parameters():
            p.data.mul_(scale)
        posterior = bkf.fit(model, batches, bkf.KalmanConfig(covariance="full"), start="trained", progress=False)
        widths.append(float(posterior.state.prior.variance.log().mean()))
        assert math.isfinite(widths[-1])
    assert widths[0] < widths[1]


@pytest.mark.parametrize("covariance", EXACT)
def test_mean_passes_move_a_trained_mean_to_the_mode_under_the_prior_at_the_initial_weights(covariance):
    """Linear regression, untrained: toward the exact posterior; without LoRA, training is taken to start from zero."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 4, generator=g).double(), torch.randn(40, 1, generator=g).double()
    batches = list(zip(x.split(5), y.split(5), strict=True))
    settings = {"likelihood": "gaussian", "covariance": covariance, "initial_variance": 2.0, "noise_variance": 0.5}
    settings |= {"rank": 4} if covariance == "low_rank" else {}
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    configs = [bkf.KalmanConfig(**settings, temperature=1.0, mean_passes=passes) for passes in (0, 30, 120)]
    stays, moves, longer = (bkf.fit(model, batches, c, start="trained", progress=False) for c in configs)
    zero, before = torch.zeros(4).double(), model.weight.detach().clone()
    mode, cov = linear_posterior(x, y[:, 0], zero, 2.0 * torch.eye(4).double(), 0.5)
    assert torch.equal(stays.mean_vector, before[0])
    assert torch.equal(model.weight.detach(), before)  # the user's model is as it was

    def sds(posterior):
        off = posterior.mean_vector - mode
        return float((off @ torch.linalg.solve(cov, off)).sqrt())

    assert sds(stays) > 3.0  # of the posterior
    assert sds(moves) < 0.1 * sds(stays)
    assert sds(longer) < 0.7 * sds(moves)  # what is left is the steps' own noise, which more passes average away
    torch.testing.assert_close(moves.covariance_matrix(), cov, rtol=1e-8, atol=1e-12)
    assert len(moves.history["fitted_log_loss"]) == 30


def test_mean_passes_of_a_trained_lora_adapter_keep_the_prior_width_of_its_evidence():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.requires_grad)
    batches = data(count=10)
    stays = bkf.fit(model, batches, bkf.KalmanConfig(), start="trained", progress=False)
    moves = bkf.fit(model, batches, bkf.KalmanConfig(mean_passes=2), start="trained", progress=False)
    torch.testing.assert_close(moves.state.prior.variance, stays.state.prior.variance, rtol=0, atol=0)
    gone = stays.mean_vector - prior_evidence.displacement_from_init(stays.kf.adapter, stays.mean_vector)
    torch.testing.assert_close(moves.state.prior.mean, gone, rtol=0, atol=0)

    def objective(posterior):
        adapter, mean, prior = posterior.kf.adapter, posterior.mean_vector, moves.state.prior
        loss = sum(float(nn.functional.cross_entropy(adapter.outputs(mean, x), t, reduction="sum")) for x, t in batches)
        return loss + 0.5 * float(((mean - prior.mean).square() / prior.variance).sum())

    assert objective(moves) < objective(stays)


def test_the_size_of_a_trained_adapter_is_10_or_chosen_by_held_out_data():
    model, batches, held_out = network(), data(count=8), data(count=30, seed=5)
    of_evidence = bkf.fit(model, batches, config_of("full"), start="trained", progress=False)  # at a given temperature
    assert (of_evidence.temperature, "size" in of_evidence.history) == (1.0, False)
    free = dataclasses.replace(config_of("full"), temperature="prequential")
    without = bkf.fit(model, batches, free, start="trained", progress=False)
    precision = torch.linalg.inv(of_evidence.covariance_matrix()) + torch.diag(9.0 / of_evidence.state.prior.variance)
    torch.testing.assert_close(torch.linalg.inv(without.covariance_matrix()), precision, rtol=1e-7, atol=1e-7)
    assert (without.temperature, without.history["size"].tolist()) == (1.0, [10.0])
    chosen = bkf.fit(model, batches, free, start="trained", held_out=held_out, progress=False)
    size = choose_size(of_evidence, held_out, standard_errors=0.0)
    assert chosen.history["size"].tolist() == list(size[:3])
    sized = with_size(of_evidence, size.value)
    sharpness = choose_sharpness([heldout_outputs(sized, held_out)]).value
    assert chosen.softmax_temperature == sharpness != 1.0
    assert torch.equal(without.mean_vector, AdapterModel(model).vector())
    before, after = (log_loss(p, held_out) for p in (sized, chosen))
    assert after < before  # they were learned, in their own curvature too
    widths = [torch.linalg.eigvalsh(p.covariance_matrix()) for p in (chosen, sized)]
    assert (widths[0] < widths[1]).all()
    expected = of_evidence.calibrate(held_out)
    again = without.calibrate(held_out)  # an earlier size is not added to
    torch.testing.assert_close(again.history["size"], expected.history["size"], rtol=1e-6, atol=0)
    torch.testing.assert_close(again.covariance_matrix(), expected.covariance_matrix(), rtol=1e-6, atol=1e-9)


def log_loss(posterior, batches):
    """Of the mean, summed over the examples."""
    adapter, mean = posterior.adapter, posterior.mean_vector
    return sum(float(nn.functional.cross_entropy(adapter.outputs(mean, x), t, reduction="sum")) for x, t in batches)


@pytest.mark.parametrize("one_time", [False, True])
def test_held_out_targets_with_gaussian_noise_are_learned_as_the_closed_form_says(one_time):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    targets = inputs @ torch.randn(4, 1, generator=generator, dtype=torch.float64)
    targets += 0.5 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs[:40], targets[:40]).solution.T)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=0.25, covariance="full")
    batches = [(inputs[k : k + 10], targets[k : k + 10]) for k in range(0, 60, 10)]
    held_out = iter(batches[4:]) if one_time else batches[4:]
    posterior = bkf.fit(model, batches[:4], config, start="trained", held_out=held_out, progress=False)
    prior_precision = 1.0 / posterior.state.prior.variance  # that of the chosen size
    precision = inputs.T @ inputs / 0.25 + torch.diag(prior_precision)
    new, old = inputs[40:], model.weight.detach().T
    expected = old + torch.linalg.solve(precision, new.T @ (targets[40:] - new @ old) / 0.25)
    torch.testing.assert_close(torch.linalg.inv(posterior.covariance_matrix()), precision, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.mean_vector, expected.squeeze(1), rtol=1e-9, atol=1e-9)
    assert int(posterior.state.examples) == 60


def test_an_estimated_noise_variance_stays_as_the_held_out_targets_chose_it():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True) + 0.5 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated", covariance="full")
    batches = [(inputs[k : k + 10], targets[k : k + 10]) for k in range(0, 60, 10)]
    posterior = bkf.fit(model, batches[:4], config, start="trained", held_out=batches[4:], progress=False)
    same_mean = bkf.fit(model, batches[:4], config, start="trained", progress=False).calibrate(batches[4:])
    assert torch.equal(posterior.state.noise.variance, same_mean.state.noise.variance)
    assert torch.equal(posterior.history["size"], same_mean.history["size"])
    assert not torch.equal(posterior.mean_vector, same_mean.mean_vector)


def test_a_prior_or_a_temperature_that_is_given_stays():
    model, batches = network(), data(count=8)
    given = bkf.KalmanConfig(covariance="full", initial_variance=0.5, bound_prior=False)
    posterior = bkf.fit(model, batches, given, start="trained", progress=False)
    expected = curvature(model, batches) + 2.0 * torch.eye(posterior.adapter.num_parameters).double()
    torch.testing.assert_close(torch.linalg.inv(posterior.covariance_matrix()), expected, rtol=1e-7, atol=1e-7)
    assert posterior.temperature == 1.0
    fixed = dataclasses.replace(config_of("full"), temperature=0.7)
    assert bkf.fit(model, batches, fixed, start="trained", progress=False).temperature == 0.7


def test_held_out_data_that_do_not_fit_the_settings_are_refused():
    model, batches = network(), data()
    with pytest.raises(ValueError, match=r"^`temperature` must be 'prequential' with `held_out`, got 1\.0\.$"):
        bkf.fit(model, batches, config_of("full"), start="trained", held_out=batches, progress=False)
    with pytest.raises(ValueError, match=r"^`held_out` must be None or 'latest' with `start` 'prior', got batches"):
        bkf.fit(model, batches, held_out=batches, progress=False)
    with pytest.raises(ValueError, match=r"^`held_out` must be iterable, got int\.$"):
        bkf.fit(model, batches, start="trained", held_out=3, progress=False)
    with pytest.raises(ValueError, match=r"^`loader` must yield at least one batch, got none\.$"):
        bkf.fit(model, batches, start="trained", held_out=[], progress=False)


def test_bad_calibration_data():
    posterior = bkf.fit(network(), data(), config_of("full"), start="trained", progress=False)
    with pytest.raises(ValueError, match=r"^`loader` must yield at least one batch, got none\.$"):
        posterior.calibrate([])
    with pytest.raises(ValueError, match=r"^`loader` must yield targets with every batch, got none in batch 0\.$"):
        posterior.calibrate([torch.zeros(2, 3).double()])


@pytest.mark.parametrize("dynamics", [{"forgetting": 0.99}, {"drift_variance": 0.1}, {"prior_pull": 0.01}])
def test_dynamics_exclude_a_prior_width_chosen_by_evidence(dynamics):
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    name = next(iter(dynamics))
    with pytest.raises(ValueError, match=rf"data that are not forgotten, got `{name}` {dynamics[name]}"):
        bkf.fit(nn.Linear(3, 2), batches, bkf.KalmanConfig(**dynamics), start="trained", progress=False)
    config = bkf.KalmanConfig(**dynamics, initial_variance=0.5)
    assert bkf.fit(nn.Linear(3, 2), batches, config, start="trained", progress=False).state.examples == 4


@pytest.mark.parametrize("name", ["diagonal", "low_rank"])
def test_the_evidence_of_a_million_parameters_is_not_rounded_away(name):
    """Without data, and nothing moved, every width is as good."""
    size = 1_000_000
    prior = DiagonalGaussian(torch.zeros(size), 0.01 + torch.rand(size, generator=torch.Generator().manual_seed(0)))
    config = bkf.KalmanConfig(covariance=name)
    belief = config.structure.from_variance(*prior, rank=2)
    state = FilterState(belief, prior, NoiseState(), prequential_temperature.init(torch.device("cpu")), True, 0, 0)
    for width in (1e-3, 0.1, 10.0):
        actual = prior_evidence.log_evidence(prior_evidence.scale_prior(state, width), torch.zeros(size))
        assert abs(actual) < 0.05
