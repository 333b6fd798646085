"""Every notebook of the tutorials runs from top to bottom, and what it prints is what it was saved with."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.ipynb"))
SLACK = 0.25  # of a printed score: other processors and versions round otherwise, and a stream follows


def numbers(notebook):
    """The scores printed by each cell: decimal fractions below ten, differences in powers of ten left out."""
    texts = ["".join(o["text"] for o in c.get("outputs", ()) if o.get("name") == "stdout") for c in notebook.cells]
    return [[float(n) for n in re.findall(r"(?<![\d.e+-])\d\.\d+(?![\de.])", text)] for text in texts]


def differences(notebook):
    """What a notebook shows to be equal, as printed: 1.2e-06."""
    text = " ".join(o["text"] for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stdout")
    return [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", text)]


def pictures(notebook):
    return sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ()))


def test_there_are_seven():
    assert [path.name[0] for path in NOTEBOOKS] == list("1234567")


@pytest.fixture(scope="module")
def client():
    """One kernel for all notebooks: the imports take longer than some of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MPLBACKEND", raising=False)  # the notebook's own, which keeps each picture as an output
        client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=280, kernel_name="python3")
        with client.setup_kernel():
            yield client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_runs(path, tmp_path, client):
    saved = nbformat.read(path, 4)
    nbformat.validate(saved)
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[], execution_count=None)
    anew = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\ndel os")
    notebook.cells.insert(0, anew)  # what one defines or imports, the next does not find
    client.nb = notebook
    client.execute(cleanup_kc=False)
    del notebook.cells[0]
    assert pictures(notebook) == pictures(saved)
    actual, expected = numbers(notebook), numbers(saved)
    assert sum(map(len, expected)) + len(differences(notebook)) >= 3
    assert all(difference < 1e-5 for difference in differences(notebook))
    for number, (here, before) in enumerate(zip(actual, expected, strict=True)):
        assert here == pytest.approx(before, abs=SLACK, rel=SLACK), f"cell {number}"
    assert not list(tmp_path.iterdir()), "a tutorial must leave nothing behind where it runs"
