"""Reward models: preference pairs against closed forms, dense filters in float64, autograd, and drawn adapters."""

import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import bayes_kf as bkf
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.batch import split_batch
from bayes_kf.models.language import PreferencePairs, Reward, preference_examples, randomly_ordered

PAD = 0


def llama(seed=0, num_labels=1, **settings):
    """A small reward model with LoRA whose B is not zero."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, **sizes, pad_token_id=PAD, initializer_range=0.3, num_labels=num_labels)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], **settings)
    return with_b(get_peft_model(LlamaForSequenceClassification(config), lora))


def bert(seed=0):
    """Another architecture: absolute positions, a pooler on the first token, and a classifier with a bias."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, **sizes, initializer_range=0.3, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    return with_b(get_peft_model(BertForSequenceClassification(config), lora))


def with_b(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.double().eval()


def stacked(sizes=((3, 5), (6, 2)), seed=0, side="right"):
    """TRL's batch of pairs with these numbers of tokens, the chosen texts first."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [chosen for chosen, _ in sizes] + [rejected for _, rejected in sizes]
    rows = [torch.randint(3, 40, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, where], mask[number, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def named(batch):
    half = len(batch["input_ids"]) // 2
    parts = {"_chosen": slice(None, half), "_rejected": slice(half, None)}
    return {f"{name}{end}": value[which] for name, value in batch.items() for end, which in parts.items()}


def alone(model, batch):
    """The reward of each text without any padding."""
    rewards = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        own = ids[mask.bool()][None]
        rewards.append(model(input_ids=own, attention_mask=torch.ones_like(own)).logits[0, 0].detach())
    return torch.stack(rewards)


class Linear(nn.Module):
    """A reward that is linear in θ; the bias is common to all texts."""

    def __init__(self, features=3, bias=False):
        super().__init__()
        self.linear = nn.Linear(features, 1, bias=bias).double()
        nn.init.zeros_(self.linear.weight)

    def forward(self, features):
        return self.linear(features).squeeze(-1)


def preferences(size=60, features=3, seed=0):
    """Features of both texts and which one a person with true weights prefers."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, size, features, generator=generator).double()
    true = torch.tensor([1.5, -1.0, 0.5][:features]).double()
    labels = torch.bernoulli(((first - second) @ true).sigmoid(), generator=generator)
    return first, second, labels


def pairs_of(first, second, labels):
    """The same with the chosen text first, as TRL has them."""
    chosen = torch.where(labels.bool()[:, None], first, second)
    rejected = torch.where(labels.bool()[:, None], second, first)
    return {"features_chosen": chosen, "features_rejected": rejected}


FULL = {"likelihood": "bernoulli", "covariance": "full", "initial_variance": 2.0, "temperature": 1.0}


def test_both_forms_of_a_batch_give_the_difference_of_rewards():
    for model in (llama(), bert()):
        read, batch = PreferencePairs(model), stacked()
        rewards = alone(model, batch)
        expected = (rewards[:2] - rewards[2:]).unsqueeze(-1)
        torch.testing.assert_close(read.run(read.read(batch)), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(read.run(named(batch)), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(Reward(model).run(batch), rewards.unsqueeze(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [llama, bert])
def test_padding_on_either_side_and_its_token_do_not_matter(make):
    model = make()
    read, right, left = PreferencePairs(model), stacked(), stacked(side="left")
    expected = read.run(read.read(right))
    wide = {name: nn.functional.pad(value, (2, 3)) for name, value in right.items()}
    other = left | {"input_ids": left["input_ids"].masked_fill(left["attention_mask"] == 0, 7)}
    for batch in (left, wide, other):
        torch.testing.assert_close(read.run(read.read(batch)), expected, rtol=1e-9, atol=1e-9)


def test_the_jacobian_of_a_pair_is_the_difference_of_those_of_its_texts():
    for model in (llama(), bert()):
        pairs, single, batch = PreferencePairs(model), Reward(model), stacked(((3, 5), (6, 2), (4, 4)))
        inputs, at = pairs.read(batch), pairs.vector()
        J = Linearizer(pairs)(at, inputs).jacobian().dense()
        of_texts = Linearizer(single)(at, batch).jacobian().dense()
        torch.testing.assert_close(J, of_texts[:3] - of_texts[3:], rtol=1e-8, atol=1e-10)
        kinds = set(pairs.linearized_by.values())
        assert kinds <= {"hooks", "unused"}  # one backward pass of all pairs
        names = dict(model.named_parameters())
        exact = []
        for output in pairs.run(inputs)[:, 0]:
            rows = torch.autograd.grad(output, [names[name] for name in pairs.names], retain_graph=True)
            exact.append(torch.cat([row.flatten() for row in rows]))
        torch.testing.assert_close(J[:, 0], torch.stack(exact), rtol=1e-8, atol=1e-10)


def test_a_margin_is_subtracted():
    read, batch = PreferencePairs(llama()), stacked()
    without = read.run(read.read(batch))
    margin = torch.tensor([0.5, -2.0])
    for form in (batch, named(batch)):
        actual = read.run(read.read(form | {"margin": margin}))
        torch.testing.assert_close(actual, without - margin.double().unsqueeze(-1))


def test_pairs_without_labels_have_the_target_true():
    inputs, targets = split_batch(PreferencePairs(Linear()).read(named(stacked())))
    assert targets.tolist() == [True, True]
    assert "input_ids_chosen" in inputs
    given = named(stacked()) | {"labels": torch.tensor([0.0, 0.7])}
    assert split_batch(PreferencePairs(Linear()).read(given))[1].tolist() == pytest.approx([0.0, 0.7])


def test_the_filter_is_that_of_a_logistic_regression_on_differences_of_features():
    """Mean and covariance, batch by batch, with an independent recursion in float64, chosen first or by labels."""
    first, second, labels = preferences()
    config = bkf.KalmanConfig(**FULL)
    rows = [slice(k, k + 6) for k in range(0, 60, 6)]
    kf = bkf.KalmanFilter(nn.Linear(3, 1, bias=False).double(), config)
    nn.init.zeros_(kf.adapter.model.weight)
    oracle = kf.init()
    for which in rows:
        oracle, _ = kf.update(oracle, (first - second)[which], labels[which])
    by_order = [{n: v[which] for n, v in pairs_of(first, second, labels).items()} for which in rows]
    ordered = bkf.fit(PreferencePairs(Linear()), by_order, config, progress=False)
    by_label = [
        {"features_chosen": first[which], "features_rejected": second[which], "labels": labels[which]} for which in rows
    ]
    labelled = bkf.fit(PreferencePairs(Linear()), by_label, config, progress=False)
    for posterior in (ordered, labelled):
        torch.testing.assert_close(posterior.mean_vector, oracle.belief.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            posterior.covariance_matrix(), oracle.belief.covariance_matrix(), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("soft", [False, True])
def test_many_passes_reach_the_laplace_approximation_of_bradley_terry(soft):
    """The mode by Newton's method, and the inverse Hessian there, for labels 0, 1 or between, with margins."""
    first, second, labels = preferences()
    generator = torch.Generator().manual_seed(3)
    margin = 0.5 * torch.rand(60, generator=generator).double()
    if soft:
        labels = 0.8 * labels + 0.1
    x, theta = first - second, torch.zeros(3).double()
    for _ in range(50):
        p = (x @ theta - margin).sigmoid()
        precision = torch.eye(3).double() / 2.0 + x.T @ (x * (p * (1 - p))[:, None])
        theta = theta + torch.linalg.solve(precision, x.T @ (labels - p) - theta / 2.0)
    batch = {"features_chosen": first, "features_rejected": second, "margin": margin, "labels": labels}
    posterior = bkf.fit(PreferencePairs(Linear()), [batch], bkf.KalmanConfig(**FULL, passes=30), progress=False)
    torch.testing.assert_close(posterior.mean_vector, theta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.covariance_matrix(), torch.linalg.inv(precision), rtol=1e-5, atol=1e-6)


def test_rewards_have_the_moments_of_the_linearized_model():
    model, batch = llama(), stacked(((3, 5), (6, 2), (4, 4)))
    posterior = fitted(model)
    J = Linearizer(Reward(model))(posterior.mean_vector, batch).jacobian().dense()[:, 0]
    rewards = bkf.rewards(posterior, batch)
    with torch.no_grad():
        expected = posterior.adapter.outputs(posterior.mean_vector, named(batch))
    torch.testing.assert_close(rewards.mean[:3] - rewards.mean[3:], expected[:, 0], rtol=1e-9, atol=1e-9)
    covariance = J @ posterior.covariance_matrix() @ J.T
    torch.testing.assert_close(rewards.covariance, covariance, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(rewards.sd, covariance.diagonal().sqrt(), rtol=1e-8, atol=1e-10)


def fitted(model, **settings):
    config = bkf.KalmanConfig(likelihood="bernoulli", covariance="full", initial_logit_sd=1.0, temperature=1.0)
    data = [named(stacked(((3, 5), (6, 2)), seed)) for seed in range(4)]
    return bkf.fit(PreferencePairs(model), data, config, progress=False)


def test_probabilities_of_pairs_are_those_of_20000_drawn_adapters():
    first, second, labels = preferences(6)  # few, so that no comparison is certain
    posterior = bkf.fit(
        PreferencePairs(Linear(bias=True)), [pairs_of(first, second, labels)], bkf.KalmanConfig(**FULL), progress=False
    )
    texts = torch.randn(4, 3, generator=torch.Generator().manual_seed(5)).double()
    rewards = bkf.rewards(posterior, {"features": texts})
    draws = posterior.sample(20_000, torch.Generator().manual_seed(1))
    drawn = draws[:, :3] @ texts.T + draws[:, 3:]  # the model is linear, so the drawn rewards are exact
    apart = drawn[:, :, None] - drawn[:, None, :]
    for actual, sampled in (
        (rewards.preference_probs(), apart.sigmoid()),
        (rewards.probs_better(), (apart > 0).double() + 0.5 * (apart == 0)),
    ):
        allowed = 5.0 * sampled.std(0) / math.sqrt(20_000) + 1e-9
        assert bool(((actual - sampled.mean(0)).abs() <= allowed).all())
        torch.testing.assert_close(actual + actual.T, torch.ones_like(actual), rtol=0, atol=1e-12)
    best = nn.functional.one_hot(drawn.argmax(1), 4).double()
    joint = rewards.probs_best(20_000)
    assert bool(((joint - best.mean(0)).abs() <= 5.0 * math.sqrt(0.5) / math.sqrt(20_000)).all())
    assert float(joint.sum()) == pytest.approx(1.0)


def test_a_common_constant_is_not_learned_and_moves_no_comparison():
    """Its prior variance stays in the sd of a reward, and is gone from centered rewards and from pairs."""
    first, second, labels = preferences()
    given = [pairs_of(first, second, labels)]
    with_bias = bkf.fit(PreferencePairs(Linear(bias=True)), given, bkf.KalmanConfig(**FULL), progress=False)
    without = bkf.fit(PreferencePairs(Linear()), given, bkf.KalmanConfig(**FULL), progress=False)
    texts = {"features": torch.randn(5, 3, generator=torch.Generator().manual_seed(5)).double()}
    one, other = bkf.rewards(with_bias, texts), bkf.rewards(without, texts)
    torch.testing.assert_close(one.covariance - other.covariance, torch.full((5, 5), 2.0).double())
    torch.testing.assert_close(one.centered().covariance, other.centered().covariance)
    torch.testing.assert_close(one.preference_probs(), other.preference_probs())
    assert one.centered().best_of_n(2.0) == other.centered().best_of_n(2.0)
    apart, same = one.relative_to(2), other.relative_to(2)
    torch.testing.assert_close(apart.covariance, same.covariance)
    torch.testing.assert_close(apart.mean, one.mean - one.mean[2])
    assert apart.sd[2].item() == pytest.approx(0.0, abs=1e-7)
    assert with_bias.variance["linear.bias"].item() == pytest.approx(2.0)


def test_lower_bounds_prefer_what_is_known():
    """Two features that were compared often, and one that never was."""
    config, size = bkf.KalmanConfig(**FULL), 200
    first, second = torch.zeros(2, size, 3).double()
    first[:, 0], second[:, 1] = 1.0, 1.0
    posterior = bkf.fit(
        PreferencePairs(Linear()), [{"features_chosen": first, "features_rejected": second}], config, progress=False
    )
    rewards = bkf.rewards(posterior, {"features": torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 3.0]]).double()})
    assert rewards.best_of_n(0.0) == rewards.best_of_n(1.0) == 0
    assert rewards.sd[2] > rewards.sd[0]
    torch.testing.assert_close(rewards.lower_bound(1.5), rewards.mean - 1.5 * rewards.sd)
    assert rewards.probs_best()[2] > 0.05


def test_rewards_of_a_mixture_are_the_mixture_of_its_members_rewards():
    """Total mean and covariance, and probabilities that are weighted means of the members'."""
    first, second, labels = preferences(6)
    given, texts = [pairs_of(first, second, labels)], {"features": preferences(4)[0]}
    members = [
        bkf.fit(PreferencePairs(Linear()), given, bkf.KalmanConfig(**FULL | {"initial_variance": v}), progress=False)
        for v in (0.5, 4.0)
    ]
    mixture = bkf.MixturePosterior(tuple(members), (0.75, 0.25))
    whole, (one, other) = bkf.rewards(mixture, texts), [bkf.rewards(member, texts) for member in members]
    mean = 0.75 * one.mean + 0.25 * other.mean
    spread = [torch.outer(part.mean - mean, part.mean - mean) for part in (one, other)]
    covariance = 0.75 * (one.covariance + spread[0]) + 0.25 * (other.covariance + spread[1])
    torch.testing.assert_close(whole.mean, mean)
    torch.testing.assert_close(whole.covariance, covariance)
    for name in ("preference_probs", "probs_better"):
        parts = [getattr(part, name)() for part in (one, other)]
        torch.testing.assert_close(getattr(whole, name)(), 0.75 * parts[0] + 0.25 * parts[1])
    best = whole.probs_best(40_000)
    parts = [part.probs_best(40_000, torch.Generator().manual_seed(1)) for part in (one, other)]
    torch.testing.assert_close(best, 0.75 * parts[0] + 0.25 * parts[1], rtol=0, atol=5 * math.sqrt(0.5 / 40_000))


@pytest.mark.parametrize("margin", [False, True])
def test_a_random_order_changes_no_fit_and_hides_the_label(margin):
    first, second, labels = preferences(40)
    batch = pairs_of(first, second, labels)
    if margin:
        batch |= {"margin": torch.linspace(0, 1, 40).double()}
    mixed = randomly_ordered(batch)
    assert 10 < int(mixed["labels"].sum()) < 30
    config = bkf.KalmanConfig(**FULL)
    one, other = (bkf.fit(PreferencePairs(Linear()), [b], config, progress=False) for b in (batch, mixed))
    torch.testing.assert_close(one.mean_vector, other.mean_vector, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.covariance_matrix(), other.covariance_matrix(), rtol=1e-9, atol=1e-12)
    texts, read = stacked(((3, 5), (6, 2), (4, 4), (5, 3))), PreferencePairs(llama())
    narrow = read.read(texts) | {name + "_rejected": texts[name][4:, :5] for name in texts}
    order = randomly_ordered(narrow)
    assert 0 < order["labels"].sum() < 4
    sign = (2.0 * order["labels"] - 1.0).double().unsqueeze(-1)
    torch.testing.assert_close(read.run(order), sign * read.run(read.read(texts)), rtol=1e-9, atol=1e-9)


def test_examples_from_texts_are_trls_batch():
    class Letters:
        pad_token_id = PAD

        def __call__(self, text):
            return {"input_ids": [ord(letter) - 60 for letter in text]}

    batch = preference_examples(Letters(), ["abc", "a"], ["ab", "abcd"], max_length=3)
    assert batch["input_ids"].tolist() == [[37, 38, 39], [37, 0, 0], [37, 38, 0], [37, 38, 39]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"^`rejected` must be as many texts as `chosen`, 2, got 1\.$"):
        preference_examples(Letters(), ["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"^`chosen` and `rejected` must hold texts with tokens, got ''\.$"):
        preference_examples(Letters(), ["a"], [""])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, features):
        return self.linear(features)


def test_bad_input_is_refused_in_one_sentence():
    read, batch = PreferencePairs(llama()), named(stacked())
    del batch["input_ids_rejected"]
    with pytest.raises(ValueError, match=r"^`batch` must have `input_ids_rejected` beside `input_ids_chosen`, got inp"):
        read.run(batch)
    with pytest.raises(ValueError, match=r"^`batch` must have `input_ids_rejected` beside `input_ids_chosen`"):
        bkf.fit(llama(), [batch] * 3, progress=False)
    odd = {name: value[:3] for name, value in stacked().items()}
    with pytest.raises(ValueError, match=r"^`batch` must hold the chosen texts and then .*odd number of texts, 3\.$"):
        read.read(odd)
    with pytest.raises(ValueError, match=r"^`margin` must be one for each of 2 pairs, got shape \(4,\)\.$"):
        read.read(stacked() | {"margin": torch.ones(4)})
    with pytest.raises(ValueError, match=r"^`labels` must be one for each of 2 pairs, got shape \(3,\)\.$"):
        read.read(named(stacked()) | {"labels": torch.ones(3)})
    unequal = named(stacked()) | {"input_ids_rejected": stacked()["input_ids"][:3]}
    with pytest.raises(ValueError, match=r"^`batch` must hold as many rejected texts as chosen ones, got 2 in "):
        read.read(unequal)
    with pytest.raises(ValueError, match=r"^`inputs` must be a mapping with chosen and rejected texts, got Tensor\.$"):
        read.run(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"^`model` must have one output, `num_labels=1`, got `num_labels=2`\.$"):
        PreferencePairs(llama(num_labels=2))
    features = {"features_chosen": torch.ones(2, 3), "features_rejected": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"^`model` must return one reward for each text, .* got \(2, 2\)\.$"):
        PreferencePairs(Two()).run(features)
    narrow = named(stacked()) | {name + "_rejected": stacked()[name][2:, :5] for name in stacked()}
    empty = stacked()
    empty["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"^`attention_mask` must leave a token in every text, got one"):
        read.run(read.read(empty))
    with pytest.raises(
        ValueError, match=r"^`likelihood` must be 'bernoulli' for PreferencePairs, got 'categorical'\.$"
    ):
        bkf.fit(read, [named(stacked())], bkf.KalmanConfig(), progress=False)
    given = named(stacked()) | {"labels": torch.tensor([0.5, 1.5])}
    with pytest.raises(ValueError, match=r"^`targets` must be 0 or 1 for a Bernoulli likelihood, or between, got 1\.5"):
        bkf.fit(read, [given], progress=False)
    with pytest.raises(ValueError, match=r"^`z` must be a number of standard deviations, got 'one'\.$"):
        bkf.rewards(fitted(llama()), stacked()).lower_bound("one")
    del narrow["attention_mask_chosen"], narrow["attention_mask_rejected"]
    with pytest.raises(
        ValueError, match=r"^`batch` must have `attention_mask_chosen` for texts of several widths, got"
    ):
        randomly_ordered(narrow)
    with pytest.raises(ValueError, match=r"^`text` must be the index of one of 4 texts, got 4\.$"):
        bkf.rewards(fitted(llama()), stacked()).relative_to(4)


def test_prompts_of_virtual_tokens_are_refused():
    base = llama().unload()
    prompt = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(
        ValueError, match=r"^`model` must not learn virtual tokens for rewards, got PEFT's PROMPT_TUNIN"
    ):
        PreferencePairs(prompt)
