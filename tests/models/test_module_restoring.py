"""The user's model after forward passes that replace its tensors, and after ones that raise at any point."""

import contextlib
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import bayes_kf as bkf
from benchmarks.reliability import peft_cases as cases

CASES = {case.name: case for case in cases.CASES}
NAMES = ("LORA MultiheadAttention", "LORA target_parameters", "LORA modules_to_save with batch norm", "LORA use_dora")


class Stop(Exception):
    """Raised inside a forward pass."""


def fitted(name):
    case = CASES[name]
    model, inputs = case.wrap(case.base()), case.inputs()
    config = bkf.KalmanConfig(rank=3, temperature=1.0)
    return model, inputs, bkf.fit(model, [(inputs, torch.arange(len(inputs)) % 3)], config, progress=False)


def known(value):
    """An object by identity, but frozen parameters by their values below.

    PEFT puts a new one into its attention layers whenever the model's parameters are listed.
    """
    return None if isinstance(value, nn.Parameter) and not value.requires_grad else id(value)


def everything(model):
    """All that a module is made of: classes, attributes, parts by identity, values."""
    actual = {}
    for name, module in list(nn.Module.named_modules(model)):
        attributes = {k: id(v) for k, v in vars(module).items()}
        contents = {k: [(a, known(b)) for a, b in v.items()] for k, v in vars(module).items() if isinstance(v, dict)}
        contents["_parameters"].sort()
        lists = {k: list(v) for k, v in vars(module).items() if isinstance(v, list)}
        values = {k: v.clone() for k, v in {**module._parameters, **module._buffers}.items() if v is not None}
        actual[name] = (type(module), attributes, contents, lists, values)
    return actual


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name][:4] == two[name][:4], name
        assert all(torch.equal(one[name][4][k], two[name][4][k]) for k in one[name][4]), name


class Counter:
    """A hook on every module that raises in the k-th call of any."""

    def __init__(self, model, at):
        self.count, self.at = 0, at
        self.handles = [m.register_forward_pre_hook(self) for m in model.modules()]
        self.handles += [m.register_forward_hook(self) for m in model.modules()]

    def __call__(self, module, *args):
        self.count += 1
        if self.count == self.at:
            raise Stop

    def remove(self):
        for handle in self.handles:
            handle.remove()


def uses(posterior, inputs, thorough):
    targets = torch.arange(len(inputs)) % 3

    def learn():
        kf = posterior.filter()
        kf.update(kf.init(inputs), inputs, targets)

    def exported():
        with tempfile.TemporaryDirectory() as folder:
            posterior.export_adapters(Path(folder) / "draws", 1)

    few = {
        "sampled": lambda: posterior.predict(inputs, "sampled", 4),
        "linearized": lambda: posterior.predict(inputs, "linearized"),
        "update": learn,
    }
    if not thorough:
        return few
    return few | {
        "mean": lambda: posterior.predict(inputs, "mean"),
        "differences": lambda: posterior.predict(inputs, "linearized", 1),
        "output_variance": lambda: posterior.output_variance((inputs, targets)),
        "arviz": lambda: posterior.to_arviz(4, loader=[(inputs, targets)]),
        "pyro": lambda: posterior.pyro_model(inputs),
        "calibrate": lambda: posterior.calibrate([(inputs, targets)]),
        "export": exported,
    }


@pytest.mark.filterwarnings("ignore:.*draws were run one by one")
@pytest.mark.filterwarnings("ignore:.*disagree")
@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("name", NAMES)
def test_a_failure_in_any_forward_call_leaves_the_model_as_it_was(name):
    model, inputs, posterior = fitted(name)
    with torch.no_grad():
        answer = model.eval()(inputs)
    before = everything(model)
    generator = torch.Generator().manual_seed(0)
    for use, call in uses(posterior, inputs, name == NAMES[0]).items():
        never = Counter(model, 0)
        hooked = everything(model)
        call()
        same(hooked, everything(model))
        never.remove()
        for at in {1, *torch.randint(1, never.count + 1, (2,), generator=generator).tolist()} if never.count else ():
            failing = Counter(model, at)
            hooked = everything(model)
            with contextlib.suppress(Stop):
                call()  # a failure inside vmap is answered by the slow way, and the counter raises only once
            same(hooked, everything(model))
            failing.remove()
        same(before, everything(model))
        with torch.no_grad():
            assert torch.equal(model(inputs), answer), use


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("name", ["LORA MultiheadAttention", "LORA target_parameters"])
def test_drawn_adapters_predict_what_the_model_with_their_weights_does(name):
    _, inputs, posterior = fitted(name)
    draws = posterior.sample(4, torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="one by one"):
        actual = posterior.predict(inputs, "sampled", 4, torch.Generator().manual_seed(0)).samples
    expected = []
    for draw in draws:
        own = CASES[name].wrap(CASES[name].base()).eval()
        posterior.adapter.__class__(own).assign(draw)
        with torch.no_grad():
            expected.append(own(inputs).softmax(-1))
    assert torch.allclose(actual, torch.stack(expected), atol=1e-6)


def test_weights_that_a_forward_pass_replaces_do_not_drift():
    model = peft.get_peft_model(cases.attention(), peft.LoraConfig(r=2, target_modules=["attention"]))
    inputs, targets = cases.sequences(), torch.arange(6) % 3
    layer = model.base_model.model.attention
    with torch.no_grad():
        for parameter in (layer.lora_B["default"].weight, layer.base_layer.out_proj.lora_B["default"].weight):
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    weight, value = layer.base_layer.in_proj_weight, layer.base_layer.in_proj_weight.clone()
    bkf.fit(model, [(inputs, targets)] * 3, bkf.KalmanConfig(rank=3), progress=False)
    assert layer.base_layer._parameters["in_proj_weight"] is not None
    assert torch.equal(layer.base_layer.in_proj_weight, value)
    assert torch.equal(weight, value)
