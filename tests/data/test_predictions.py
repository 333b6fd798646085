"""Files of predictions: every form that is read, and every way in which one can be wrong."""

import numpy as np
import pytest

from bayes_kf.data import read_predictions

PROBS = np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])


def csv_file(tmp_path, text: str):
    path = tmp_path / "predictions.csv"
    path.write_text(text, encoding="utf-8")
    return path


def npz_file(tmp_path, **arrays):
    path = tmp_path / "predictions.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("targets", ["cat,dog,dog", "0,1,1"])
def test_csv_of_a_classifier(tmp_path, targets):
    rows = zip(targets.split(","), PROBS, strict=True)
    text = "cat, dog,label\n" + "".join(f"{p[0]},{p[1]}, {t}\n" for t, p in rows)
    saved = read_predictions(csv_file(tmp_path, text))
    assert saved.class_names == ("cat", "dog")
    assert saved.targets.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(saved.probs, PROBS)


def test_numbers_as_class_names_are_names_first(tmp_path):
    saved = read_predictions(csv_file(tmp_path, "target,7,3\n3,0.9,0.1\n7,0.2,0.8\n"))
    assert saved.class_names == ("7", "3")
    assert saved.targets.tolist() == [1, 0]


def test_csv_of_a_regression(tmp_path):
    saved = read_predictions(csv_file(tmp_path, "y,variance,mean\n1.5,0.2,1.0\n-2,0.3,-1\n"))
    assert saved.probs is None
    assert saved.targets.tolist() == [1.5, -2.0]
    assert saved.mean.tolist() == [1.0, -1.0]
    assert saved.variance.tolist() == [0.2, 0.3]


def test_npz_of_a_classifier(tmp_path):
    samples = np.stack([PROBS, PROBS])
    path = npz_file(tmp_path, probs=PROBS, y=np.array([0, 1, 1]), samples=samples, class_names=np.array(["a", "b"]))
    saved = read_predictions(path)
    assert saved.class_names == ("a", "b")
    assert saved.samples.shape == (2, 3, 2)
    assert saved.targets.tolist() == [0, 1, 1]
    named = npz_file(tmp_path, probs=PROBS, labels=np.array(["b", "a", "b"]), class_names=np.array(["a", "b"]))
    assert read_predictions(named).targets.tolist() == [1, 0, 1]


def test_npz_of_a_regression(tmp_path):
    saved = read_predictions(
        npz_file(tmp_path, mean=np.zeros((3, 2)), variance=np.ones((3, 2)), targets=np.ones((3, 2)))
    )
    assert saved.probs is None
    assert saved.mean.shape == saved.variance.shape == saved.targets.shape == (3, 2)


def test_foreign_predictions_need_no_targets(tmp_path):
    saved = read_predictions(npz_file(tmp_path, probs=PROBS), need_targets=False)
    assert saved.targets is None
    saved = read_predictions(csv_file(tmp_path, "a,b\n0.5,0.5\n"), need_targets=False)
    assert (saved.targets, saved.class_names) == (None, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target,a,b\n", "`path` must hold a header and at least one row, got no row in"),
        ("a,b\n0.5,0.5\n", "`path` must hold targets under one of target, targets, label, labels, y, got a, b in"),
        ("target,label,a\n0,0,1\n", "`path` must hold targets under one of"),
        ("target,a,a\n0,1,0\n", "`path` must name each column once, got target, a, a in"),
        ("target,a,b\n0,0.5\n", "`path` must have the header's 3 fields in every line, got 2 in line 2 of"),
        ("target,a,b\n0,x,0.5\n", "`path` must hold numbers in column a, got could not convert string to float"),
        ("target,a,b\ncow,0.5,0.5\n", "`path` must hold targets that are indices or among a, b, got invalid literal"),
    ],
)
def test_bad_csv_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"^`path`") as error:
        read_predictions(csv_file(tmp_path, text))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"probs": PROBS}, "`path` must hold targets under one of target, targets, label, labels, y, got probs in"),
        ({"y": np.zeros(3, int)}, "`path` must hold either probs or mean, got y in"),
        ({"y": np.zeros(3, int), "probs": PROBS, "mean": PROBS}, "`path` must hold either probs or mean, got"),
        ({"y": np.zeros(3), "probs": PROBS}, "`path` must hold targets in integers or strings, got float64 in"),
    ],
)
def test_bad_npz_files_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=r"^`path`") as error:
        read_predictions(npz_file(tmp_path, **arrays))
    assert str(error.value).startswith(message)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^`path` must be an existing file of predictions, got "):
        read_predictions(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"^`path` must end in \.npz or \.csv, got "):
        read_predictions(tmp_path / "a.txt")
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"^`path` must be an \.npz file of plain arrays, got "):
        read_predictions(tmp_path / "a.npz")
    np.savez(tmp_path / "pickled.npz", probs=np.array([{}], dtype=object), y=np.zeros(1, int))
    with pytest.raises(ValueError, match=r"^`path` must be an \.npz file of plain arrays, got "):
        read_predictions(tmp_path / "pickled.npz")
