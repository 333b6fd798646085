"""Bundled digits, corruptions, out-of-distribution images, and the data of the benchmarks if they are there."""

import os

import pytest
import torch

from bayes_kf.data import CORRUPTIONS, corrupt, photo_patches, uci_digits, uci_digits_split
from benchmarks.common import data as benchmark_data


def test_uci_digits_are_in_the_models_convention():
    images, labels = uci_digits()
    assert images.shape == (1797, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert labels.dtype == torch.int64
    assert labels.bincount().min() > 170
    assert images[:, :, 0, 0].mean() < -0.9  # the corners are black


def test_split_is_a_partition_and_fixed():
    stream, heldout = uci_digits_split()
    assert (len(stream.labels), len(heldout.labels)) == (1197, 600)
    everything = torch.cat([stream.images, heldout.images]).flatten(1).sort(0).values
    assert torch.equal(everything, uci_digits().images.flatten(1).sort(0).values)
    assert torch.equal(stream.images, uci_digits_split()[0].images)
    assert not torch.equal(stream.images, uci_digits_split(seed=1)[0].images)
    assert heldout.labels.bincount(minlength=10).min() > 40


@pytest.mark.parametrize("num_stream", [0, 1797])
def test_split_leaves_neither_side_empty(num_stream):
    with pytest.raises(ValueError, match=f"`num_stream` must be between 1 and 1796, got {num_stream}"):
        uci_digits_split(num_stream)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_leave_the_input_alone(kind):
    images = uci_digits().images[:50]
    before = images.clone()
    mild, severe = corrupt(images, kind, 1), corrupt(images, kind, 5)
    assert torch.equal(images, before)
    assert mild.shape == images.shape
    assert severe.min() >= -1
    assert severe.max() <= 1
    assert 0 < (mild - images).square().mean() < (severe - images).square().mean()
    assert torch.equal(corrupt(images, kind, 5), severe)


@pytest.mark.parametrize("kind", ["gaussian_noise", "rotation", "occlusion"])
def test_random_corruptions_differ_between_seeds_and_between_images(kind):
    image = uci_digits().images[:1].expand(20, -1, -1, -1)
    assert not torch.equal(corrupt(image, kind, 3, seed=0), corrupt(image, kind, 3, seed=1))
    assert len(corrupt(image, kind, 3).unique(dim=0)) > 1


def test_corruptions_do_what_they_say():
    images = uci_digits().images[:20]
    assert torch.equal(corrupt(images, "invert", 5), -images)
    grey = torch.zeros(50, 1, 28, 28)
    assert corrupt(grey, "gaussian_noise", 1).std().item() == pytest.approx(0.2, rel=0.02)  # 0.1 of a range of 2
    covered = (corrupt(grey - 1, "occlusion", 5) == 0).float().mean(dim=(1, 2, 3))
    assert torch.allclose(covered, torch.tensor(17 * 17 / 28**2).expand(50))
    upright, turned = images[:1], corrupt(images[:1], "rotation", 5)
    quarter_turns = [upright.rot90(k, (2, 3)) for k in (1, -1)]
    assert min((turned - quarter).abs().max() for quarter in quarter_turns) < 1e-4
    ink = (corrupt(grey - 1 + 2 * (torch.arange(28) == 14), "blur", 1) + 1).sum()
    assert ink.item() == pytest.approx(50 * 28 * 2, rel=1e-4)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_take_other_shapes_and_dtypes(kind):
    images = torch.rand(2, 3, 9, 12, dtype=torch.float64) * 2 - 1
    assert corrupt(images, kind, 5).shape == images.shape
    assert corrupt(images, kind, 5).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 1, 4, 4), "fog", 1), "`kind` must be one of gaussian_noise, .*, got 'fog'"),
        ((torch.zeros(1, 1, 4, 4), "blur", 6), "`severity` must be 1, 2, 3, 4 or 5, got 6"),
        ((torch.zeros(4, 4), "blur", 1), r"`images` must be a float tensor \(N, C, H, W\), got .* \(4, 4\)"),
        ((torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "blur", 1), "`images` must be a float tensor .* got torch.uint8"),
    ],
)
def test_corruption_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments)


def test_photo_patches_are_real_and_fixed():
    patches = photo_patches(40)
    assert patches.shape == (40, 1, 28, 28)
    assert patches.dtype == torch.float32
    assert patches.min() >= -1
    assert patches.max() <= 1
    assert patches.std() > 0.2
    assert torch.equal(patches[:10], photo_patches(10))
    assert not torch.equal(patches, photo_patches(40, seed=1))
    with pytest.raises(ValueError, match=r"`num` must be at least 1, got 0"):
        photo_patches(0)


def test_benchmark_data_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYES_KF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"`BAYES_KF_DATA` must name a folder that holds usps/train_x.npy.xz"):
        benchmark_data.usps("train")
    monkeypatch.setenv("BAYES_KF_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"`BAYES_KF_DATA` must name the folder .* got .*nowhere"):
        benchmark_data.mnist("test")


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("mnist", ("test",), 10_000),
        ("usps", ("test",), 2_007),
        ("kmnist", (), 10_000),
        ("notmnist", (), 5_000),
        ("fashion_mnist", (), 900),
    ],
)
def test_benchmark_data(name, options, count):
    try:
        benchmark_data.data_folder()
    except FileNotFoundError as error:
        if "BAYES_KF_DATA" in os.environ:  # asked for, so its absence is a failure
            raise
        # not shipped: some of the sets state no licence, others are share-alike; CI has the folder and runs this
        pytest.skip(f"these data sets may not be redistributed with the package, and none lie here: {error}")
    images, labels = getattr(benchmark_data, name)(*options)
    assert images.shape == (count, 1, 28, 28)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert labels.shape == (count,)
    assert labels.unique().tolist() == list(range(10))
