"""A small causal language model that read real English until it was not random, and its tokens: characters."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bayes_kf as bkf
from bayes_kf.models.language import NextToken

LETTERS = "\n" + "".join(map(chr, range(32, 127)))
END = 0  # a line's end
SEEN, STEPS = 64, 350
WEIGHTS = Path(__file__).with_name("characters.safetensors")


def ids(text):
    return torch.tensor([LETTERS.index(letter) for letter in text if letter in LETTERS])


def english():
    """Python's own documentation, as tokens."""
    return ids("".join(topics.topics[name] for name in sorted(topics.topics))[:400_000])


def _config():
    return GPT2Config(
        vocab_size=len(LETTERS), n_positions=160, n_embd=64, n_layer=2, n_head=4, eos_token_id=END, bos_token_id=END
    )


def train():
    """Write ``WEIGHTS`` anew, in float16: ``python tests/language_models.py``."""
    torch.manual_seed(0)
    model, text = GPT2LMHeadModel(_config()), english()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(len(text) - SEEN - 1, (24,), generator=generator)
        batch = torch.stack([text[s : s + SEEN + 1] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {name: tensor.half().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, WEIGHTS)
    print(f"loss {float(loss.detach()):.3f} nats a letter, {WEIGHTS.stat().st_size} bytes")


def base():
    """The trained model, anew."""
    model = GPT2LMHeadModel(_config())
    missing = model.load_state_dict(load_file(WEIGHTS), strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing  # tied to the embedding
    return model.eval()


def lora(model=None, seed=0, targets=("c_attn", "c_fc", "c_proj")):
    """With LoRA of rank 2."""
    below = base() if model is None else model
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(targets), fan_in_fan_out=model is None)
    return get_peft_model(below, config).eval()


def llama():
    """Another architecture, untrained, with LoRA whose B is not zero."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        max_position_embeddings=64,
    )
    model = lora(LlamaForCausalLM(config), targets=("q_proj", "v_proj"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


class Letters:
    """The tokenizer."""

    pad_token_id = END

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ids(text).tolist()}


def untrained_llama(layers):
    """A small Llama with random weights, whose tokens are letters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tokenizer():
    """The same as one of transformers."""
    one = Tokenizer(WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="?"))
    one.pre_tokenizer = Split(Regex("."), "isolated")
    one.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=one, pad_token="\n", eos_token="\n")


def posterior_around(model, scale):
    """A posterior around the model's present tensors."""
    config = bkf.KalmanConfig(covariance="diagonal", initial_variance=scale, bound_prior=False, temperature=1.0)
    kf = bkf.KalmanFilter(NextToken(model), config)
    return bkf.Posterior(kf, kf.init())


def prompt(model, count=3, length=9):
    """Random tokens."""
    torch.manual_seed(4)
    return torch.randint(1, model.config.vocab_size, (count, length))


def with_prompt(config):
    """An untrained model whose adapter is of virtual tokens."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=0, initializer_range=0.5))
    return get_peft_model(base, config).eval()


if __name__ == "__main__":
    train()
