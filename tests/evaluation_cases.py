"""Small cases that several tests of the evaluation share."""

import torch


def random_case(num_examples: int = 200, num_classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(num_examples, num_classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def history(length: int = 30) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(length, generator=generator)
    return {"log_loss": loss, "correct": loss < 0.6, "innovation": 2 * loss, "dof": torch.full((length,), 2)}
