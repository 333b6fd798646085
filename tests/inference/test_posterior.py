"""The methods of a posterior that belong to no other part."""

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.models.zoo import lora_digits_vit


def test_continuing_from_a_posterior_equals_one_stream(digits):
    stream, _ = digits
    batches = [(stream.images[i : i + 3], stream.labels[i : i + 3]) for i in range(0, 30, 3)]
    kf = bkf.KalmanFilter(lora_digits_vit(rank=2))
    state = whole = kf.init(stream.images[:30])
    for batch in batches:
        whole, _ = kf.update(whole, *batch)
    for batch in batches[:5]:
        state, _ = kf.update(state, *batch)
    posterior = bkf.Posterior(kf, state)
    state = posterior.state
    for batch in batches[5:]:
        state, _ = posterior.filter().update(state, *batch)
    assert torch.equal(state.belief.mean, whole.belief.mean)


def test_apply_to_writes_the_mean_and_nothing_else(fitted):
    model = lora_digits_vit(rank=2)
    frozen = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    fitted.apply_to(model)
    torch.testing.assert_close(bkf.AdapterModel(model).vector(), fitted.mean_vector)
    assert all(torch.equal(model.get_parameter(k), v) for k, v in frozen.items())
    with pytest.raises(ValueError, match="`model` must have the trainable tensors that the posterior was fitted on"):
        fitted.apply_to(lora_digits_vit(rank=3))


def test_arviz_takes_the_draws(fitted):
    import arviz

    data = fitted.to_arviz(num_samples=20)
    name = next(iter(fitted.mean))
    assert data["posterior"][name].shape == (2, 10, *fitted.mean[name].shape)
    summary = arviz.summary(data, var_names=[name], kind="stats")
    assert len(summary) == fitted.mean[name].numel()


def test_dense_covariance_is_refused_with_its_size():
    class Wide(nn.Linear):
        pass

    posterior = bkf.fit(
        Wide(200, 150),
        [(torch.randn(1, 200), torch.randn(1, 150))],
        bkf.KalmanConfig(likelihood="gaussian"),
        progress=False,
    )
    with pytest.raises(
        ValueError, match=r"`covariance_matrix` takes at most 20,000 parameters, got 30,150 \(3\.4 GiB\)"
    ):
        posterior.covariance_matrix()
