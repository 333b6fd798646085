"""SmolLM2-135M-Instruct, cut in two: the layers below the adapter, which are run once, and those with the adapter.

LoRA lies on the last ``TOP`` of thirty layers, so what enters them does not depend on it. It is computed once for every
question and kept. All rows of the bench then pay for five layers instead of thirty, in training and in predictions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

TOP, RANK = 5, 8
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


class Halves:
    """The language model as its lower layers and its upper ones.

    Args:
        model: of ``common.smollm2``; its layers are shared.
    """

    def __init__(self, model: Any) -> None:
        layers = model.model.layers
        self.width, self.head = model.config.hidden_size, model.lm_head.weight
        self._lower = _with_layers(model, layers[:-TOP])
        self._lower.model.norm = nn.Identity()
        self._upper = _with_layers(model, layers[-TOP:])

    @torch.no_grad()
    def features(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """What enters the upper layers, (B, T, D), under a mask (B, T), or one of :func:`tree_mask` with positions."""
        hidden: Tensor = self._lower.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden

    def upper(self, seed: int, dropout: float, targets: str = "qv") -> Any:
        """A new copy of the upper layers with LoRA of rank 8 from this seed."""
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS[targets], lora_dropout=dropout)
        own = copy.deepcopy(self._upper.model)
        for layer in own.layers:
            layer.self_attn.config = own.config  # one configuration, so that the kind of attention can be changed
        return get_peft_model(own, config).eval()

    def upper_model(self) -> Any:
        """A copy of the upper layers as a causal language model, which needs other embeddings."""
        own = copy.deepcopy(self._upper)
        for number, layer in enumerate(own.model.layers):
            layer.self_attn.layer_idx = number  # its place in a cache
        return own


def _with_layers(model: Any, layers: nn.ModuleList) -> Any:
    """The model with some of its layers."""
    cut = copy.copy(model)
    cut._modules = dict(model._modules)
    cut.model = copy.copy(model.model)
    cut.model._modules = dict(model.model._modules)
    cut.model.layers = layers
    cut.model.config = copy.deepcopy(model.config)
    cut.model.config.num_hidden_layers = len(layers)
    return cut


class Letters(nn.Module):
    """The logits of option letters after a prompt, (B, m).

    Args:
        upper: the layers with the adapter.
        head: rows of the output matrix for the letters, (m, D).
    """

    def __init__(self, upper: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.upper = upper
        self.register_buffer("head", head.detach().clone())

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits from features (B, T, D) and their mask (B, T), padded on the right."""
        hidden = self.upper(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        last = attention_mask.sum(1) - 1
        chosen = hidden.last_hidden_state.gather(
            1, last.view(-1, 1, 1).expand(-1, 1, hidden.last_hidden_state.shape[-1])
        )
        return chosen.squeeze(1) @ self.head.T


class Texts(nn.Module):
    """The log-likelihood of each option's tokens, divided by their number, (B, m).

    The options of a question follow each other in one sequence, after what they share, which is so read once; none
    sees another (:func:`tree_mask`).

    Args:
        upper: the layers with the adapter.
        head: the output matrix, (V, D).
        options: m.
    """

    def __init__(self, upper: nn.Module, head: Tensor, options: int) -> None:
        super().__init__()
        self.upper, self.options = upper, options
        self.register_buffer("head", head.detach(), persistent=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        branch: Tensor,
        position: Tensor,
        token: Tensor,
        token_branch: Tensor,
        source: Tensor,
    ) -> Tensor:
        """Logits.

        Args:
            inputs_embeds: features (B, T, D).
            attention_mask: 0 at padding, (B, T).
            branch: 0 for what the options share, else the number of the option from 1, (B, T).
            position: in the text of the own option, (B, T).
            token: the scored tokens, (B, S).
            token_branch: the option of each, from 1; 0 at padding, (B, S).
            source: the place in the sequence that predicts each, (B, S).
        """
        mask = tree_mask(attention_mask, branch, inputs_embeds.dtype)
        hidden = self.upper(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position, use_cache=False
        ).last_hidden_state
        chosen = hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        log_probs = (chosen @ self.head.T).log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        own = torch.nn.functional.one_hot(token_branch, self.options + 1)[..., 1:].to(log_probs.dtype)  # (B, S, m)
        return (log_probs.unsqueeze(-1) * own).sum(1) / own.sum(1)


def tree_mask(attention_mask: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores, (B, 1, T, T): a token sees those before it on its branch and on branch 0."""
    place = torch.arange(branch.shape[1], device=branch.device)
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    related = (branch.unsqueeze(1) == 0) | (branch.unsqueeze(1) == branch.unsqueeze(2))
    seen = (earlier & related & attention_mask.bool().unsqueeze(1)) | torch.eye(len(place), dtype=torch.bool)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
