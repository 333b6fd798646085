"""Folders on the Hugging Face Hub: downloaded into its cache, and found there without a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
SAFE_FILES = ("*.json", "*.safetensors", "*.npz", "*.txt", "*.md", "*.model", "*.jinja", "SHA256SUMS*")


def local_folder(
    name: str | Path,
    *,
    argument: str,
    revision: str | None = None,
    token: str | bool | None = None,
    patterns: Sequence[str] = SAFE_FILES,
) -> Path:
    """The folder of a name: the folder itself if it exists, else a repository ``owner/name`` of the Hub, downloaded.

    Pickles are never among the files.

    Args:
        name: of the folder or the repository.
        argument: that gave it, for errors.
        revision: branch, tag or commit of the repository.
        token: of the Hub, for private repositories.
        patterns: names of the files to download.

    Returns:
        The folder. A name that can be no repository comes back as it is.

    Raises:
        ValueError: if there is neither a folder nor a repository, or it cannot be reached and is not in the cache.
    """
    folder = Path(name)
    if folder.exists() or not REPOSITORY.fullmatch(str(name)):
        return folder
    import huggingface_hub  # takes a while
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(str(name), revision=revision, token=token, allow_patterns=list(patterns))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`{argument}` must be a folder or a repository of the Hub, got {name}: {reason}") from error
