"""Feature adapters and LoRA against their formulas, prompts, and checkpoints written to a folder and read again."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from clip_models import images, moved, small_clip
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from bayes_kf.models.clip import ClipClassifier, FeatureAdapter, clip_lora, load_clip, prompt_tokens

WORDS = ("a", "photo", "of", "cat", "horse", "drawing", ".")


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# feature adapters


def test_residual_adapter_starts_where_the_model_is():
    adapter, x = FeatureAdapter(8, 3, seed=1), features(2, 5, 8)
    assert torch.equal(adapter(x), x)
    moved(adapter)
    d, u = adapter.down, adapter.up
    expected = x + F.gelu(x @ d.weight.T + d.bias) @ u.weight.T + u.bias
    torch.testing.assert_close(adapter(x), expected)
    assert d.weight.shape == (3, 8)


def test_blend_is_clip_adapters():
    adapter, x = FeatureAdapter(8, form="blend", blend=0.3), features(5, 8)
    assert [name for name, _ in adapter.named_parameters()] == ["down.weight", "up.weight"]
    assert adapter.down.weight.shape == (2, 8)
    learned = (x @ adapter.down.weight.T).relu() @ adapter.up.weight.T
    torch.testing.assert_close(adapter(x), 0.7 * x + 0.3 * learned.relu())


def test_adapters_are_drawn_by_their_seed_and_leave_the_global_generator():
    state = torch.get_rng_state()
    drawn = FeatureAdapter(8, seed=3, form="blend")
    assert torch.equal(drawn.up.weight, FeatureAdapter(8, seed=3, form="blend").up.weight)
    assert not torch.equal(drawn.up.weight, FeatureAdapter(8, seed=4, form="blend").up.weight)
    clip_lora(small_clip(), seed=5)
    FeatureAdapter(8)
    assert bool(drawn.up.weight.abs().max() <= 1 / math.sqrt(2))  # uniform on ±1/√(width of what goes in), as torch's
    torch.manual_seed(0)
    before = torch.get_rng_state()
    FeatureAdapter(8, seed=9)
    clip_lora(small_clip(seed=0), seed=9)
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())
    assert state.shape == before.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "`width` and `bottleneck` must be at least 1, got 0 and 1"),
        ({"width": 4, "bottleneck": 0}, "`width` and `bottleneck` must be at least 1, got 4 and 0"),
        ({"width": 4, "form": "linear"}, "`form` must be one of residual, blend, got 'linear'"),
        ({"width": 4, "blend": 0.0}, r"`blend` must lie in \(0, 1\], got 0.0"),
        ({"width": 4, "blend": 1.5}, r"`blend` must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_adapters(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureAdapter(**arguments)


# LoRA


@pytest.mark.parametrize(
    ("encoders", "layers"), [(("vision", "text"), 4), (("vision",), 2), (("text",), 2)], ids=["both", "vision", "text"]
)
def test_lora_is_in_every_layer_asked_for(encoders, layers):
    model = clip_lora(small_clip(), rank=3, encoders=encoders)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == layers * 3 * 2  # q, k, v; A and B
    towers = {"vision" if "vision_model" in name else "text" for name in names}
    assert towers == set(encoders)
    assert {name.split(".")[-4] for name in names} == {"q_proj", "k_proj", "v_proj"}
    assert all(p.shape == ((3, 8) if "lora_A" in n else (8, 3)) for n, p in model.named_parameters() if p.requires_grad)


def test_lora_adds_alpha_over_the_root_of_the_rank():
    base, model = small_clip(), moved(clip_lora(small_clip(), rank=4, alpha=3.0))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in base.named_parameters():
            path = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.default.weight" in own:
                a, b = (own[f"{path}.lora_{factor}.default.weight"] for factor in "AB")
                weight += 3.0 / 2.0 * b @ a
    expected = base.get_image_features(pixel_values=images()).pooler_output
    actual = model.get_image_features(pixel_values=images()).pooler_output
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    plain = small_clip().get_image_features(pixel_values=images()).pooler_output
    assert not torch.allclose(actual, plain)


def test_lora_starts_where_the_model_is_and_drops_out_in_training():
    model = clip_lora(small_clip())
    x = images()
    plain = small_clip().get_image_features(pixel_values=x).pooler_output
    torch.testing.assert_close(model.get_image_features(pixel_values=x).pooler_output, plain, rtol=0, atol=0)
    moved(model)
    torch.manual_seed(0)
    model.train()
    once, twice = (model.get_image_features(pixel_values=x).pooler_output for _ in range(2))
    assert not torch.allclose(once, twice)
    model.eval()
    once, twice = (model.get_image_features(pixel_values=x).pooler_output for _ in range(2))
    assert torch.equal(once, twice)


def test_lora_is_drawn_by_its_seed():
    first, again, other = (clip_lora(small_clip(), seed=seed).state_dict() for seed in (1, 1, 2))
    names = [name for name in first if "lora_A" in name]
    assert names
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"encoders": ("audio",)}, r"`encoders` must be some of vision, text, got \('audio',\)"),
        ({"encoders": ()}, r"`encoders` must be some of vision, text, got \(\)"),
    ],
)
def test_bad_lora(arguments, message):
    with pytest.raises(ValueError, match=message):
        clip_lora(small_clip(), **arguments)


# prompts and checkpoints


def tokenizer(folder):
    """A real CLIP tokenizer whose words are whole, made here."""
    letters = sorted(set("".join(WORDS)))
    pieces, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[-2], parts[-1])
            parts[-2:] = ["".join(merge)]
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(["!", *pieces]))}
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[mark] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16), vocabulary


def test_prompts_of_a_real_tokenizer(tmp_path):
    words, vocabulary = tokenizer(tmp_path)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]

    def numbers(text):
        return [start, *(vocabulary[f"{word}</w>"] for word in text.split()), end]

    one = prompt_tokens(words, ["cat", "horse"])
    assert one["input_ids"].tolist() == [numbers("a photo of a cat ."), numbers("a photo of a horse .")]
    two = prompt_tokens(words, ["cat", "horse"], ["a photo of a {}.", "a drawing of {}"])
    assert two["input_ids"].shape == two["attention_mask"].shape == (2, 2, 8)
    for row, name in enumerate(("cat", "horse")):
        for column, text in enumerate((f"a photo of a {name} .", f"a drawing of {name}")):
            kept = two["input_ids"][row, column][two["attention_mask"][row, column].bool()]
            assert kept.tolist() == numbers(text)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], "{}", r"`names` must be a sequence of at least one name, got \[\]"),
        ("cat", "{}", "`names` must be a sequence of at least one name, got 'cat'"),
        (["cat"], "a photo", r"`templates` must hold \{\} in the place of the name, got 'a photo'"),
        (["cat"], [], r"`templates` must hold \{\} in the place of the name, got \[\]"),
    ],
)
def test_bad_prompts(names, templates, message):
    with pytest.raises(ValueError, match=message):
        prompt_tokens(None, names, templates)


def test_a_checkpoint_is_read_from_its_folder(tmp_path):
    words, vocabulary = tokenizer(tmp_path)
    marks = {"bos_token_id": vocabulary["<|startoftext|>"], "eos_token_id": vocabulary["<|endoftext|>"]}
    clip = small_clip(
        torch.float32,
        vocab_size=len(vocabulary),
        max_position_embeddings=16,
        pad_token_id=marks["eos_token_id"],
        **marks,
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    clip.save_pretrained(tmp_path / "clip")
    CLIPProcessor(pictures, words).save_pretrained(tmp_path / "clip")
    model, processor = load_clip(tmp_path / "clip")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    picture = torch.randint(0, 256, (3, 10, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    texts = ["a photo of a cat.", "a photo of a horse."]
    both = processor(images=[picture], text=texts, padding=True, return_tensors="pt")
    expected = clip(**both).logits_per_image
    classifier = ClipClassifier(model, **prompt_tokens(processor.tokenizer, ["cat", "horse"]))
    torch.testing.assert_close(classifier(both["pixel_values"]), expected)
    assert both["pixel_values"].shape == (1, 3, 8, 8)


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` must hold a CLIP checkpoint with config.json, got .*nowhere"):
        load_clip(tmp_path / "nowhere")
    small_clip().save_pretrained(tmp_path)  # no processor
    with pytest.raises(ValueError, match="`folder` must hold a readable CLIP checkpoint, got "):
        load_clip(tmp_path)
