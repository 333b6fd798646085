"""CLIP as a classifier and as matched pairs, against transformers' own forward pass and dense float64 algebra."""

import copy
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from clip_models import CLASSES, IDS, PROMPTS, images, moved, small_clip
from oracles import dense_jacobian
from peft import LoraConfig, get_peft_model
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model.noise import COVARIANCE_FACTORS, MIN_VARIANCE_SHARE
from bayes_kf.models.batched_forward import outputs_of_draws
from bayes_kf.models.clip import ClipClassifier, FeatureAdapter, MatchedPairs, clip_lora

LABELS = torch.tensor([0, 2, 1, 2])


def peft_outside(**classifier):
    """PEFT's layers put in through the classifier."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return get_peft_model(ClipClassifier(small_clip(), **PROMPTS, **classifier), config)


KINDS = {
    "lora": lambda: ClipClassifier(clip_lora(small_clip()), **PROMPTS),
    "vision lora": lambda: ClipClassifier(clip_lora(small_clip(), encoders=["vision"]), **PROMPTS),
    "image adapter": lambda: ClipClassifier(small_clip(), **PROMPTS, image_adapter=FeatureAdapter(6).double()),
    "text adapter": lambda: ClipClassifier(small_clip(), **PROMPTS, text_adapter=FeatureAdapter(6).double()),
    "both adapters": lambda: ClipClassifier(
        small_clip(), **PROMPTS, image_adapter=FeatureAdapter(6, 2).double(), text_adapter=FeatureAdapter(6, 2).double()
    ),
    "blend": lambda: ClipClassifier(
        small_clip(), **PROMPTS, image_adapter=FeatureAdapter(6, form="blend", blend=0.7).double()
    ),
    "lora and adapter": lambda: ClipClassifier(
        clip_lora(small_clip(), encoders=["text"]), **PROMPTS, image_adapter=FeatureAdapter(6).double()
    ),
    "peft outside": peft_outside,
}


@pytest.fixture(params=KINDS)
def classifier(request):
    return moved(KINDS[request.param]())


def pairs_of(classifier, scale=1.0):
    """Pairs around the same CLIP and adapters."""
    return MatchedPairs(classifier.clip, classifier.image_adapter, classifier.text_adapter, scale=scale)


# the classifier


@pytest.mark.parametrize("lora", [False, True])
def test_logits_are_transformers_own(lora):
    clip = moved(clip_lora(small_clip())) if lora else small_clip()
    expected = clip(pixel_values=images(), **PROMPTS).logits_per_image
    torch.testing.assert_close(ClipClassifier(clip, **PROMPTS)(images()), expected, rtol=1e-12, atol=1e-12)


def test_a_given_scale():
    cosines = ClipClassifier(small_clip(), **PROMPTS, logit_scale=1.0)(images())
    assert bool((cosines.abs() <= 1).all())
    torch.testing.assert_close(ClipClassifier(small_clip(), **PROMPTS, logit_scale=7.0)(images()), 7.0 * cosines)


def test_several_prompts_a_class_are_averaged_as_unit_vectors():
    clip = small_clip()
    ids = torch.stack([IDS, IDS.flip(0)], 1)  # (m, 2, T)
    classifier = ClipClassifier(clip, ids, (ids > 0).long())
    assert classifier.num_classes == CLASSES
    text = F.normalize(clip.get_text_features(**PROMPTS).pooler_output, dim=-1)
    mean = F.normalize((text + text.flip(0)) / 2, dim=-1)
    image = F.normalize(clip.get_image_features(pixel_values=images()).pooler_output, dim=-1)
    expected = clip.logit_scale.exp() * image @ mean.T
    torch.testing.assert_close(classifier(images()), expected, rtol=1e-12, atol=1e-12)


def test_adapters_act_between_encoder_and_cosine():
    clip, image_adapter, text_adapter = small_clip(), moved(FeatureAdapter(6).double()), FeatureAdapter(6).double()
    moved(text_adapter, seed=1)
    classifier = ClipClassifier(clip, **PROMPTS, image_adapter=image_adapter, text_adapter=text_adapter)
    image = image_adapter(clip.get_image_features(pixel_values=images()).pooler_output)
    text = text_adapter(clip.get_text_features(**PROMPTS).pooler_output)
    expected = clip.logit_scale.exp() * F.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(classifier(images()), expected, rtol=1e-12, atol=1e-12)


def test_a_custom_encoder():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.image_net, self.text_net = nn.Linear(5, 4), nn.Embedding(12, 4)

        def get_image_features(self, pixel_values):
            return self.image_net(pixel_values)

        def get_text_features(self, input_ids, attention_mask):
            return (self.text_net(input_ids) * attention_mask.unsqueeze(-1)).sum(1)

    torch.manual_seed(0)
    model, x = Two(), torch.randn(4, 5)
    logits = ClipClassifier(model, **PROMPTS, logit_scale=3.0)(x)
    text = torch.stack([model.text_net.weight[row[row > 0]].sum(0) for row in IDS])
    torch.testing.assert_close(logits, 3.0 * F.cosine_similarity(model.image_net(x)[:, None], text[None], dim=-1))
    with pytest.raises(ValueError, match="`logit_scale` must be given for a `clip` without its own, got None"):
        ClipClassifier(model, **PROMPTS)


# kept prompts


def counted(classifier):
    """The number of calls of the text encoder."""
    return patch.object(classifier.clip, "get_text_features", wraps=classifier.clip.get_text_features)


@pytest.mark.parametrize("kind", ["image adapter", "text adapter", "vision lora"])
def test_a_frozen_text_encoder_is_called_once(kind):
    classifier = KINDS[kind]()
    with counted(classifier) as calls:
        kf = bkf.KalmanFilter(classifier, bkf.KalmanConfig(rank=4))
        state, _ = kf.update(kf.init(), images(), LABELS)
        bkf.Posterior(kf, state).predict(images(), method="sampled", num_samples=3)
        assert calls.call_count == 1


def test_a_trainable_text_encoder_is_in_the_graph():
    classifier = moved(KINDS["lora"]())
    with counted(classifier) as calls:
        classifier(images())
        classifier(images()).sum().backward()
        assert calls.call_count == 2
    gradients = {name: p.grad for name, p in classifier.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(g.any()) for name, g in gradients.items() if "lora_" in name)


def test_cached_prompts_follow_the_weights():
    clip = small_clip()
    classifier, weight = ClipClassifier(clip, **PROMPTS), clip.text_projection.weight
    before = classifier(images())
    with torch.no_grad():
        weight[0].neg_()
    after = classifier(images())
    torch.testing.assert_close(after, ClipClassifier(clip, **PROMPTS)(images()), rtol=0, atol=0)
    assert not torch.allclose(before, after)
    weight.data.neg_()  # which nothing tells of
    torch.testing.assert_close(classifier(images()), after, rtol=0, atol=0)
    classifier.forget_prompts()
    torch.testing.assert_close(classifier(images()), -after, rtol=1e-12, atol=1e-12)
    assert classifier.float()(images(dtype=torch.float32)).dtype == torch.float32


def test_lora_in_the_text_encoder_after_a_forward_pass():
    clip = small_clip()
    classifier = ClipClassifier(clip, **PROMPTS)
    before = classifier(images())
    lora = clip_lora(clip, encoders=["text"])  # into the modules that the classifier holds
    torch.testing.assert_close(classifier(images()), before, rtol=0, atol=0)
    moved(lora)
    assert not torch.allclose(classifier(images()), before)
    torch.testing.assert_close(classifier(images()), clip(pixel_values=images(), **PROMPTS).logits_per_image)


def test_cached_prompts_have_no_dropout_and_serve_autograd():
    clip = small_clip(attention_dropout=0.5)
    expected = ClipClassifier(clip, **PROMPTS)(images())
    classifier = ClipClassifier(clip, **PROMPTS, image_adapter=FeatureAdapter(6).double()).train()
    with torch.inference_mode():
        classifier.prompt_features()
    actual = classifier(images())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.sum().backward()
    assert all(module.training for module in classifier.modules())


def test_a_copy_caches_prompts_of_its_own():
    classifier = ClipClassifier(small_clip(), **PROMPTS)
    before = classifier(images())
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        other.clip.text_projection.weight.neg_()
    torch.testing.assert_close(other(images()), -before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(classifier(images()), before, rtol=0, atol=0)


# what the filter needs of it


def test_the_jacobian_is_autograds(classifier):
    outputs, expected = dense_jacobian(classifier, lambda m: m(images()))
    adapter = bkf.AdapterModel(classifier)
    linearized = Linearizer(adapter)(adapter.vector(), images())
    torch.testing.assert_close(linearized.outputs, outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linearized.jacobian().dense(), expected, rtol=1e-9, atol=1e-9)
    in_text = [name for name in adapter.names if "text_model" in name]
    assert {adapter.linearized_by[name] for name in in_text} <= {"general"}
    assert {adapter.linearized_by[name] for name in adapter.names if name not in in_text} == {"hooks"}


def test_the_jacobian_of_pairs_is_autograds():
    for kind in ("lora", "both adapters", "lora and adapter"):
        classifier = moved(KINDS[kind]())
        pairs, (batch, _) = pairs_of(classifier), classifier.matched(images(), LABELS)
        outputs, expected = dense_jacobian(pairs, lambda m, batch=batch: m(**batch))
        adapter = bkf.AdapterModel(pairs)
        linearized = Linearizer(adapter)(adapter.vector(), batch)
        torch.testing.assert_close(linearized.outputs, outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(linearized.jacobian().dense(), expected, rtol=1e-9, atol=1e-9)
        assert set(adapter.linearized_by.values()) == {"hooks"}  # texts come one an example here


def test_examples_do_not_mix(classifier):
    alone = torch.cat([classifier(image[None]) for image in images()])
    torch.testing.assert_close(classifier(images()), alone, rtol=1e-11, atol=1e-11)


def test_draws_run_at_once(classifier):
    adapter = bkf.AdapterModel(classifier)
    noise = torch.randn(5, adapter.num_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = adapter.vector() + 0.1 * noise
    expected = torch.stack([adapter.outputs(draw, images()) for draw in draws])
    torch.testing.assert_close(outputs_of_draws(adapter, draws, images()), expected, rtol=1e-9, atol=1e-9)
    assert expected.std(0).min() > 0


# matched pairs


def test_pairs_are_the_diagonal_of_the_similarities():
    clip = moved(clip_lora(small_clip()))
    classifier = ClipClassifier(clip, **PROMPTS)
    batch, ones = classifier.matched(images(), LABELS)
    whole = clip(pixel_values=images(), **{k: v for k, v in batch.items() if k != "pixel_values"})
    expected = whole.logits_per_image.diagonal() / clip.logit_scale.exp()
    torch.testing.assert_close(MatchedPairs(clip)(**batch), expected.unsqueeze(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(MatchedPairs(clip, scale=4.0)(**batch), 4 * expected.unsqueeze(1), rtol=1e-12, atol=0)
    assert torch.equal(ones, torch.ones(4, 1))
    assert torch.equal(classifier.matched(images(), LABELS, scale=4.0)[1], torch.full((4, 1), 4.0))
    picked = classifier(images()).gather(1, LABELS[:, None]) / clip.logit_scale.exp()
    torch.testing.assert_close(MatchedPairs(clip)(**batch), picked, rtol=1e-12, atol=1e-12)
    without_mask = MatchedPairs(clip)(images(), IDS[[2]].expand(4, -1))
    torch.testing.assert_close(without_mask, MatchedPairs(clip)(images(), IDS[[2]].expand(4, -1), torch.ones(4, 5)))


def test_matched_takes_the_first_of_several_prompts():
    ids = torch.stack([IDS, IDS.flip(0)], 1)
    batch, _ = ClipClassifier(small_clip(), ids).matched(images(), LABELS)
    assert torch.equal(batch["input_ids"], IDS[LABELS])
    assert torch.equal(batch["attention_mask"], torch.ones(4, 5, dtype=torch.int64))


def test_pairs_are_updated_by_equation_12():
    """Adaptive noise R ← βR + (1 − β) mean(e² + JPJᵀ) of the batch, then the Kalman update: dense, in float64."""
    classifier = moved(KINDS["both adapters"]())
    pairs = pairs_of(classifier)
    n = sum(p.numel() for p in pairs.parameters() if p.requires_grad)
    config = bkf.KalmanConfig(
        likelihood="gaussian", covariance="full", noise="ema_taylor", beta=0.9, initial_variance=0.04, damping=False
    )
    kf = bkf.KalmanFilter(pairs, config)
    state = kf.init()
    mean, covariance, noise = kf.adapter.vector(), 0.04 * torch.eye(n, dtype=torch.float64), 1.0
    for seed in range(3):
        batch, ones = classifier.matched(images(seed=seed), LABELS)
        kf.adapter.assign(mean)
        outputs, jacobian = dense_jacobian(pairs, lambda m, batch=batch: m(**batch))
        kf.adapter.assign(state.prior.mean)
        h, e = jacobian[:, 0], ones.squeeze(1).double() - outputs.squeeze(1)
        prior = h @ covariance @ h.T
        noise = 0.9 * noise + 0.1 * float((e.square() + prior.diagonal()).mean())
        gain = covariance @ h.T @ torch.linalg.inv(prior + noise * torch.eye(4, dtype=torch.float64))
        mean, covariance = mean + gain @ e, covariance - gain @ h @ covariance
        state, _ = kf.update(state, batch, ones)
        assert float(state.noise.covariance) == pytest.approx(noise, rel=1e-10)
        torch.testing.assert_close(state.belief.mean, mean, rtol=1e-9, atol=1e-9)
        actual = state.belief.covariance_matrix()
        torch.testing.assert_close(actual, covariance, rtol=1e-9, atol=1e-9)


def test_the_gate_down_weights_a_wrong_pair():
    """A pair whose innovation is beyond the χ² quantile has its noise inflated by the ratio."""
    classifier = moved(KINDS["image adapter"]())
    pairs, one = pairs_of(classifier), images(1)
    with torch.no_grad():
        label = classifier(one).argmin(1)  # the text that fits worst
    batch, ones = classifier.matched(one, label)
    setting = {"likelihood": "gaussian", "covariance": "full", "noise_variance": 1e-3, "initial_variance": 1e-4}
    quantile = 0.9
    config = bkf.KalmanConfig(**setting, gate_quantile=quantile, damping=False)
    kf = bkf.KalmanFilter(pairs, config)
    state, info = kf.update(kf.init(), batch, ones)
    outputs, jacobian = dense_jacobian(pairs, lambda m: m(**batch))
    h, e = jacobian[0, 0], 1.0 - float(outputs)
    prior = 1e-4 * float(h @ h)
    innovation = e**2 / (prior + 1e-3)
    bound = 2.7055434540954135  # χ²₁ at 0.9
    assert innovation > bound  # otherwise nothing is tested
    assert info.innovation == pytest.approx(innovation, rel=1e-9)
    assert info.damping == pytest.approx(bound / innovation, rel=1e-9)
    inflated = 1e-3 * innovation / bound
    expected = kf.adapter.vector() + 1e-4 * h * e / (prior + inflated)
    torch.testing.assert_close(state.belief.mean, expected, rtol=1e-9, atol=1e-12)


def test_noise_of_pairs_may_be_estimated():
    """From the mean square of the first batch, by a step on log σ² for the factor on J P Jᵀ that says it best."""
    classifier = moved(KINDS["lora"]())
    pairs, (batch, ones) = pairs_of(classifier), classifier.matched(images(), LABELS)
    config = bkf.KalmanConfig(
        likelihood="gaussian", covariance="full", noise_variance="estimated", initial_variance=1e-3, temperature=1.0
    )
    kf = bkf.KalmanFilter(pairs, config)
    state, _ = kf.update(kf.init(), batch, ones)
    outputs, jacobian = dense_jacobian(pairs, lambda m: m(**batch))
    squares, spread = (1.0 - outputs[:, 0]).square(), 1e-3 * jacobian[:, 0].square().sum(1)
    actual = []
    for trust in COVARIANCE_FACTORS:
        guess = torch.maximum(squares.mean() - trust * spread.mean(), MIN_VARIANCE_SHARE * spread.mean())
        total = trust * spread + guess
        share = guess / total
        step = 2.0 * ((squares / total - 1.0) * share).sum() / (1.0 + 2.0 * share.square().sum())
        actual.append((float((total.log() + squares / total).sum()), guess * step.clamp(-1.0, 1.0).exp()))
    torch.testing.assert_close(state.noise.variance[0], min(actual)[1], rtol=1e-9, atol=0)


def test_a_posterior_from_pairs_predicts_classes():
    classifier = KINDS["lora"]()
    pairs, batch = pairs_of(classifier), classifier.matched(images(), LABELS)
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated", initial_logit_sd=0.3)
    learned = bkf.fit(pairs, [batch] * 3, config, progress=False)
    assert learned.adapter.names == bkf.AdapterModel(classifier).names
    with torch.no_grad():
        before = pairs(**batch[0]).mean()
    learned.apply_to(pairs)
    assert float(pairs(**batch[0]).mean().detach()) > float(before)  # images came closer to their texts
    kf = bkf.KalmanFilter(classifier, bkf.KalmanConfig(temperature=1.0))
    actual = bkf.Posterior(kf, learned.state).predict(images(), method="mean")
    torch.testing.assert_close(actual.probs, classifier(images()).softmax(1).detach())


# end to end


def problem(size=48):
    """Images of three classes, told apart by which colour is strong."""
    labels = torch.arange(size) % CLASSES
    actual = 0.3 * images(size, torch.float32)
    actual[torch.arange(size), labels] += 1.0
    return [(actual[i : i + 8], labels[i : i + 8]) for i in range(0, size, 8)]


@pytest.mark.parametrize("adapter", ["lora", "features"])
def test_fit_predict_evaluate_report(adapter, tmp_path):
    wide = FeatureAdapter(6, 6)
    classifier = KINDS["lora"]() if adapter == "lora" else ClipClassifier(small_clip(), **PROMPTS, image_adapter=wide)
    classifier, data = classifier.float(), problem()
    config = bkf.KalmanConfig.dataset(rank=10, initial_logit_sd=3.0)
    posterior = bkf.fit(classifier, data, config, progress=False)
    actual = posterior.predict_loader(data)
    before = torch.cat([F.cross_entropy(classifier(x), y, reduction="none") for x, y in data]).mean()
    assert -float(actual.log_prob.mean()) < 0.7 * float(before.detach())
    torch.testing.assert_close(actual.entropy, actual.aleatoric + actual.epistemic, rtol=1e-4, atol=1e-5)
    assert float(actual.epistemic.min()) > -1e-6
    report = bkf.evaluate(posterior, data, ood={"noise": [5 * images(16, torch.float32, seed=7)]}, num_simulations=39)
    assert report.scores["accuracy"] == pytest.approx((actual.probs.argmax(1) == actual.targets).double().mean().item())
    assert 0 <= report.scores["ood_noise_auroc"] <= 1
    assert 0 <= report.scores["ece"] <= 1
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_posterior_is_saved_and_loaded(tmp_path):
    classifier, data = KINDS["lora"]().float(), problem(24)
    posterior = bkf.fit(classifier, data, bkf.KalmanConfig(rank=5), progress=False)
    posterior.save_pretrained(tmp_path / "posterior")
    again = bkf.Posterior.from_pretrained(tmp_path / "posterior", KINDS["lora"]().float())
    x = data[0][0]
    assert torch.equal(again.predict(x).probs, posterior.predict(x).probs)
    assert torch.equal(again.variance_vector, posterior.variance_vector)
    other = ClipClassifier(clip_lora(small_clip()), IDS.flip(0), (IDS.flip(0) > 0).long()).float()
    with pytest.raises(ValueError, match="`base_model` must be the model that"):
        bkf.Posterior.from_pretrained(tmp_path / "posterior", other)  # the classes are others


def test_peft_outside_is_saved_as_a_plain_adapter(tmp_path):
    model, data = peft_outside().float(), problem(24)
    posterior = bkf.fit(model, data, bkf.KalmanConfig(rank=5), progress=False)
    posterior.save_pretrained(tmp_path / "posterior")
    assert (tmp_path / "posterior" / "adapter_model.safetensors").is_file()
    again = bkf.Posterior.from_pretrained(tmp_path / "posterior", ClipClassifier(small_clip(), **PROMPTS).float())
    assert torch.equal(again.predict(data[0][0]).probs, posterior.predict(data[0][0]).probs)


# bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipClassifier(nn.Linear(2, 2), IDS), "`clip` must have a method get_image_features, .* got Linear"),
        (lambda: MatchedPairs(nn.Linear(2, 2)), "`clip` must have a method get_image_features, .* got Linear"),
        (
            lambda: ClipClassifier(small_clip(), IDS.float()),
            "`input_ids` must be a tensor of token numbers, got torch.f",
        ),
        (lambda: ClipClassifier(small_clip(), [[1]]), "`input_ids` must be a tensor of token numbers, got list"),
        (lambda: ClipClassifier(small_clip(), IDS[0]), r"`input_ids` must have shape \(classes, .* got \(5,\)"),
        (lambda: ClipClassifier(small_clip(), IDS[:0]), r"`input_ids` must have shape \(classes, .* got \(0, 5\)"),
        (
            lambda: ClipClassifier(small_clip(), IDS, IDS[:2]),
            r"`attention_mask` must have shape \(3, 5\), got \(2, 5\)",
        ),
        (
            lambda: ClipClassifier(small_clip(), IDS, logit_scale=0.0),
            "`logit_scale` must be positive and finite, got 0",
        ),
        (lambda: MatchedPairs(small_clip(), scale=float("inf")), "`scale` must be positive and finite, got inf"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
