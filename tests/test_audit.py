"""The dependency audit: what it says where the database answers, and that silence is not taken for safety."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import audit

CANARY = [{"name": "jinja2", "version": "2.10", "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"]}]}]


def package(name, *fixes):
    return {"name": name, "version": "1.0", "vulns": [{"id": "X-1", "fix_versions": list(fixes)}]}


def answers(actual, canary=CANARY):
    return lambda arguments: canary if "-r" in arguments else actual


@pytest.mark.parametrize("canary", [None, [], [{"name": "jinja2", "skip_reason": "not found"}]])
def test_a_database_that_does_not_know_a_known_vulnerability_is_none(canary, capsys):
    assert audit.audit(answers([package("torch", "2.0")], canary)) == 0
    assert capsys.readouterr().out == "skipped: the advisory database cannot be reached from here.\n"


@pytest.mark.parametrize(
    ("actual", "status", "said"),
    [
        (package("Torch", "2.0"), 1, "Torch 1.0 (required): X-1, repaired in 2.0."),
        (package("torch"), 0, "torch 1.0 (required): X-1, repaired in no version yet."),
        (package("ruff", "2.0"), 0, "ruff 1.0 (development only): X-1, repaired in 2.0."),
        ({"name": "numpy", "version": "2", "vulns": []}, 0, "1 packages looked at."),
    ],
)
def test_what_a_newer_version_would_repair_fails(actual, status, said, capsys):
    assert audit.audit(answers([actual])) == status
    assert said in capsys.readouterr().out


def test_what_is_required_goes_all_the_way_down_and_leaves_tools_out():
    actual = audit.required()
    assert {"torch", "pyro-ppl", "peft", "numpy", "safetensors", "jinja2"} <= actual
    assert not {"ruff", "pytest", "pip-audit"} & actual
