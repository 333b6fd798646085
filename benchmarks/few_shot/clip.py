"""The small CLIP of the few-shot bench: its two towers, its tokenizer, and its weights.

A ``transformers.CLIPModel`` for grey 28x28 images in [-1, 1] and texts of single letters. ``train_clip.py`` makes the
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from benchmarks.common.result_files import RESULTS

WEIGHTS = RESULTS / "few_shot_clip.safetensors"
LETTERS = " .,'-abcdefghijklmnopqrstuvwxyz0123456789"
PAD, START, END = 0, len(LETTERS) + 1, len(LETTERS) + 2
LONGEST = 48  # letters, with start and end token
WIDTH, VISION_LAYERS, TEXT_LAYERS, PATCH = 96, 3, 2, 7
FEATURES = 64  # width of both towers' features


class LetterTokenizer:
    """A tokenizer of letters with the interface of transformers' tokenizers.

    Case and unknown letters are ignored.
    """

    def __call__(self, texts: Sequence[str], padding: bool = True, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Token ids and attention mask, (N, T), of texts; shorter ones are padded."""
        known = [[LETTERS.index(letter) + 1 for letter in text.lower() if letter in LETTERS] for text in texts]
        length = max(len(letters) for letters in known) + 2
        if length > LONGEST:
            raise ValueError(f"`texts` must have at most {LONGEST - 2} letters, got {length - 2}.")
        rows = [[START, *letters, END, *[PAD] * (length - 2 - len(letters))] for letters in known]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def config(width: int = WIDTH, vision_layers: int = VISION_LAYERS, text_layers: int = TEXT_LAYERS) -> CLIPConfig:
    """The model's configuration."""
    shared = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "projection_dim": FEATURES,
    }
    return CLIPConfig(
        vision_config=shared
        | {"num_hidden_layers": vision_layers, "image_size": 28, "patch_size": PATCH, "num_channels": 1},
        text_config=shared
        | {
            "num_hidden_layers": text_layers,
            "vocab_size": END + 1,
            "max_position_embeddings": LONGEST,
            "pad_token_id": PAD,
            "bos_token_id": START,
            "eos_token_id": END,
        },
        projection_dim=FEATURES,
    )


def untrained(seed: int = 0, **sizes: int) -> CLIPModel:
    """The model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config(**sizes)).eval()


def trained(path: Path = WEIGHTS) -> CLIPModel:
    """The model with the weights of ``train_clip.py``, in float32.

    Raises:
        FileNotFoundError: if the weights do not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be the output of benchmarks/few_shot/train_clip.py, got {path}.")
    model = untrained()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    model.load_state_dict(tensors)
    return model.eval()


def save(model: CLIPModel, path: Path = WEIGHTS) -> None:
    """Write the model's tensors in half precision."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path)
