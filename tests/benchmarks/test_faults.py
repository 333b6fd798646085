"""Damaged folders and full disks, some of each; thousands are in ``benchmarks/reliability/faults.py``."""

import subprocess
import sys

import pytest
import torch

import bayes_kf as bkf
from benchmarks.reliability import faults, soak


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [100, 101])
def test_a_damaged_folder_is_refused_or_was_not_damaged(seed, tmp_path):
    actual = faults.damage(80, tmp_path, seed=seed, progress=False)
    assert actual.total() == 80
    assert {outcome for _, outcome in actual} == set(faults.OUTCOMES)
    assert len({fault for fault, _ in actual}) == len(faults.FAULTS)


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no limit on the size of a file (RLIMIT_FSIZE) to run into"
)
@pytest.mark.filterwarnings("ignore")
def test_without_room_the_older_posterior_stays(tmp_path):
    assert faults.no_room(tmp_path, 8, seed=5) == 8


@pytest.fixture
def mounted(tmp_path):
    """A file system of 300 KiB; and a way to make it read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small file system to fill needs root on Linux: {done.stderr.decode().strip()}")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_or_read_only(mounted):
    disk, seal = mounted
    small, large = (bkf.KalmanFilter(torch.nn.Linear(n, 3), bkf.KalmanConfig(rank=4)) for n in (20, 8000))
    kept = bkf.Posterior(small, small.init(torch.ones(1, 20)))
    kept.save_pretrained(disk / "posterior")
    with pytest.raises(OSError, match=r"disk/posterior could not be written: .*No space left"):
        bkf.Posterior(large, large.init(torch.ones(1, 8000))).save_pretrained(disk / "posterior")
    assert [path.name for path in disk.iterdir()] == ["posterior"]
    seal()
    with pytest.raises(OSError, match="Read-only file system"):
        kept.save_pretrained(disk / "posterior")
    again = bkf.Posterior.from_pretrained(disk / "posterior", torch.nn.Linear(20, 3))
    assert torch.equal(again.mean_vector, kept.mean_vector)


@pytest.mark.parametrize("covariance", soak.EXACT)
def test_innovations_of_an_exact_filter_stay_in_their_band(covariance):
    """Two thousand updates; a million are in ``benchmarks/reliability/soak.py``."""
    actual = soak.run(covariance, 2_000, seed=7, progress=False)
    assert actual["band_low"] < actual["innovations"] < actual["band_high"]
    assert actual["windows_outside"] == 0
    assert actual["asymmetry"] < 1e-10
    assert actual["mib_in_the_end"] < actual["mib_after_a_tenth"] + 20
