"""The demo on a fraction of its images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bayes_kf import Posterior
from bayes_kf.models.zoo import digits_vit
from tutorials.digits_demo import ADAMW, OURS, RANK, RATES, Size, caption, markdown_table, run_demo
from tutorials.digits_demo.data import demo_data

SIZE = Size(stream=30, heldout=60)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def rows(output):
    threads = torch.get_num_threads()
    made = run_demo(output, SIZE, progress=False)
    assert torch.get_num_threads() == threads
    return made


def test_rows(rows):
    assert [row.name for row in rows] == ["frozen model", ADAMW, "LoRA + LoKO", OURS]
    for row in rows:
        assert len(row.history["correct"]) == SIZE.stream
        assert row.report.scores["online_accuracy"] == pytest.approx(row.history["correct"].double().mean().item())
        assert row.seconds > 0
    grid = rows[1].notes["online_accuracy_by_rate"]
    assert tuple(grid) == RATES
    assert grid[rows[1].notes["learning_rate"]] == max(grid.values())


def test_table(rows, output):
    table = markdown_table(rows)
    lines = table.splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({len(line) for line in lines}) == 1
    assert f"{rows[3].report.scores['nll']:.3f}" in lines[5]
    written = (output / "demo.md").read_text(encoding="utf-8")
    assert table in written
    assert caption(rows, SIZE, RANK, 0) in written
    record = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert [row["scores"]["accuracy"] for row in record["rows"]] == [row.report.scores["accuracy"] for row in rows]
    assert record["setting"] == {"stream": 30, "heldout": 60, "rank": RANK, "seed": 0}
    assert all(math.isfinite(row["seconds"]) for row in record["rows"])


def test_pictures_and_page(rows, output):
    for name in ("reliability.png", "online.png", "report.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
    page = (output / "report.html").read_text(encoding="utf-8")
    assert OURS in page
    assert "corrupted" in page


def test_posterior_reads_back(rows, output):
    posterior = Posterior.from_pretrained(output / "posterior", digits_vit())
    with np.load(output / "heldout.npz") as arrays:
        batch = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    prediction = posterior.predict_loader([batch], generator=torch.Generator().manual_seed(0))
    assert prediction.log_prob is not None
    assert -prediction.log_prob.mean().item() == pytest.approx(
        rows[3].report.scores["nll"], abs=1e-5
    )  # float32, batched
    assert torch.equal(posterior.history["correct"], rows[3].history["correct"])


def test_data_do_not_overlap():
    data = demo_data(SIZE)
    stream = {image.numpy().tobytes() for image in data.stream.images}
    assert stream.isdisjoint(image.numpy().tobytes() for image in data.heldout.images)
    assert data.corrupted.shape == data.photos.shape == (60, 1, 28, 28)
    with pytest.raises(ValueError, match="`size` must hold out 1 to 1767 images, got 1768"):
        demo_data(Size(stream=30, heldout=1768))


def test_files_of_other_people_are_refused_before_the_work(tmp_path):
    (tmp_path / "demo.md").write_text("mine")
    with pytest.raises(ValueError, match=r"got demo\.md \(not written by bayes_kf\)"):
        run_demo(tmp_path, SIZE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.md"]
