"""Posteriors saved beside other files, by processes that are killed, stopped or run at the same time."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import bayes_kf as bkf
from bayes_kf.files import atomic_folder, staging
from bayes_kf.files.checksums import digest
from bayes_kf.inference.saving import state_file
from benchmarks.reliability.folder_snapshots import killed_at, snapshot

SAVING = """
import sys
import torch
import bayes_kf as bkf

model = torch.nn.Linear(30, 3)
kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=1.0, covariance="diagonal"))
state, g = kf.init(), torch.Generator().manual_seed(0)
while True:
    state, _ = kf.update(state, torch.randn(1, 30, generator=g), torch.tensor([0]))
    bkf.Posterior(kf, state).save_pretrained(sys.argv[1])
    print(state.step, flush=True)
"""
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL or links")


def posterior(value):
    model = torch.nn.Linear(3, 2)
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=0.1, covariance="diagonal"))
    state = kf.init()
    belief = state.belief._replace(mean=torch.full_like(state.belief.mean, value))
    return bkf.Posterior(kf, state._replace(belief=belief, step=int(value)))


def value(folder):
    """The number of the posterior that a folder opens as; all its files are of that one."""
    actual = bkf.Posterior.from_pretrained(folder, torch.nn.Linear(3, 2))
    assert actual.mean_vector.unique().tolist() == [actual.state.step]
    return actual.state.step


def write_other_files(folder):
    """Write files that are not ours: beside, below, hidden, links; some have names of a posterior's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "my notes, übrigens.md").write_text("x")
    (folder / "adapter_model.safetensors").write_text("of another adapter")  # the posterior's is model.safetensors
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "kalman_state.safetensors").write_bytes(b"\0" * 9)
    (folder / ".bayes_kf-save-mynotes_").write_text("a file of that name")
    (folder / ".bayes_kf-save-folder__").mkdir()
    (folder / ".bayes_kf-save-folder__" / "own").write_text("and a folder")
    (folder / "nowhere").symlink_to("gone")
    (folder / "link").symlink_to("tokenizer.json")
    return snapshot(folder)


def snapshot_of(folder, names):
    return {name: what for name, what in snapshot(folder).items() if name in names}


OURS = {"README.md", "SHA256SUMS", "kalman_config.json", "kalman_state.safetensors", "model.safetensors"}


@POSIX
def test_save_leaves_other_files_unchanged(tmp_path):
    folder = tmp_path / "with ünicode and spaces"
    before = write_other_files(folder)
    for number in (1, 2):
        posterior(number).save_pretrained(folder)
        assert snapshot_of(folder, before) == before
        assert set(snapshot(folder)) == before.keys() | OURS
        assert value(folder) == number
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", sorted(OURS - {"README.md"}))
def test_save_refuses_a_file_in_the_way_and_changes_nothing(name, tmp_path):
    (tmp_path / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"`folder` must have no other files .* got {re.escape(name)} \(not written"):
        posterior(1).save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before
    (tmp_path / name).unlink()
    posterior(1).save_pretrained(tmp_path)
    (tmp_path / name).write_text("edited")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"got {name} \((changed since it was saved|not written by bayes_kf)\)"):
        posterior(2).save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


@POSIX
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.chmod(0o444), "read-only"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "a link"),
        (lambda path: (path.rename(path.with_name("big")), path.symlink_to("big")), "a link"),  # with the right content
        (lambda path: (path.unlink(), path.mkdir()), "not a file"),
    ],
    ids=["read-only", "dangling", "moved", "folder"],
)
def test_save_refuses_links_folders_and_read_only_files(make, reason, tmp_path):
    posterior(1).save_pretrained(tmp_path)
    make(tmp_path / "model.safetensors")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"got model\.safetensors \({reason}\)"):
        posterior(2).save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("first", [True, False], ids=["a README of one's own", "an edited card"])
def test_an_edited_readme_stays(first, tmp_path):
    if not first:
        posterior(1).save_pretrained(tmp_path)
        posterior(2).save_pretrained(tmp_path)  # an untouched card is replaced
        assert "in 2 updates" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("mine")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"README\.md was edited, or bayes_kf did not write it, and stays"):
            posterior(3).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"
        assert value(tmp_path) == 3


def adapter(rank=1):
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(r=rank, target_modules=["0"]))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=0.1))
    return bkf.Posterior(kf, kf.init())


def test_an_edited_adapter_config_stays_if_it_describes_the_same_adapter(tmp_path):
    adapter().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    edited = json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "me/my-base", "revision": "v2"})
    path.write_text(edited)
    adapter().save_pretrained(tmp_path)
    assert path.read_text() == edited
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"got adapter_config\.json \(changed since it was saved\)"):
        adapter(rank=2).save_pretrained(tmp_path)  # of which it would say what is not so
    assert snapshot(tmp_path) == before


