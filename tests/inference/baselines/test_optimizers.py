"""What every optimizer here keeps: learning, whatever the tensors; schedules; exact resuming; no hooks left behind."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bayes_kf.inference.baselines import KFAC, RENG, RING, SophiaG, SparseOptimization

KINDS = {
    "kfac": lambda model, **options: KFAC(model, **{"lr": 0.05, "refresh": 4, "momentum": 0.5} | options),
    "ring": lambda model, **options: RING(model, **{"lr": 0.05, "refresh": 4, "weight_decay": 0.01} | options),
    "reng": lambda model, **options: RENG(model, **{"lr": 0.05, "refresh": 4} | options),
    "sophia": lambda model, **options: SophiaG(model, **{"lr": 0.01, "refresh": 3} | options),
    "sparse": lambda model, **options: SparseOptimization(
        model, **{"lr": 0.02, "density": 0.2, "refresh": 3} | options
    ),
}
LABELS = torch.tensor([0, 2, 1, 0, 1, 2])


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(base, **options):
    return get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **options))


def bert():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(intermediate_size=12, num_labels=3, initializer_range=0.5, **sizes)
    return BertForSequenceClassification(config)


def convolutions():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


class Mixed(nn.Module):
    """Embeddings, a bare parameter, a norm, a grouped convolution, and a tensor that is never used."""

    def __init__(self):
        super().__init__()
        self.words, self.shift = nn.Embedding(20, 4), nn.Parameter(torch.zeros(4))
        self.norm, self.mix = nn.LayerNorm(4), nn.Conv1d(4, 4, 2, groups=2)
        self.last, self.unused = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, ids):
        return self.last(self.mix(self.norm(self.words(ids) + self.shift).mT).mean(-1))


TOKENS = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(2))
QUERIES = ["query", "value"]
NETWORKS = {
    "whole": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), normal(6, 4)),
    "LoRA": (lambda: adapted(bert(), target_modules=QUERIES, modules_to_save=["classifier"]), TOKENS),
    "DoRA": (lambda: adapted(bert(), target_modules=QUERIES, use_dora=True, modules_to_save=["classifier"]), TOKENS),
    "LoRA on convolutions": (lambda: adapted(convolutions(), target_modules=["0"]), normal(6, 2, 4, 4)),
    "DoRA on convolutions": (lambda: adapted(convolutions(), target_modules=["0"], use_dora=True), normal(6, 2, 4, 4)),
    "other tensors": (Mixed, TOKENS),
}


def network(name, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name][0]().eval(), NETWORKS[name][1]


def learn(optimizer, model, inputs, labels=LABELS):
    outputs = model(inputs)
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    loss = F.cross_entropy(outputs, labels)
    optimizer.zero_grad()
    optimizer.backward(loss, outputs)
    optimizer.step()
    return loss.item()


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_tensors_learn(kind, name):
    """The loss of a batch falls, every trained tensor that has a gradient moves, and no other one does."""
    model, inputs = network(name)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = trained(model)
    with KINDS[kind](model) as optimizer:
        losses = [learn(optimizer, model, inputs) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.02
    still = {n for n, p in trained(model).items() if torch.equal(p, before[n])}
    assert still == ({"unused"} if name == "other tensors" else set())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["whole", "DoRA", "other tensors"])
def test_resumes_exactly(kind, name, tmp_path):
    """From the middle, between refreshes, with its schedule; generator and all; nothing is unpickled."""

    def fresh(seed, weights):
        model, inputs = network(name, weights)
        optimizer = KINDS[kind](model, seed=seed)
        return model, inputs, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def go_on(model, inputs, optimizer, schedule, steps):
        for _ in range(steps):
            learn(optimizer, model, inputs)
            schedule.step()

    first = fresh(3, 0)
    go_on(*first, 5)
    states = {"model": first[0].state_dict(), "optimizer": first[2].state_dict(), "schedule": first[3].state_dict()}
    torch.save(states, tmp_path / "saved.pt")
    middle = trained(first[0])
    go_on(*first, 6)
    assert any(not torch.equal(p, middle[n]) for n, p in trained(first[0]).items())
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second = fresh(8, 1)
    learn(second[2], second[0], second[1])  # what it was before is forgotten
    second[0].load_state_dict(saved["model"])
    second[2].load_state_dict(saved["optimizer"])
    second[3].load_state_dict(saved["schedule"])
    go_on(*second, 6)
    assert all(torch.equal(p, trained(second[0])[n]) for n, p in trained(first[0]).items())


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_path(kind):
    """Whatever the global generator does; and another seed takes another."""
    ends = []
    for seed, disturbance in ((1, 5), (1, 6), (2, 5)):
        model, inputs = network("whole")
        optimizer = KINDS[kind](model, seed=seed)
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        for _ in range(8):
            learn(optimizer, model, inputs)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(torch.cat([p.flatten() for p in trained(model).values()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_bfloat16_are_float32(kind, tmp_path):
    """Also after a state was read again, which torch would have rounded to the parameters' precision."""
    model, inputs = network("whole")
    model.to(torch.bfloat16)
    optimizer = KINDS[kind](model)
    losses = [learn(optimizer, model, inputs.bfloat16()) for _ in range(12)]
    assert losses[-1] < losses[0]

    def state_tensors():
        return [
            value
            for p in model.parameters()
            for value in optimizer.state[p].values()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]

    before = [value.clone() for value in state_tensors()]
    assert {value.dtype for value in before} == {torch.float32}
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, state_tensors(), strict=True))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def hooks(model):
    """How many watch the model, its layers and its tensors."""
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return sum(modules) + sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["close", "with", "deleted"])
def test_no_hooks_are_left(kind, way):
    model, inputs = network("whole")
    for _ in range(2):
        optimizer = KINDS[kind](model)
        learn(optimizer, model, inputs)
        watching = hooks(model)
        assert (watching > 0) == (kind != "sophia")
        if way == "close":
            optimizer.close()
            optimizer.close()
        elif way == "with":
            with optimizer:
                pass
        else:
            del optimizer
            gc.collect()
        assert hooks(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_after_it_was_closed(kind):
    model, inputs = network("whole")
    optimizer = KINDS[kind](model)
    optimizer.close()
    outputs = model(inputs)
    with pytest.raises(RuntimeError, match="`backward` needs an open optimizer, got a closed one"):
        optimizer.backward(F.cross_entropy(outputs, LABELS), outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_needs_a_backward(kind):
    model, inputs = network("whole")
    optimizer = KINDS[kind](model)
    with pytest.raises(RuntimeError, match="`step` needs `backward"):
        optimizer.step()
    learn(optimizer, model, inputs)
    with pytest.raises(RuntimeError, match="`step` needs `backward"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_changes_nothing(kind):
    """Parameters and statistics: what follows is as if it had not been, but for the labels that it drew."""
    ends = []
    for bad in (False, True):
        model, inputs = network("whole")
        optimizer = KINDS[kind](model, seed=1)
        learn(optimizer, model, inputs)
        before, drawn = trained(model), optimizer._generator.get_state()
        if bad:
            outputs = model(inputs)
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(outputs, LABELS) * math.inf, outputs)
            with pytest.raises(FloatingPointError, match="the gradients are not finite; the parameters are as they"):
                optimizer.step()
            assert all(torch.equal(p, before[n]) for n, p in trained(model).items())
            optimizer._generator.set_state(drawn)
        for _ in range(5):
            learn(optimizer, model, inputs)
        ends.append(torch.cat([p.flatten() for p in trained(model).values()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"sparse"}))  # which looks at no outputs
def test_outputs_have_to_be_finite_logits(kind):
    model, inputs = network("whole")
    optimizer = KINDS[kind](model)
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, LABELS)
    for wrong, shape in ((outputs[:, 0], r"\(6,\)"), (outputs[None], r"\(1, 6, 3\)"), (outputs.detach(), r"\(6, 3\)")):
        with pytest.raises(ValueError, match=rf"`outputs` must be logits \(B, m\) with a graph, got shape {shape}\."):
            optimizer.backward(loss, wrong)
    with pytest.raises(FloatingPointError, match="the outputs are not finite; the parameters are as they were"):
        optimizer.backward(loss, outputs / 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_others_are_refused(kind):
    model, inputs = network("whole")
    optimizer = KINDS[kind](model)
    learn(optimizer, model, inputs)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="`state_dict` must have generator and updates, got state, param_groups"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    assert optimizer.state_dict()["state"].keys() == before["state"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_models(kind):
    with pytest.raises(ValueError, match="`model` must be a module, got list"):
        KINDS[kind]([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="`model` must have trainable tensors, got none"):
        KINDS[kind](nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="`closure` must be None: call `backward"):
        KINDS[kind](nn.Linear(2, 2)).step(lambda: None)
