"""Inputs for the command line, made from UCI digits and a few words, and a way to run it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

from bayes_kf.cli import main
from bayes_kf.data import uci_digits, uci_digits_split
from bayes_kf.models.zoo import quiet_transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "so", "good", "fine", "dull", "bad", "awful"]
REVIEWS = [("a good film", "pos"), ("so fine", "pos"), ("a bad film", "neg"), ("awful", "neg"), ("so dull", "meh")] * 3


def write_inputs(root: Path) -> Path:
    """Every kind of input, in a folder."""
    stream, rest = uci_digits_split(24)
    np.savez(root / "digits.npz", x=stream.images.numpy(), y=stream.labels.numpy())
    np.savez(root / "heldout.npz", x=rest.images[:50].numpy(), y=rest.labels[:50].numpy())
    np.savez(root / "strange.npz", x=rest.images[:20].flip(-1).numpy(), y=np.arange(20))  # labels beyond the model's
    write_images(root / "images", (3, 7))
    with quiet_transformers():
        write_bert(root / "bert")
    (root / "reviews.csv").write_text("text,label\n" + "\n".join(",".join(row) for row in REVIEWS), encoding="utf-8")
    rows = [json.dumps({"sentence": text, "mark": label}) for text, label in REVIEWS]
    (root / "reviews.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "lora.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}))
    return root


def write_images(path: Path, digits: tuple[int, ...]) -> None:
    """Six grey pictures of each digit, in a folder of its name."""
    images, labels = uci_digits()
    for digit in digits:
        (path / str(digit)).mkdir(parents=True)
        for i, image in enumerate(images[labels == digit][:6]):
            pixels = ((image[0] + 1) * 127.5).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(path / str(digit) / f"{i}.png")


def write_bert(path: Path) -> None:
    """An untrained encoder without a head, and a tokenizer of thirteen words."""
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(path)


def bert_config(**fields) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        **fields,
    )


def run(*words: object) -> int:
    """The exit status of a quiet command."""
    return main([*map(str, words), "--quiet"])


def own(stderr: str) -> str:
    """What a process of ours wrote there; bitsandbytes says, where it is installed, which kernels it lacks."""
    return "\n".join(line for line in stderr.splitlines() if "gemm_4bit" not in line)
