"""Tables in results/ are those that the scripts make of the JSON beside them."""

import importlib
import shutil

import pytest

from benchmarks.common import result_files

SCRIPTS = {  # those whose --table draws no figure
    "lenet": ("papers.lenet", []),
    "online-usps": ("papers.online", ["--data", "usps"]),
    "online-digits": ("papers.online", ["--data", "digits"]),
    "online-kmnist-limit800": ("papers.online", ["--data", "kmnist", "--limit", "800"]),
    "online-sst2-limit1000": ("papers.online", ["--data", "sst2", "--limit", "1000"]),
    "prior_width": ("papers.prior_sensitivity", ["--tables", "prior_width"]),
    "tuning": ("papers.prior_sensitivity", ["--tables", "tuning"]),
    "posterior_quality": ("quality.run", []),
    "quality_development": ("quality.split.run", []),
    "quality_sealed": ("quality.split.run", ["--open-sealed"]),
    "quality_second_sealed": ("quality.split.run", ["--open-sealed", "2"]),
    "epistemic_entropy": ("quality.epistemic_entropy", []),
    "interval_coverage": ("quality.interval_coverage", []),
    "evaluation_cost": ("speed.evaluation_cost", []),
    "reproducibility": ("reliability.reproducibility", []),
    "mutation": ("reliability.mutation", []),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_table_is_made_again(name, tmp_path, monkeypatch, capsys):
    module, options = SCRIPTS[name]
    kept = result_files.RESULTS
    monkeypatch.setattr(result_files, "RESULTS", kept)
    shutil.copy(kept / f"{name}.json", tmp_path)
    monkeypatch.setattr("sys.argv", [module, *options, "--table", "--results", str(tmp_path)])
    importlib.import_module(f"benchmarks.{module}").main()
    made = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert made == (kept / f"{name}.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{name}.json").read_bytes() == (kept / f"{name}.json").read_bytes()
