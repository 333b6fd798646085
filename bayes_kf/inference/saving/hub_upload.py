"""Posteriors on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bayes_kf.inference.saving.file_names import CARD_FILE, MIXTURE_FILE


class Saved(Protocol):
    """What can be saved as a folder."""

    def save_pretrained(self, folder: str | Path, scores: Mapping[str, float] | None = None) -> None:
        """Write the folder."""


class HubUpload:
    """``push_to_hub`` for whatever has ``save_pretrained``."""

    def push_to_hub(
        self: Saved,
        repo_id: str,
        *,
        scores: Mapping[str, float] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a posterior",
    ) -> str:
        """Save into a repository of the Hub, in one commit; :meth:`from_pretrained` reads it by its name.

        A posterior in the repository is replaced, other files in it stay, but the model card is written anew.

        Args:
            repo_id: ``owner/name``; made if missing.
            scores: for the model card, as in :meth:`save_pretrained`.
            private: whether a new repository is; None: the owner's default.
            token: of the Hub; None: the one of ``hf auth login``.
            revision: the branch; None: the main one.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: if the Hub refuses.
        """
        from huggingface_hub import HfApi  # takes a while

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, scores)
            card = (folder / CARD_FILE).read_text(encoding="utf-8")
            (folder / CARD_FILE).write_text(card.replace(f'("{folder.name}"', f'("{repo_id}"'), encoding="utf-8")
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=["member_*", MIXTURE_FILE],  # of a mixture that was there before
            )
        return str(commit.commit_url)
