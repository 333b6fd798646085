"""Small models with one adapter of every PEFT type and LoRA variant, for ``peft_support.py``."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

EXAMPLES = 6
CLASSES = 3
WORDS = 12


@dataclass(frozen=True)
class Case:
    """An adapter on a base model.

    Attributes:
        name: in the table.
        kind: the name of its ``peft.PeftType``.
        base: makes the base model, always with the same weights.
        wrap: puts the adapter on it.
        inputs: makes the inputs.
    """

    name: str
    kind: str
    base: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    inputs: Callable[[], Any]


def mlp() -> nn.Module:
    """Three linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def numbers() -> Tensor:
    """Inputs of :func:`mlp`."""
    return torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(1))


def bert() -> nn.Module:
    """A BERT classifier of two layers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    """A Llama classifier of two layers."""
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(_llama_config())


def causal() -> nn.Module:
    """A Llama language model of two layers."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(_llama_config())


def _llama_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_labels=CLASSES,
        pad_token_id=0,
    )


def text() -> dict[str, Tensor]:
    """Tokens, without padding."""
    ids = torch.randint(1, WORDS, (EXAMPLES, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def places() -> dict[str, Tensor]:
    """Tokens and the place whose next token is predicted, for language models."""
    return text() | {"place": torch.full((EXAMPLES,), 4)}


class Attention(nn.Module):
    """Torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (B, m)."""
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def attention() -> nn.Module:
    """:class:`Attention`, drawn."""
    torch.manual_seed(0)
    return Attention()


class Experts(nn.Module):
    """Parameters of three experts, used without a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The experts' mean under ``weight`` (B, T, 3), (B, T, 6)."""
        return (weight[..., None] * torch.einsum("btd,edf->btef", x, self.w)).sum(-2)


class Mixture(nn.Module):
    """Experts behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.experts = nn.Linear(6, 6), Experts()
        self.gate, self.head = nn.Linear(6, 3), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (B, m)."""
        x = torch.tanh(self.inner(x))
        return self.head(self.experts(x, self.gate(x).softmax(-1)).mean(1))


def mixture() -> nn.Module:
    """:class:`Mixture`, drawn."""
    torch.manual_seed(0)
    return Mixture()


def sequences() -> Tensor:
    """Inputs of :class:`Attention` and :class:`Mixture`."""
    return torch.randn(EXAMPLES, 4, 6, generator=torch.Generator().manual_seed(1))


class Picture(nn.Module):
    """Two convolutions and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (B, m)."""
        return self.head(torch.relu(self.norm(self.second(torch.relu(self.first(x))))).flatten(1))


def picture() -> nn.Module:
    """:class:`Picture`, drawn, with running means that are not zero."""
    torch.manual_seed(0)
    model = Picture()
    nn.init.normal_(model.norm.running_mean, std=0.1)
    return model


def images() -> Tensor:
    """Inputs of :class:`Picture`."""
    return torch.randn(EXAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def _plain(config: Callable[[], peft.PeftConfig], **settings: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(base: nn.Module) -> nn.Module:
        torch.manual_seed(2)
        return peft.get_peft_model(base, config(), **settings)

    return wrap


def _case(
    name: str,
    config: Callable[[], peft.PeftConfig],
    base: Callable[[], nn.Module] = mlp,
    inputs: Callable[[], Any] = numbers,
    **settings: Any,
) -> Case:
    return Case(name, name.split()[0], base, _plain(config, **settings), inputs)


def _lora(name: str, base: Callable[[], nn.Module] = mlp, inputs: Callable[[], Any] = numbers, **given: Any) -> Case:
    """LoRA on the middle layer of :func:`mlp`, or as given."""
    return _case(
        f"LORA {name}".strip(), lambda: peft.LoraConfig(**({"r": 2, "target_modules": ["2"]} | given)), base, inputs
    )


def uncached() -> nn.Module:
    """:func:`causal` without a cache of keys and values."""
    model = causal()
    model.config.use_cache = False
    return model


@functools.cache
def _experts() -> tempfile.TemporaryDirectory[str]:
    """A folder with two LoRA adapters of :func:`causal`, for the life of the process."""
    folder = tempfile.TemporaryDirectory()
    for number in range(2):
        torch.manual_seed(number)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(causal(), config).save_pretrained(f"{folder.name}/{number}")
    return folder


def _xlora(base: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    adapters = {str(number): f"{_experts().name}/{number}" for number in range(2)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1, adapters=adapters)
    return peft.get_peft_model(base, config)


def _two(active: list[str]) -> Callable[[nn.Module], nn.Module]:
    def wrap(base: nn.Module) -> nn.Module:
        torch.manual_seed(2)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["2"]), adapter_name="first")
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["2"]))
        model.base_model.set_adapter(active)
        return model

    return wrap


def _loftq(base: nn.Module) -> nn.Module:
    """An adapter as LoftQ initializes it; PEFT itself needs a GPU for that."""
    model = _plain(lambda: peft.LoraConfig(r=2, target_modules=["2"]))(base)
    model.peft_config["default"].init_lora_weights = "loftq"
    return model


def _corda(base: nn.Module) -> nn.Module:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(base, config, run_model=lambda: base(numbers()))
    return peft.get_peft_model(base, config)


def _eva(base: nn.Module) -> nn.Module:
    model = _plain(lambda: peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights="eva"))(base)
    return _initialized(model)


