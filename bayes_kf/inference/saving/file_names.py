"""The names of the files of a posterior and of exported draws, and which existing files a save may replace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bayes_kf.files.checksums import CHECKSUMS_FILE, EDITABLE
from bayes_kf.files.ownership import SaveKind
from bayes_kf.inference.config import CONFIG_FILE

STATE_FILE = "kalman_state.safetensors"
CARD_FILE, MODEL_FILE = "README.md", "model.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LABELS_FILE, HEAD_FILE, HISTORY_FILE = "labels.json", "new_head.safetensors", "history.npz"
STREAM_FILE = "stream.json"
MIXTURE_FILE, DRAWS_FILE = "mixture.json", "draws.json"
IGNORED_SETTINGS = (  # settings of an adapter that change no output, or that PEFT reads from the base
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version"),
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
)


def member_folder(number: int) -> str:
    """The name of the folder of a mixture's member; member 0 lies in the mixture's folder itself."""
    return f"member_{number}"


def mixture_files(folder: Path, num_members: int) -> list[str]:
    """The files of a mixture in ``folder`` that nobody edits, without those of its best member; none of one member."""
    paths = [f"{member_folder(number)}/{name}" for number in range(1, num_members) for name in _OF_MEMBER]
    return [name for name in (*paths, MIXTURE_FILE) if (folder / name).is_file()]


def _editable_digests(folder: Path) -> dict[str, str]:
    """Name -> digest, when they were saved, of the files that people may edit; the state files record them."""
    digests = _recorded_digests(folder)
    for path in folder.glob(f"member_*/{STATE_FILE}"):
        digests |= {f"{path.parent.name}/{name}": saved for name, saved in _recorded_digests(path.parent).items()}
    return digests


def _recorded_digests(folder: Path) -> dict[str, str]:
    """The digests in the state file of one folder."""
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["bayes_kf"]).get("editable", {})
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, RecursionError):
        return {}
    return {name: saved[name] for name in EDITABLE if isinstance(saved, dict) and isinstance(saved.get(name), str)}


def _same_adapter(path: Path, new: Path) -> bool:
    """Whether two ``adapter_config.json`` describe the same adapter, if only the base's name was edited, say."""

    def settings(file: Path) -> dict[str, Any]:
        return {
            name: value for name, value in json.loads(file.read_text("utf-8")).items() if name not in IGNORED_SETTINGS
        }

    try:
        one, two = settings(path), settings(new)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return one == two


_OWN = (CONFIG_FILE, STATE_FILE, MODEL_FILE, ADAPTER_FILES[1], LABELS_FILE, HEAD_FILE, HISTORY_FILE, STREAM_FILE)
_OF_MEMBER = (CONFIG_FILE, STATE_FILE, MODEL_FILE, ADAPTER_FILES[1])
POSTERIOR = SaveKind(
    checksums=CHECKSUMS_FILE,
    names=re.compile(
        "|".join(re.escape(name) for name in (*_OWN, MIXTURE_FILE))
        + rf"|member_\d+/({'|'.join(re.escape(name) for name in _OF_MEMBER)})"
    ),
    editable=_editable_digests,
    may_keep={CARD_FILE: lambda path, new: True, ADAPTER_FILES[0]: _same_adapter},
    warn_if_kept={CARD_FILE},
)
DRAWS = SaveKind(
    checksums=f"{CHECKSUMS_FILE}.draws",
    names=re.compile(rf"{re.escape(DRAWS_FILE)}|draw_\d+/({'|'.join(re.escape(name) for name in ADAPTER_FILES)})"),
)
