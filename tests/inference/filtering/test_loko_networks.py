"""LoKO on the kinds of networks that its paper runs on: convolutions, vision and language transformers, DoRA, a head.

Each is the real architecture with its own blocks, made small; equations 9 to 12 are replayed in plain float64, mean and
variance.
"""

import pytest
import torch
from oracles import naive_loko
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torchvision.models import DenseNet, ResNet
from torchvision.models.resnet import BasicBlock
from transformers import RobertaConfig, RobertaForSequenceClassification, ViTConfig, ViTForImageClassification

from bayes_kf.inference import KalmanConfig, KalmanFilter

STEPS = 8


def convolutions(model, skip=()):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name not in skip]


def densenet(**lora):
    base = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=3)
    return get_peft_model(
        base, LoraConfig(r=2, target_modules=convolutions(base), modules_to_save=["classifier"], **lora)
    )


def resnet(**lora):
    base = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, width_per_group=64)
    return get_peft_model(base, LoraConfig(r=1, target_modules=["conv1"], modules_to_save=["fc"], **lora))


def vit(**lora):
    base = ViTForImageClassification(
        ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )
    query = [
        name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name.endswith(("query", "q_proj"))
    ]
    return get_peft_model(base, LoraConfig(r=4, target_modules=query, modules_to_save=["classifier"], **lora))


def roberta(**lora):
    base = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=30,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=20,
            num_labels=3,
        )
    )
    return get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], modules_to_save=["classifier"], **lora)
    )


def images(generator):
    return torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)


def patches(generator):
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)}


def tokens(generator):
    ids = torch.randint(5, 30, (1, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])}


CASES = {
    "DenseNet, LoRA on convolutions": (densenet, images, {}),
    "ResNet, LoRA on convolutions": (resnet, images, {}),
    "ResNet, DoRA on convolutions": (resnet, images, {"use_dora": True}),
    "ViT, LoRA on queries": (vit, patches, {}),
    "ViT, DoRA on queries": (vit, patches, {"use_dora": True}),
    "RoBERTa, LoRA on queries": (roberta, tokens, {}),
    "RoBERTa, DoRA on queries": (roberta, tokens, {"use_dora": True}),
}


def logits(model, tensors, inputs):
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    actual = functional_call(model, tensors, args, kwargs)
    return (actual if isinstance(actual, torch.Tensor) else actual.logits)[0]


@pytest.mark.parametrize("rule", ["constant", "uniform"])
@pytest.mark.parametrize("noise", ["ema_taylor", "ema_residual"])
@pytest.mark.parametrize("case", CASES)
def test_replays_the_paper_s_equations(case, noise, rule):
    make, draw, lora = CASES[case]
    torch.manual_seed(0)
    model = make(init_lora_weights=False, **lora).double().eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sizes = [model.get_parameter(name).numel() for name in names]
    heads = [name for name in names if "lora" not in name]
    assert heads  # trained along
    assert any("lora_A" in name for name in names)
    assert any("magnitude" in name for name in names) == bool(lora)

    def tensors_at(theta):
        parts = theta.split(sizes)
        return {
            n: p.view_as(model.get_parameter(n)).detach().requires_grad_(True)
            for n, p in zip(names, parts, strict=True)
        }

    def outputs_of(theta, inputs):
        return logits(model, tensors_at(theta), inputs).detach()

    def jacobian_of(theta, inputs):
        tensors = tensors_at(theta)
        rows = [
            torch.autograd.grad(v, list(tensors.values()), retain_graph=True) for v in logits(model, tensors, inputs)
        ]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])

    generator = torch.Generator().manual_seed(1)
    stream = [(draw(generator), torch.randint(3, (), generator=generator)) for _ in range(STEPS)]
    kf = KalmanFilter(model, KalmanConfig.loko(noise=noise, initial_rule=rule, initial_variance=0.05, seed=3))
    state = kf.init()
    start, variance = kf.adapter.vector(), state.prior.variance
    replay = naive_loko(jacobian_of, outputs_of, start, variance, stream, taylor=noise == "ema_taylor")
    for (inputs, label), (theta, p) in zip(stream, replay, strict=True):
        state, info = kf.update(state, inputs, label[None])
        torch.testing.assert_close(state.belief.mean, theta, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(state.belief.variance, p, rtol=1e-8, atol=1e-10)
        assert (info.damping, info.jitter) == (1.0, 0.0)
    assert float((state.belief.mean - start).abs().max()) > 1e-3
    head = torch.cat([torch.full((size,), name in heads) for name, size in zip(names, sizes, strict=True)])
    assert float((state.belief.mean - start)[head].abs().max()) > 1e-4
    assert float((variance - state.belief.variance)[head].max()) > 0
