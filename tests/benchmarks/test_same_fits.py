"""The comparison of two versions of the package: equal runs have equal hashes, and a changed bit is reported."""

import json

import pytest
import torch

from benchmarks.reliability import same_fits


@pytest.mark.filterwarnings("ignore")
def test_equal_runs_are_equal_and_a_change_is_told(tmp_path, monkeypatch, capsys):
    names = ["penalty", "likelihood"]
    first = same_fits.compute(names)
    assert {"penalty/transient", "penalty/permanent", "likelihood/gaussian"} <= set(first)
    assert {"mean", "variance", "predict/sampled", "saved/kalman_state.safetensors/metadata"} <= set(
        first["penalty/transient"]
    )
    assert not [name for hashes in first.values() for name in hashes if "seconds" in name]
    file = tmp_path / "first.json"
    file.write_text(json.dumps(first))
    monkeypatch.setattr("sys.argv", ["same_fits", "--only", *names, "--compare", str(file)])
    with pytest.raises(SystemExit) as end:
        same_fits.main()
    assert end.value.code == 0
    first["penalty/transient"]["mean"] = "another"
    del first["likelihood/gaussian"]["variance"]
    file.write_text(json.dumps(first))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        same_fits.main()
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == ["likelihood/gaussian: variance", "penalty/transient: mean"]


def test_one_bit_changes_the_hash():
    hashes = same_fits.Hashes()
    tensor = torch.ones(3)
    hashes.add_tensor("before", tensor)
    hashes.add_tensor("after", torch.nextafter(tensor, 2 * tensor))
    hashes.add_tensor("wider", tensor.double())
    assert len(set(hashes.by_name.values())) == 3