def test_only_files_of_the_old_posterior_are_removed(tmp_path):
    from bayes_kf.cli.posterior_folder import Labels, read_labels, save_posterior

    save_posterior(posterior(1), tmp_path, Labels(("a", "b"), 2), {}, {"stream.json": "{}"})
    (tmp_path / "notes").write_text("x")
    adapter().save_pretrained(tmp_path)
    assert set(snapshot(tmp_path)) == {
        "adapter_config.json", "adapter_model.safetensors", "kalman_config.json", "kalman_state.safetensors",
        "README.md", "SHA256SUMS", "notes",
    }  # fmt: skip
    (tmp_path / "labels.json").write_text('{"class_names": ["x", "y"], "num_outputs": 2}')  # of something else
    assert read_labels(tmp_path) is None
    lines = [line.split("  ") for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    assert {name: noted for noted, name in lines} == {
        name: digest(tmp_path / name)
        for name in ("adapter_model.safetensors", "kalman_config.json", "kalman_state.safetensors")
    }


def test_rewritten_checksums_do_not_make_a_file_ours(tmp_path):
    posterior(1).save_pretrained(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    names = [path.name for path in tmp_path.iterdir() if path.name != "SHA256SUMS"]
    (tmp_path / "SHA256SUMS").write_text("".join(f"{digest(tmp_path / name)}  {name}\n" for name in names))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="SHA256SUMS"):
        posterior(2).save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


def test_draws_are_saved_beside_a_posterior(tmp_path):
    kept = adapter()
    kept.save_pretrained(tmp_path)
    (tmp_path / "notes").write_text("x")
    before = snapshot(tmp_path)
    kept.export_adapters(tmp_path, 3)
    (tmp_path / "draw_2" / "mine").write_text("x")
    kept.export_adapters(tmp_path, 2)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == [
        "SHA256SUMS.draws",
        *(f"draw_{k}/{name}" for k in (0, 1) for name in ("adapter_config.json", "adapter_model.safetensors")),
        "draw_2/mine",
        "draws.json",
    ]
    kept.save_pretrained(tmp_path)
    assert after.keys() == snapshot(tmp_path).keys()
    again = bkf.Posterior.from_pretrained(tmp_path, adapter().adapter.model.unload().requires_grad_(False))
    assert torch.equal(again.mean_vector, kept.mean_vector)


@POSIX
def test_draws_are_not_written_through_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "draws").mkdir()
    (tmp_path / "draws" / "draw_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="draw_0 is no folder"):
        adapter().export_adapters(tmp_path / "draws", 1)
    assert not any((tmp_path / "elsewhere").iterdir())


@POSIX
def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "new").symlink_to(tmp_path / "not" / "yet")
    posterior(1).save_pretrained(tmp_path / "new")
    assert (value(tmp_path / "not" / "yet"), (tmp_path / "new").is_symlink()) == (1, True)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for name in ("loop", "file"):
        with pytest.raises(ValueError, match=r"^`folder` must be a folder or new, got"):
            posterior(1).save_pretrained(tmp_path / name)


