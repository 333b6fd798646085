"""Trains the digit transformer bundled in `bayes_kf/models/weights/digits_vit` on MNIST.

    python scripts/train_backbone.py                               # MNIST by torchvision, 6 minutes on a CPU thread
    python scripts/train_backbone.py --data ../shared/data/mnist   # {train,test}_{x,y}.npy.xz in a folder

The defaults make the bundled weights, from the same data in the same order up to the arithmetic of the machine. They
augment nothing, so that other people's handwriting is new to the network, as adapters meet it. With
`--rotate 12 --shear 0.15 --stretch 0.85 1.2 --shift 2.5 --epochs 14` the network knows most of USPS without having seen
it (0.956 of its test set, against 0.68).

Writes a Hugging Face folder: config.json, preprocessor_config.json and model.safetensors, whose metadata say how it was
trained and how it scored.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.datasets import MNIST
from transformers import ViTForImageClassification

from bayes_kf.models.zoo import DIGITS_VIT, digits_vit

CACHE = Path.home() / ".cache" / "torchvision"
Arrays = dict[str, torch.Tensor]


def read_folder(folder: Path) -> Arrays:
    """MNIST from {train,test}_{x,y}.npy.xz: uint8 images (N, 28, 28) and labels (N,)."""
    names = ("train_x", "train_y", "test_x", "test_y")
    return {k: torch.from_numpy(np.load(lzma.open(folder / f"{k}.npy.xz"), allow_pickle=False)) for k in names}


def read_torchvision(root: Path) -> Arrays:
    """MNIST from torchvision, downloaded into `root` if it is not there."""
    train, test = (MNIST(root, train=train, download=True) for train in (True, False))
    return {"train_x": train.data, "train_y": train.targets, "test_x": test.data, "test_y": test.targets}


def to_inputs(images: torch.Tensor) -> torch.Tensor:
    """Model inputs (N, 1, 28, 28) in [-1, 1] from uint8 images (N, 28, 28)."""
    return images.unsqueeze(1).float() / 127.5 - 1


def augment(x: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Images each rotated, sheared, stretched in either direction and shifted, by amounts up to those of `args`."""
    if not (args.rotate or args.shear or args.shift or tuple(args.stretch) != (1.0, 1.0)):
        return x

    def draw(bound: float) -> torch.Tensor:
        return (2 * torch.rand(len(x), generator=generator) - 1) * bound

    angle, shear, shift = draw(math.radians(args.rotate)), draw(args.shear), args.shift / 14  # the edge, at 14, is 1
    middle, spread = sum(args.stretch) / 2, (args.stretch[1] - args.stretch[0]) / 2
    width, height = middle + draw(spread), middle + draw(spread)
    rows = (
        torch.stack([angle.cos() / width, (shear - angle.sin()) / width, draw(shift)], 1),
        torch.stack([angle.sin() / height, angle.cos() / height, draw(shift)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # what comes in from outside is black


def train(model: ViTForImageClassification, x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> float:
    """Trains in place with AdamW and a one-cycle schedule; returns the seconds it took."""
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.epochs * (len(x) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps, pct_start=0.15)
    start = time.perf_counter()
    model.train()
    for epoch in range(args.epochs):
        losses = []
        for rows in torch.randperm(len(x), generator=generator).split(args.batch_size)[: len(x) // args.batch_size]:
            logits = model(augment(x[rows], args, generator)).logits
            loss = F.cross_entropy(logits, y[rows], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{args.epochs} loss {np.mean(losses):.4f} {seconds:.0f} s", flush=True)
    return time.perf_counter() - start


@torch.no_grad()
def score(model: ViTForImageClassification, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood in nats and top-label expected calibration error (15 equal-width bins)."""
    model.eval()
    log_probs = torch.cat([model(batch).logits for batch in x.split(500)]).log_softmax(-1)
    confidence, predicted = log_probs.exp().max(-1)
    correct = (predicted == y).float()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15).index_add(0, bins, confidence - correct)
    nll = F.nll_loss(log_probs, y).item()
    return {"accuracy": correct.mean().item(), "nll": nll, "ece15": gaps.abs().sum().item() / len(y)}


def save(model: ViTForImageClassification, folder: Path, metadata: dict[str, str]) -> None:
    """Writes configuration, preprocessing and float32 weights in the Hugging Face layout."""
    model.save_pretrained(folder)  # under the names of the Hugging Face hub, which every release reads
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 28, "width": 28},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of .npy.xz arrays instead of torchvision's download")
    parser.add_argument("--root", type=Path, default=CACHE, help="where torchvision keeps MNIST")
    parser.add_argument("--out", type=Path, default=DIGITS_VIT)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--rotate", type=float, default=0.0, help="degrees, at most")
    parser.add_argument("--shear", type=float, default=0.0, help="at most")
    parser.add_argument("--stretch", type=float, nargs=2, default=(1.0, 1.0), help="least and most")
    parser.add_argument("--shift", type=float, default=0.0, help="pixels, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Reads MNIST, trains, scores on the test set and saves."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    data = read_folder(args.data) if args.data else read_torchvision(args.root)
    model = digits_vit(pretrained=False, seed=args.seed)
    seconds = train(model, to_inputs(data["train_x"]), data["train_y"].long(), args)
    scores = score(model, to_inputs(data["test_x"]), data["test_y"].long())
    print("MNIST test:", " ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "root", "out")}
    metadata = {
        "trained_on": "MNIST, 60,000 training images",
        "script": "scripts/train_backbone.py",
        "settings": json.dumps(settings),
        "mnist_test": json.dumps({name: round(value, 4) for name, value in scores.items()}),
        "seconds": f"{seconds:.0f}",
        "torch": torch.__version__,
    }
    save(model, args.out, metadata)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
