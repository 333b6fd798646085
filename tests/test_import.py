"""What is imported, and when: counted in modules, which do not depend on the machine as seconds do."""

import json
import subprocess
import sys

import pytest

import bayes_kf as bkf
from bayes_kf.cli import parser
from bayes_kf.evaluation.recalibration.scaling import RECALIBRATIONS
from bayes_kf.inference.fitting.fit import STARTS
from bayes_kf.inference.predictive.prediction import METHODS

THIRD_PARTY = (
    "pyro",
    "peft",
    "transformers",
    "sklearn",
    "scoringrules",
    "matplotlib",
    "arviz",
    "huggingface_hub",
    "jinja2",
)
HEAVY = (*THIRD_PARTY, "scipy.stats", "scipy.special", "scipy.optimize", "torchvision", "pandas", "yaml", "PIL")
SCRIPT = f"""
import json, sys, tempfile
seen = dict()

def count(stage):
    seen[stage] = [name for name in {("torch", "numpy", *HEAVY)} if name in sys.modules]

import bayes_kf as bkf
count("import")
import torch
from bayes_kf import evaluation
from bayes_kf.evaluation import *
probs, targets = torch.rand(20, 3).softmax(-1), torch.randint(3, (20,))
accuracy(probs, targets), expected_calibration_error(probs, targets), brier_score(probs, targets)
negative_log_likelihood(probs, targets), entropy(probs), StreamingScores(3).update(probs, targets)
count("evaluation")

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(8)]
learned = [bkf.fit(model, batches, bkf.KalmanConfig(), start=start, progress=False) for start in ("prior", "trained")]
predicted = [posterior.predict(batches[0][0]).probs for posterior in learned]
count("fit")
for posterior, probs in zip(learned, predicted):
    with tempfile.TemporaryDirectory() as folder:
        posterior.save_pretrained(folder + "/saved")
        again = bkf.Posterior.from_pretrained(folder + "/saved", model)
    assert torch.equal(again.predict(batches[0][0]).probs, probs)
count("save")
ood_scores(entropy(predicted[0]), entropy(predicted[1]))
count("ood_scores")
json.dump(seen, sys.stdout)
"""
COMMANDS = """
import sys
from bayes_kf.cli import main

try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print([name for name in ("torch", "numpy", "yaml", "transformers") if name in sys.modules])
"""


def run(script, *args):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stages():
    return json.loads(run(SCRIPT))


def test_importing_the_package_imports_nothing_else(stages):
    assert stages["import"] == []


def test_evaluation_needs_torch_and_numpy_until_something_else_is_used(stages):
    assert stages["evaluation"] == ["torch", "numpy"]
    assert "sklearn" in stages["ood_scores"]  # the list above can see what is imported


def test_a_plain_module_is_learned_saved_and_loaded_without_them(stages):
    assert stages["fit"] == ["torch", "numpy"]
    assert set(stages["save"]) <= {"torch", "numpy", "huggingface_hub", "yaml"}  # the model card


@pytest.mark.parametrize(
    "args", [["--version"], ["--help"], ["fit", "--help"], ["evaluate", "--help"], ["--print-completion", "bash"]]
)
def test_help_and_version_do_not_wait_for_torch(args):
    assert run(COMMANDS, *args).splitlines()[-1] == "[]"


def test_the_parsers_words_are_the_librarys():
    assert (STARTS, METHODS, tuple(RECALIBRATIONS)) == (parser.STARTS, parser.METHODS, parser.RECALIBRATIONS)


def test_what_is_imported_later_is_there_as_if_at_once():
    from bayes_kf.evaluation import Report, compare, evaluate

    assert (bkf.Report, bkf.compare, bkf.evaluate) == (Report, compare, evaluate)
    assert bkf.evaluation.evaluate is evaluate
    assert bkf.fit is bkf.inference.fit
    assert set(bkf.__all__) <= set(dir(bkf))
    names = {}
    exec("from bayes_kf import *", names)
    assert set(bkf.__all__) <= set(names)
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        _ = bkf.evalute
