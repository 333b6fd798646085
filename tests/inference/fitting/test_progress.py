"""Progress bars: on a terminal and in notebooks, not in redirected output, and where they are asked for."""

import io
import sys

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.fitting.progress import shows_progress

BATCHES = [(torch.zeros(2, 3), torch.tensor([0, 1]))] * 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [
        (io.StringIO, None, False),
        (io.StringIO, True, True),
        (Terminal, None, True),
        (Terminal, False, False),
    ],
)
def test_bars_of_a_fit(monkeypatch, stream, progress, shown):
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    bkf.fit(nn.Linear(3, 2), BATCHES, bkf.KalmanConfig(), progress=progress)
    assert ("fit" in written.getvalue()) is shown


def test_without_a_standard_error_there_are_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not shows_progress(None)


def test_notebooks_have_them(monkeypatch):
    """tqdm's class for notebooks is one from tqdm.notebook; their standard error is no terminal."""
    notebook = type("tqdm", (), {"__module__": "tqdm.notebook"})
    monkeypatch.setattr("tqdm.auto.tqdm", type("tqdm", (notebook,), {}))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert shows_progress(None)