def test_a_failed_save_removes_the_folders_it_made(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(state_file, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        posterior(1).save_pretrained(tmp_path / "new" / "folder")
    assert not any(tmp_path.iterdir())


# ---- kills ----


@POSIX
def test_killed_at_every_step_the_folder_opens_as_the_old_or_the_new(tmp_path):
    """A process is killed at its first, second, ... change to the file system, until it completes the save."""
    folder = tmp_path / "posterior"
    before = write_other_files(folder)
    posterior(1).save_pretrained(folder)
    seen, step = [], 0
    while True:
        step += 1
        done = not killed_at(step, lambda: posterior(2).save_pretrained(folder))
        assert snapshot_of(folder, before) == before
        seen.append(value(folder))  # read where half of it is in its place
        posterior(1).save_pretrained(folder)
        assert set(snapshot(folder)) == before.keys() | OURS  # nothing of it is left
        assert value(folder) == 1
        if done:
            break
    assert sorted(seen) == seen  # the old one up to one step, the new one from there on
    assert seen.count(1) > 5
    assert seen.count(2) > 8


@POSIX
def test_killed_at_every_step_draws_are_all_old_or_all_new_after_recovery(tmp_path):
    old, new = adapter(), adapter()
    g = torch.Generator()
    wanted = []
    for which, number in ((old, 3), (new, 2)):
        which.export_adapters(tmp_path / "wanted", number, g.manual_seed(number))
        wanted.append(snapshot(tmp_path / "wanted"))
    for step in range(1, 200):
        old.export_adapters(tmp_path / "draws", 3, g.manual_seed(3))
        done = not killed_at(step, lambda: new.export_adapters(tmp_path / "draws", 2, g.manual_seed(2)))
        atomic_folder.recover(tmp_path / "draws")
        assert snapshot(tmp_path / "draws") in wanted
        if done:
            break
    assert done
    assert snapshot(tmp_path / "draws") == wanted[1]


@POSIX
def half_moved(folder):
    """A folder whose save of the second posterior was killed when some of its files had moved."""
    posterior(1).save_pretrained(folder)
    step = 1
    while (
        not (folder / atomic_folder.COMMIT).exists()
        or len(list((folder / atomic_folder.COMMIT / "files").iterdir())) > 3
    ):
        killed_at(step, lambda: posterior(2).save_pretrained(folder))
        step += 1
    return folder


@POSIX
def test_reading_changes_nothing_and_recovery_completes_the_save(tmp_path):
    folder = half_moved(tmp_path / "posterior")
    before = snapshot(folder)
    assert value(folder) == 2
    assert snapshot(folder) == before
    atomic_folder.recover(folder)
    assert set(snapshot(folder)) == OURS
    assert value(folder) == 2


@POSIX
def test_a_fit_continues_from_an_incomplete_save(tmp_path):
    folder = half_moved(tmp_path / "posterior")
    with pytest.raises(ValueError, match="`loader` must yield the 2 batches"):  # so it was read as the second one
        bkf.fit(torch.nn.Linear(3, 2), [], posterior(1).config, checkpoint=folder, progress=False)
    assert set(snapshot(folder)) == OURS


@POSIX
def test_a_file_put_in_the_way_after_a_kill_is_kept(tmp_path):
    folder = half_moved(tmp_path / "posterior")
    name = next(path.name for path in (folder / atomic_folder.COMMIT / "files").glob("kalman_state*"))
    (folder / name).write_text("mine")
    before = snapshot(folder)
    with pytest.raises(ValueError, match=rf"got {name} \(changed since it was saved\)"):
        posterior(3).save_pretrained(folder)
    assert snapshot(folder) == before
    assert value(folder) == 2  # and the save that counts can be read


@POSIX
@pytest.mark.parametrize(
    "plan",
    [
        "{",
        "[]",
        '{"sums": "SHA256SUMS"}',
        '{"sums": 3, "replaces": {}, "overwrites": [], "removes": {}}',
        '{"sums": "SHA256SUMS", "replaces": {}, "overwrites": [], "removes": {"../outside": "DIGEST"}}',
        '{"sums": "SHA256SUMS", "replaces": {"/outside": ""}, "overwrites": [], "removes": {}}',
    ],
)
def test_an_invalid_plan_is_refused(plan, tmp_path):
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "folder"
    posterior(1).save_pretrained(folder)
    (folder / atomic_folder.COMMIT / "files").mkdir(parents=True)
    (folder / atomic_folder.COMMIT / "plan.json").write_text(plan.replace("DIGEST", digest(tmp_path / "outside")))
    before = snapshot(tmp_path)
    for use in (
        lambda: value(folder),
        lambda: posterior(2).save_pretrained(folder),
        lambda: atomic_folder.recover(folder),
    ):
        with pytest.raises(ValueError, match=r"`folder` must hold a valid \.bayes_kf-commit/plan\.json"):
            use()
    assert snapshot(tmp_path) == before


@POSIX
def test_a_plan_is_not_carried_out_through_links(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("x")
    folder = tmp_path / "folder"
    (folder / atomic_folder.COMMIT / "files" / "to").mkdir(parents=True)
    (folder / atomic_folder.COMMIT / "files" / "to" / "new").write_text("x")
    (folder / "to").symlink_to(tmp_path / "home")
    actual = digest(tmp_path / "home" / "file")
    plan = {"sums": "SHA256SUMS", "replaces": {}, "overwrites": [], "removes": {"to/file": actual}}
    (folder / atomic_folder.COMMIT / "plan.json").write_text(json.dumps(plan | {"replaces": {"to/new": ""}}))
    with pytest.raises(ValueError, match="to/new \\(to is no folder\\)"):
        atomic_folder.recover(folder)
    (folder / atomic_folder.COMMIT / "plan.json").write_text(json.dumps(plan))
    atomic_folder.recover(folder)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["file"]


def test_a_folder_with_the_name_of_a_commit_is_refused(tmp_path):
    (tmp_path / atomic_folder.COMMIT).mkdir()
    (tmp_path / atomic_folder.COMMIT / "own").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"got \.bayes_kf-commit \(not written by bayes_kf\)"):
        posterior(1).save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


@POSIX
def test_a_stopped_or_killed_process_leaves_its_last_posterior_or_the_one_before(tmp_path):
    """A process that saves all the time is stopped twenty times, read, and killed twice."""
    target = tmp_path / "posterior"
    command = [sys.executable, "-c", SAVING, str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    g = torch.Generator().manual_seed(0)

    def step():
        return bkf.Posterior.from_pretrained(target, torch.nn.Linear(30, 3)).state.step

    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(10):  # stopped in its tracks, looked at, and let go on
                time.sleep(0.02 + 0.05 * float(torch.rand(1, generator=g)))
                process.send_signal(signal.SIGSTOP)
                assert step() >= 1
                process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGKILL)
            last = [int(line) for line in process.stdout.read().split()]
        assert not last or step() in (last[-1], last[-1] + 1)


def test_two_threads_save_while_one_reads(tmp_path):
    values, failed = (1, 2), []
    posterior(1).save_pretrained(tmp_path)

    def save(which):
        try:
            for _ in range(20):
                posterior(which).save_pretrained(tmp_path)
        except BaseException as error:  # whatever it is, the test must see it
            failed.append(error)

    threads = [threading.Thread(target=save, args=(which,)) for which in values]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(value(tmp_path))
    for thread in threads:
        thread.join()
    assert not failed
    assert seen <= set(values)
    assert set(snapshot(tmp_path)) == OURS


# ---- staging folders ----


@POSIX
def test_the_staging_folder_of_a_living_process_stays(tmp_path):
    with staging.staging(tmp_path) as stage:
        (stage / "file").write_text("x")
        staging.remove_abandoned(tmp_path)
        assert (stage / "file").is_file()
        posterior(1).save_pretrained(tmp_path)
        assert (stage / "file").is_file()
    assert not stage.exists()


@pytest.mark.parametrize("marked", [True, False])
def test_the_staging_folder_of_a_killed_process_is_removed(marked, tmp_path, monkeypatch):
    stage = tmp_path / f"{staging.PREFIX}abcdefgh"
    stage.mkdir()
    if marked:
        (stage / staging.MARKER).touch()
        (stage / "half").write_text("x")
    staging.remove_abandoned(tmp_path)
    assert not any(tmp_path.iterdir())


def test_without_locks_only_old_staging_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_lock", lambda handle, wait=False: None)
    stage = tmp_path / f"{staging.PREFIX}abcdefgh"
    stage.mkdir()
    (stage / staging.MARKER).touch()
    staging.remove_abandoned(tmp_path)
    assert stage.exists()
    os.utime(stage, (0, 0))
    staging.remove_abandoned(tmp_path)
    assert not stage.exists()
    posterior(1).save_pretrained(tmp_path / "p")  # and saves go on without locks
    assert value(tmp_path / "p") == 1


@POSIX
def test_a_save_waits_for_another_and_then_raises(tmp_path, monkeypatch):
    posterior(1).save_pretrained(tmp_path)
    monkeypatch.setattr(staging, "LOCK_TIMEOUT", 0.05)
    with staging.folder_lock(tmp_path), pytest.raises(OSError, match="another process has been saving into it"):
        posterior(2).save_pretrained(tmp_path)
    assert value(tmp_path) == 1
    assert set(snapshot(tmp_path)) == OURS


# ---- settings alone ----


def test_saving_settings_alone_does_not_damage_a_posterior(tmp_path):
    posterior(1).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match=r"`folder` must not hold a posterior, which has its own settings, got .*p"):
        bkf.KalmanConfig(rank=3).save_pretrained(tmp_path / "p")
    posterior(1).config.save_pretrained(tmp_path / "p")  # the same
    assert value(tmp_path / "p") == 1
    for rank in (3, 4):
        bkf.KalmanConfig(rank=rank).save_pretrained(tmp_path / "c")
    assert bkf.KalmanConfig.from_pretrained(tmp_path / "c").rank == 4
    (tmp_path / "c" / "kalman_config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"`folder` must hold a kalman_config\.json of this version's settings"):
        bkf.KalmanConfig().save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "kalman_config.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("base", ["someone/some-model", None, Path("folder")])
def test_a_base_model_must_be_a_module(base, tmp_path):
    posterior(1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^`base_model` must be the model itself, a torch module"):
        bkf.Posterior.from_pretrained(tmp_path, base)
