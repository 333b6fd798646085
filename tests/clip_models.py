"""Small CLIP models and tokens for the tests."""

import torch
from transformers import CLIPConfig, CLIPModel

IDS = torch.tensor([[1, 4, 5, 11, 0], [1, 6, 11, 0, 0], [1, 7, 8, 9, 11]])
PROMPTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
CLASSES = 3


def small_clip(dtype=torch.float64, seed=0, **text):
    """A frozen CLIPModel of 8x8 images in three channels, with weights large enough to matter."""
    torch.manual_seed(seed)
    shared = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=shared | {"image_size": 8, "patch_size": 4},
        text_config=shared
        | {"vocab_size": 12, "max_position_embeddings": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 11}
        | text,
        projection_dim=6,
    )
    model = CLIPModel(config).to(dtype)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.mul_(5.0 if "embedding" in name else 2.0)
    return model.requires_grad_(False).eval()


def images(size=4, dtype=torch.float64, seed=0):
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moved(model, seed=0, sd=0.3):
    """The model with its trainable tensors moved from where they started: LoRA's B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(sd * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
    return model
