"""The prior of a fit without a config: that of a new classifier, or of one that knows the labels."""

import math

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.defaults.default_prior import (
    CAREFUL,
    NEW,
    TRAINED,
    default_prior,
    learned_nothing,
    narrower_priors,
)
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.zoo import lora_digits_vit


def classifier(weight):
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
        model.bias.zero_()
    return AdapterModel(model)


def data(seed=0, size=96):
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))
    return [(x[k : k + 16], (x[k : k + 16, 0] > 0).long()) for k in range(0, size, 16)]


def test_a_classifier_that_predicts_the_labels_has_the_prior_of_a_trained_one():
    knows = [[-2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]
    assert default_prior(classifier(knows), data()) == TRAINED
    assert default_prior(classifier([[20.0 * w for w in row] for row in knows]), data()) == TRAINED  # far too sure
    assert default_prior(classifier([[0.0, -2.0], [0.0, 2.0], [0.0, 0.0]]), data()) == NEW  # of something else
    assert default_prior(classifier([[0.0, 0.0]] * 3), data()) == NEW
    assert default_prior(classifier(knows), data(size=16)[:1]) in (TRAINED, NEW)
    assert default_prior(classifier([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]), data()) == NEW  # wrong throughout


def test_frequencies_alone_are_no_knowledge():
    """A bias that is right for frequent labels does not tell one example from another."""
    model = classifier([[0.0, 0.0]] * 3)
    with torch.no_grad():
        model.model.bias.copy_(torch.tensor([3.0, 0.0, -3.0]))
    rare = [(x, (x[:, 0] > 1.5).long()) for x, _ in data()]
    assert default_prior(model, rare) == NEW


@pytest.mark.parametrize("labels", [torch.tensor([0, 7] * 8), torch.zeros(16), "text", None])
def test_labels_that_do_not_fit_are_left_to_the_fit(labels):
    assert default_prior(classifier([[-2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), [(data()[0][0], labels)]) == NEW


def test_the_default_fit_uses_it(digits):
    """A classifier knows the labels that it predicts itself; after its output layer is zero it does not."""
    images, trained, fresh = digits[0].images[:96], lora_digits_vit(rank=1), lora_digits_vit(rank=1)
    with torch.no_grad():
        labels = trained.eval()(images).logits.argmax(1)
        for name, parameter in fresh.named_parameters():
            if "classifier" in name:
                parameter.zero_()
    train = [(images[k : k + 8], labels[k : k + 8]) for k in range(0, 96, 8)]
    for model, expected in ((trained, TRAINED), (fresh, NEW)):
        config = bkf.fit_mixture(model, train, members=1, progress=False).best.config
        assert {name: getattr(config, name) for name in expected} == expected


def test_the_ladder_of_priors_is_for_classes_alone():
    assert narrower_priors(bkf.KalmanConfig(**NEW)) == [TRAINED, CAREFUL]
    assert narrower_priors(bkf.KalmanConfig(**TRAINED)) == [CAREFUL]
    assert narrower_priors(bkf.KalmanConfig(**CAREFUL)) == []
    assert narrower_priors(bkf.KalmanConfig(initial_logit_sd=4.0)) == []
    assert narrower_priors(bkf.KalmanConfig(likelihood="bernoulli", **NEW)) == []


def test_nothing_is_learned_if_frequencies_predict_as_well():
    labels = [torch.tensor([0] * 15 + [1] * 5)] * 2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    early = torch.full((50,), 9.0)  # does not count
    assert learned_nothing(torch.cat([early, torch.full((50,), entropy + 1e-6)]), labels)
    assert not learned_nothing(torch.cat([early, torch.full((50,), entropy - 1e-6)]), labels)
