"""Arrays: what is read, and what is refused."""

import pickle

import numpy as np
import pytest
import torch

from bayes_kf.data import open_dataset
from bayes_kf.models.zoo import DIGITS_VIT

X, Y = np.linspace(0, 1, 12).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


@pytest.mark.parametrize("keys", [("x", "y"), ("inputs", "targets")])
def test_arrays(npz, keys):
    data = open_dataset(npz(**dict(zip(keys, (X, Y), strict=True))), batch_size=4)
    assert data.class_names == ("0", "1", "2")
    inputs, targets = next(iter(data.loader))
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(inputs, torch.from_numpy(X[:4]).float())
    assert targets.tolist() == [0, 1, 2, 0]


def test_arrays_of_strings_numbers_and_other_byte_orders(npz):
    data = open_dataset(npz(x=X.astype(">f8"), y=np.array(["b", "a"] * 3)))
    assert data.class_names == ("a", "b")
    assert [y.item() for _, y in data.loader] == [1, 0] * 3
    data = open_dataset(npz(x=X, y=X[:, :1]), batch_size=6)
    assert data.class_names == ()
    assert next(iter(data.loader))[1].dtype == torch.float32


def test_arrays_of_pixels_take_the_models_format(npz):
    pixels = np.full((6, 28, 28), 255, np.uint8)
    inputs, _ = next(iter(open_dataset(npz(x=pixels, y=Y), model=DIGITS_VIT, batch_size=6).loader))
    assert torch.equal(inputs, torch.ones(6, 1, 28, 28))
    with pytest.raises(ValueError, match=r"`image_format` must be given for uint8 pixels, got None"):
        open_dataset(npz(x=pixels, y=Y))


def test_order_follows_the_seed(npz):
    path = npz(x=np.arange(50.0)[:, None], y=np.zeros(50, int))
    orders = [[x.item() for x, _ in open_dataset(path, shuffle=True, seed=seed).loader] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(50))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([{}], object), "y": Y}, "plain arrays, got .*allow_pickle=False"),
        ({"x": X, "labels": Y}, "arrays x and y, or inputs and targets, got x, labels"),
        ({"x": X, "y": Y[:5]}, r"as many inputs as targets, .* float64 \(6, 2\) and int64 \(5,\)"),
        ({"x": X[:0], "y": Y[:0]}, "at least one"),
        ({"x": 1.0, "y": 1.0}, "as many inputs as targets"),
        ({"x": Y, "y": Y}, "inputs in floats, or uint8 pixels, got int64"),
        ({"x": np.where(X > 0.5, np.nan, X), "y": Y}, "finite inputs, got NaN or infinity in row 3"),
        ({"x": X, "y": Y - 1}, "class indices from 0 to .* got -1 to 1"),
        ({"x": X, "y": Y * 10**12}, "class indices from 0 to 99999, .* got 0 to 2000000000000"),
        ({"x": X, "y": Y[:, None]}, r"targets in integers .* got int64 \(6, 1\)"),
        ({"x": X, "y": X[:, 0] + np.inf}, "finite floats"),
        ({"x": X, "y": X + 1j}, "got complex128"),
    ],
)
def test_array_errors(npz, arrays, message):
    with pytest.raises(ValueError, match=f"`path` must hold .*{message}|`path` must be .*{message}"):
        open_dataset(npz(**arrays))


def test_array_index_outside_the_given_classes(npz):
    with pytest.raises(ValueError, match=r"class indices from 0 to 1, .* got 0 to 2"):
        open_dataset(npz(x=X, y=Y), class_names=["a", "b"])


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: pickle.dumps(b), lambda b: b"PK" + b])
def test_damaged_arrays(npz, damage):
    path = npz(x=X, y=Y)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"`path` must be an .npz file of plain arrays, got .*data.npz"):
        open_dataset(path)


def test_single_array(tmp_path):
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match=r"`path` must be an .npz file .* it is a single array of shape \(6, 2\)"):
        open_dataset(tmp_path / "data.npz")


def test_corrupted_compressed_array(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((50, 50)), y=np.zeros(50, int))
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be an .npz file of plain arrays"):
        open_dataset(path)
