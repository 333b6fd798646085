"""``bayes-kf doctor`` says what is here, tries it, and says what does not work."""

import torch
from cli_inputs import run

from bayes_kf.cli import doctor


def test_all_is_well(capsys):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith(("ok", "failed"))] == [
        "ok      packages",
        "ok      disk",
        "ok      learn, save, load",
    ]


def test_what_is_broken_is_named_and_the_rest_is_tried(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "no-such-package"))
    monkeypatch.setattr(doctor, "NEEDED_BYTES", 2**62)
    assert run("doctor") == 2
    out, error = capsys.readouterr()
    assert "no-such-package not installed" in out
    assert "failed  packages: RuntimeError: not installed: no-such-package" in out
    assert "ok      learn, save, load" in out
    assert error == "bayes-kf: error: `doctor` found that this does not work here: packages; disk.\n"


def test_a_filter_that_does_not_learn(capsys, monkeypatch):
    def broken(*_, **__):
        raise FloatingPointError("the outputs\nare not finite")

    monkeypatch.setattr(doctor, "fit", broken)
    assert run("doctor") == 2
    assert "failed  learn, save, load: FloatingPointError: the outputs are not finite" in capsys.readouterr().out