def _initialized(model: nn.Module) -> nn.Module:
    peft.initialize_lora_eva_weights(
        model,
        [numbers()] * 8,
        forward_fn=lambda m, batch: m(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model


def _lora_ga(base: nn.Module) -> nn.Module:
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def step() -> None:
        base(numbers()).square().sum().backward()

    preprocess_loraga(base, config, step)
    return peft.get_peft_model(base, config)


LINEAR = {"target_modules": ["2"]}
LORA = [
    _lora(""),
    _lora("modules_to_save", modules_to_save=["4"]),
    _lora(
        "modules_to_save with batch norm", picture, images, target_modules=["first"], modules_to_save=["norm", "head"]
    ),
    _lora("bias all", bias="all"),
    _lora("bias lora_only", bias="lora_only"),
    _lora("lora_bias", lora_bias=True),
    _lora("use_rslora", use_rslora=True),
    _lora("use_dora", use_dora=True),
    _lora("rank_pattern", target_modules=["0", "2"], rank_pattern={"2": 3}, alpha_pattern={"2": 5}),
    _lora("dropout", lora_dropout=0.3),
    _lora("Conv2d", picture, images, target_modules=["first", "second"]),
    _lora("Conv2d with DoRA", picture, images, target_modules=["first"], use_dora=True),
    _lora("embedding", bert, text, target_modules=["word_embeddings", "query"]),
    _lora("embedding with DoRA", bert, text, target_modules=["word_embeddings", "query"], use_dora=True),
    _lora("trainable_token_indices", bert, text, target_modules=["query"], trainable_token_indices=[1, 2, 3]),
    _lora("MultiheadAttention", attention, sequences, target_modules=["attention"]),
    _lora("MultiheadAttention with out_proj", attention, sequences, target_modules=["attention", "out_proj"]),
    _lora("target_parameters", mixture, sequences, target_modules=["inner"], target_parameters=["experts.w"]),
    _lora("target_parameters alone", mixture, sequences, target_modules=[], target_parameters=["experts.w"]),
    _lora("layer_replication", llama, text, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    _lora("init gaussian", init_lora_weights="gaussian"),
    _lora("init False", init_lora_weights=False),
    _lora("init orthogonal", init_lora_weights="orthogonal"),
    _lora("init mica", init_lora_weights="mica"),
    _lora("init pissa", init_lora_weights="pissa"),
    _lora("init pissa_niter_4", init_lora_weights="pissa_niter_4"),
    _lora("init olora", init_lora_weights="olora"),
    Case("LORA init loftq", "LORA", mlp, _loftq, numbers),
    Case("LORA init eva", "LORA", mlp, _eva, numbers),
    Case("LORA init corda", "LORA", mlp, _corda, numbers),
    Case("LORA init lora_ga", "LORA", mlp, _lora_ga, numbers),
    Case("LORA two active adapters", "LORA", mlp, _two(["first", "second"]), numbers),
    Case("LORA second of two adapters", "LORA", mlp, _two(["second"]), numbers),
    *(
        _case(f"LORA named {name!r}", lambda: peft.LoraConfig(r=2, **LINEAR), adapter_name=name)
        for name in ("my adapter", "a/b", "späße", "weight", "..")
    ),
]
OTHERS = [
    _case("PROMPT_TUNING", lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), bert, text),
    _case(
        "MULTITASK_PROMPT_TUNING",
        lambda: peft.MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, num_tasks=2),
        bert,
        lambda: text() | {"task_ids": torch.zeros(EXAMPLES, dtype=torch.long)},
    ),
    _case(
        "P_TUNING",
        lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=4),
        bert,
        text,
    ),
    _case("PREFIX_TUNING", lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), llama, text),
    _case("ADALORA", lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **LINEAR)),
    _case("ADAMSS", lambda: peft.AdamssConfig(r=2, num_subspaces=2, **LINEAR)),
    _case("BOFT", lambda: peft.BOFTConfig(boft_block_size=2, **LINEAR)),
    _case(
        "ADAPTION_PROMPT",
        lambda: peft.AdaptionPromptConfig(
            task_type="SEQ_CLS", adapter_len=3, adapter_layers=1, target_modules="self_attn"
        ),
        llama,
        text,
    ),
    _case("IA3", lambda: peft.IA3Config(feedforward_modules=[], **LINEAR)),
    _case("BEFT", lambda: peft.BeftConfig(**LINEAR)),
    _case("LILY", lambda: peft.LilyConfig(r=2, target_modules=["query"], stride_A=1, num_B=2), bert, text),
    _case("LOHA", lambda: peft.LoHaConfig(r=2, **LINEAR)),
    _case("LOKR", lambda: peft.LoKrConfig(r=2, **LINEAR)),
    _case("OFT", lambda: peft.OFTConfig(oft_block_size=2, **LINEAR)),
    _case(
        "POLY",
        lambda: peft.PolyConfig(task_type="SEQ_CLS", r=2, n_tasks=2, n_skills=2, target_modules=["query"]),
        bert,
        lambda: text() | {"task_ids": torch.zeros(EXAMPLES, dtype=torch.long)},
    ),
    _case("LN_TUNING", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]), bert, text),
    _case("VERA", lambda: peft.VeraConfig(r=4, **LINEAR)),
    _case("VERA save_projection=False", lambda: peft.VeraConfig(r=4, save_projection=False, **LINEAR)),
    _case("FROD", lambda: peft.FrodConfig(progressbar=False, sparse_rate=0.2, **LINEAR)),
    _case("PVERA", lambda: peft.PveraConfig(r=4, **LINEAR)),
    _case("FOURIERFT", lambda: peft.FourierFTConfig(n_frequency=6, **LINEAR)),
    _case("GLORA", lambda: peft.GloraConfig(r=2, **LINEAR)),
    Case("XLORA", "XLORA", uncached, _xlora, places),
    _case("HRA", lambda: peft.HRAConfig(r=2, **LINEAR)),
    _case("VBLORA", lambda: peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, **LINEAR)),
    _case("UNILORA", lambda: peft.UniLoraConfig(r=2, theta_d_length=8, **LINEAR)),
    _case(
        "CPT",
        lambda: peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
        ),
        causal,
        places,
    ),
    _case("MISS", lambda: peft.MissConfig(r=2, **LINEAR)),
    _case("RANDLORA", lambda: peft.RandLoraConfig(r=2, **LINEAR)),
    _case("ROAD", lambda: peft.RoadConfig(group_size=8, **LINEAR)),
    _case(
        "TRAINABLE_TOKENS",
        lambda: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[1, 2, 3]),
        bert,
        text,
    ),
    _case("HIRA", lambda: peft.HiraConfig(r=2, **LINEAR)),
    _case("SHIRA", lambda: peft.ShiraConfig(r=2, random_seed=0, **LINEAR)),
    _case("C3A", lambda: peft.C3AConfig(block_size=4, **LINEAR)),
    _case("WAVEFT", lambda: peft.WaveFTConfig(n_frequency=6, **LINEAR)),
    _case("OSF", lambda: peft.OSFConfig(effective_rank=2, **LINEAR)),
    _case("DELORA", lambda: peft.DeloraConfig(r=2, **LINEAR)),
    _case("GRALORA", lambda: peft.GraloraConfig(r=2, gralora_k=2, **LINEAR)),
    _case("CARTRIDGE", lambda: peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), causal, places),
    _case("TINYLORA", lambda: peft.TinyLoraConfig(r=2, u=3, **LINEAR)),
    _case("PSOFT", lambda: peft.PsoftConfig(r=2, **LINEAR)),
    _case("PEANUT", lambda: peft.PeanutConfig(r=2, **LINEAR)),
    _case("SHADOW", lambda: peft.ShadowConfig(task_type="CAUSAL_LM", r=2), causal, places),
    _case("SUPERTUNING", lambda: peft.SupertuningConfig(sparsity=0.8, **LINEAR)),
    _case("DEFT", lambda: peft.DeftConfig(r=2, **LINEAR)),
]
CASES = [*LORA, *OTHERS]


def missing() -> list[str]:
    """PEFT types of the installed PEFT that no case covers."""
    return sorted({kind.value for kind in peft.PeftType} - {case.kind for case in CASES})
