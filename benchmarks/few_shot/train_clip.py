"""Train the small CLIP of the few-shot bench: 28x28 grey images and prompts, both towers from scratch.

It learns USPS digits, Omniglot's characters and CIFAR-10 in grey from images and captions ("a drawing of the letter
a."), by the contrastive loss in which every pair of the same class is a match. MNIST, UCI's digits, notMNIST's letters,
Kuzushiji-MNIST and Fashion-MNIST are held out. The model has learned digits and letters by name and in other hands, and
no image of the other classes. Writes ``results/few_shot_clip.safetensors`` (half precision) and, in
``results/few_shot_clip.md``, the zero-shot accuracy of prompts.

    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.train_clip           # about 20 minutes on one core
    OMP_NUM_THREADS=1 python -m benchmarks.few_shot.train_clip --test    # only test the existing weights
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPModel

from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.few_shot.clip import LetterTokenizer, save, trained, untrained
from benchmarks.few_shot.images import (
    Named,
    characters,
    clothes,
    font_letters,
    kana,
    mnist_digits,
    photographs,
    uci_digits,
    usps_digits,
)

TEMPLATES = ("a photo of a {}.", "a drawing of the {}.", "{}", "the {} in grey.", "an image of one {}.")
SEEN: tuple[tuple[Callable[[str], Named], int], ...] = ((usps_digits, 72), (characters, 128), (photographs, 56))
RATE, WARM_UP, DECAY = 1e-3, 200, 0.05
TESTED = 2000  # images of every set
TESTS: dict[str, tuple[str, Callable[[], Named]]] = {
    "USPS test": ("seen", lambda: usps_digits("test")),
    "Omniglot, other drawers": ("seen", lambda: characters("test")),
    "CIFAR-10 test, grey, JPEG": ("seen", lambda: photographs("test")),
    "MNIST test": ("held out; digits seen in USPS", lambda: mnist_digits("test")),
    "UCI digits": ("held out; digits seen in USPS", uci_digits),
    "notMNIST": ("held out; letters seen handwritten, in lower case", font_letters),
    "KMNIST": ("held out; syllables seen in katakana, another script", kana),
    "Fashion-MNIST": ("held out", clothes),
}


def warped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images rotated by up to 17 degrees, scaled, sheared and shifted, some blurred, noisy or of less contrast."""
    size = len(images)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    angle, shear, zoom, aspect = drawn(-0.3, 0.3), drawn(-0.3, 0.3), drawn(0.85, 1.4), drawn(0.85, 1.15)
    rows = [
        torch.stack([zoom * aspect * angle.cos(), zoom * (shear - angle.sin()), drawn(-0.25, 0.25)], 1),
        torch.stack([zoom * angle.sin(), zoom / aspect * angle.cos(), drawn(-0.25, 0.25)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.where((drawn(0, 1) < 0.3).view(-1, 1, 1, 1), soft, moved)
    moved = (moved + 1) * drawn(0.6, 1.2).view(-1, 1, 1, 1) - 1
    noise = torch.randn(images.shape, generator=generator) * drawn(-0.2, 0.2).clamp_min(0).view(-1, 1, 1, 1)
    return (moved + noise).clamp(-1, 1)


def batch(sets: list[Named], generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
    """Images, the index of each image's caption, and the captions: one for every class in the batch."""
    images, captions = [], []
    for (_, number), data in zip(SEEN, sets, strict=True):
        which = torch.randint(len(data.labels), (number,), generator=generator)
        images.append(data.images[which])
        captions += [data.names[label] for label in data.labels[which].tolist()]
    names = sorted(set(captions))
    drawn = torch.randint(len(TEMPLATES), (len(names),), generator=generator).tolist()
    texts = [TEMPLATES[template].format(name) for template, name in zip(drawn, names, strict=True)]
    return warped(torch.cat(images), generator), torch.tensor([names.index(c) for c in captions]), texts


def contrastive(logits: Tensor, captions: Tensor) -> Tensor:
    """Cross-entropy of captions given images and of images given captions; every image of a class is a match.

    Args:
        logits: scaled similarities of images and captions, (B, C).
        captions: index of each image's caption, (B,).
    """
    match = F.one_hot(captions, logits.shape[1]).to(logits)
    to_images = -(match / match.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return 0.5 * (F.cross_entropy(logits, captions) + to_images)


def train(steps: int, seed: int = 0) -> CLIPModel:
    """The trained model."""
    model, tokenizer = untrained(seed).train(), LetterTokenizer()
    sets = [read("train") for read, _ in SEEN]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * k / steps)))
    )
    bar, mean = tqdm(range(steps), unit="step", disable=not sys.stderr.isatty()), None
    for step in bar:
        images, captions, texts = batch(sets, generator)
        image_features = F.normalize(features(model.get_image_features(pixel_values=images)), dim=-1)
        text_features = F.normalize(features(model.get_text_features(**tokenizer(texts))), dim=-1)
        loss = contrastive(model.logit_scale.exp() * image_features @ text_features.T, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        mean = float(loss.detach()) if mean is None else 0.98 * mean + 0.02 * float(loss.detach())
        bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
        if not sys.stderr.isatty() and step % 200 == 199:
            print(f"step {step + 1}: loss {mean:.3f}", file=sys.stderr, flush=True)
    return model.eval()


def features(output: object) -> Tensor:
    """A tower's features, whether transformers returns them or an object that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined,no-any-return]


@torch.no_grad()
def zero_shot(model: CLIPModel, data: Named) -> float:
    """Accuracy of the class with the most similar prompt, "a photo of a ..."."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:TESTED]
    prompts = LetterTokenizer()([TEMPLATES[0].format(name) for name in data.names])
    text_features = F.normalize(features(model.get_text_features(**prompts)), dim=-1)
    right = [
        (features(model.get_image_features(pixel_values=data.images[part])) @ text_features.T).argmax(1)
        == data.labels[part]
        for part in order.split(500)
    ]
    return torch.cat(right).double().mean().item()


def main() -> None:
    """The command line."""
    command = Command(__doc__).option("--steps", type=int, default=2600, help="batches of 256 images (%(default)s)")
    args = command.option("--test", action="store_true", help="only test the existing weights").parse()
    file = ResultFile("few_shot_clip")
    start = time.process_time()
    if not args.test:
        save(train(args.steps))
        file.begin()
        file.put("training", {"steps": args.steps, "processor_seconds": round(time.process_time() - start)})
    model = trained()
    for name, (_, read) in TESTS.items():
        data = read()
        file.put(name, {"classes": len(data.names), "images": min(TESTED, len(data.labels))})
        file.put(name, file.cells[name] | {"accuracy": zero_shot(model, data)})
    rows = [
        [name, kind, str(file.cells[name]["classes"]), f"{file.cells[name]['accuracy']:.3f}"]
        for name, (kind, _) in TESTS.items()
    ]
    numbers = sum(p.numel() for p in model.parameters())
    scale, training = float(model.logit_scale.exp().detach()), file.cells["training"]
    body = [
        f"{numbers:,} parameters, {training['steps']:,} batches of {sum(n for _, n in SEEN)} images, "
        f"{training['processor_seconds'] / 60:.0f} minutes on one core; the scale of the logits ended at {scale:.1f}.",
        'Accuracy of the nearest prompt "a photo of a ...", no example learned:',
        "",
        *markdown_table(["data", "in training", "classes", "accuracy"], rows),
    ]
    print(file.write_markdown("The small CLIP of the few-shot bench", body))


if __name__ == "__main__":
    main()
