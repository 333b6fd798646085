"""The sentences that the simulation counts as false verdicts are those of reports: each is there where it is true."""

import numpy as np
import pytest
import torch

from bayes_kf import evaluation as ev
from benchmarks.quality.page_simulation import ALARMS, SIMULATIONS, population

SIZE, CLASSES = 1000, 3


@pytest.fixture(scope="module")
def sentences():
    rng = np.random.default_rng(0)
    drawn = population(rng, SIZE, CLASSES)
    runs = torch.from_numpy(rng.chisquare(1, SIZE)).sort().values * 3  # too large, and in order
    history = {"innovation": runs, "dof": torch.ones(SIZE)}
    flat = torch.full((SIZE, CLASSES), 1 / CLASSES)
    probs = drawn["draws"].mean(0)
    settings = {"ood": {"same": flat}, "human": drawn["human"], "history": history}
    return ev.evaluate_predictions(probs, drawn["targets"], num_simulations=SIMULATIONS, **settings).sections.verdict


@pytest.mark.parametrize("alarm", ALARMS)
def test_a_true_verdict_begins_as_the_simulation_expects(alarm, sentences):
    assert any(sentence.startswith(ALARMS[alarm]) for sentence in sentences), sentences
