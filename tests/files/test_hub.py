"""Folders of the Hub, without a network: its cache, and an upload into it."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import bayes_kf as bkf
from bayes_kf.files.hub import local_folder


class Cache:
    """The cache of the Hub's downloads, as huggingface_hub lays it out: links to files named by their hash."""

    def __init__(self, root):
        self.root = root

    def put(self, repo_id, folder, commit="0" * 40):
        repository = self.root / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        shutil.rmtree(snapshot, ignore_errors=True)
        for path in Path(folder).rglob("*"):
            if path.is_file():
                blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
                blob.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, blob)
                link = snapshot / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
        return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Cache(root)


@pytest.fixture
def fitted():
    torch.manual_seed(0)
    data = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(6)]
    return bkf.fit(torch.nn.Linear(3, 2), data, bkf.KalmanConfig(), progress=False)


def test_a_posterior_comes_from_the_hub_by_its_name(cache, fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "saved")
    cache.put("someone/posterior", tmp_path / "saved")
    opened = bkf.Posterior.from_pretrained("someone/posterior", torch.nn.Linear(3, 2))
    assert torch.equal(opened.mean_vector, fitted.mean_vector)
    assert opened.config == fitted.config


def test_what_is_pushed_is_read_again(cache, fitted, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, revision, commit_message, delete_patterns):
            cache.put(repo_id, folder_path)
            calls.append(("upload", revision, commit_message, tuple(delete_patterns)))
            return SimpleNamespace(commit_url="address")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    mixture = bkf.MixturePosterior((fitted, fitted), (0.5, 0.5))
    assert mixture.push_to_hub("someone/mixture", private=True, token="secret") == "address"
    assert calls[:2] == [("token", "secret"), ("create", "someone/mixture", True, True)]
    opened = bkf.Posterior.from_pretrained("someone/mixture", torch.nn.Linear(3, 2))
    assert len(opened.members) == 2
    card = (cache.root / f"models--someone--mixture/snapshots/{'0' * 40}/README.md").read_text()
    assert 'from_pretrained("someone/mixture", base_model)' in card
    fitted.push_to_hub("someone/mixture")
    assert calls[-1] == ("upload", None, "Upload a posterior", ("member_*", "mixture.json"))
    assert isinstance(bkf.Posterior.from_pretrained("someone/mixture", torch.nn.Linear(3, 2)), bkf.Posterior)


def test_a_repository_that_cannot_be_reached_is_named(cache):
    with pytest.raises(ValueError, match="`folder` must be a folder or a repository of the Hub, got no/where: "):
        bkf.Posterior.from_pretrained("no/where", torch.nn.Linear(3, 2))


def test_folders_come_first_and_pickles_never(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "folder").mkdir(parents=True)
    assert local_folder("own/folder", argument="folder") == Path("own/folder")
    assert local_folder(tmp_path / "none", argument="folder") == tmp_path / "none"  # no repository's name
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.update(given) or "there")
    assert local_folder("some/one", argument="folder", revision="v1") == Path("there")
    assert asked["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in asked["allow_patterns"][:-1])
