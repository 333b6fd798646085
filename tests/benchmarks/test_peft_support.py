"""Every PEFT type that is installed, and what the page about them says."""

import re
from pathlib import Path

import peft
import pytest
import torch

from bayes_kf.models.adapter import AdapterModel
from benchmarks.reliability import peft_support
from benchmarks.reliability.peft_cases import CASES, missing

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
TABLES = {part.partition("\n")[0]: part for part in ("Works\n" + PAGE).split("\n## ")}
TRIED = [  # of LoRA's variants those that no other test takes all the way
    "LORA",
    "LORA lora_bias",
    "LORA use_dora",
    "LORA embedding",
    "LORA trainable_token_indices",
    "LORA MultiheadAttention",
    "LORA target_parameters",
    "LORA layer_replication",
    "LORA init mica",
    "LORA init pissa",
    "LORA init olora",
    "LORA init eva",
    "LORA init corda",
    "LORA init lora_ga",
]
FAST = [case for case in CASES if case.kind != "LORA" or case.name in TRIED]


def listed(name):
    """The part of the page that has a case: Works, Refused or What PEFT itself does not run here."""
    return [part for part, text in TABLES.items() if re.search(rf"^\| {re.escape(name)} \|", text, re.M)]


def test_the_page_has_every_type_of_the_installed_peft():
    assert missing() == []
    for case in CASES:
        assert len(listed(case.name)) == 1, case.name
    assert {case.kind for case in CASES if listed(case.name)} >= {kind.value for kind in peft.PeftType}
    assert "Known faults" not in PAGE
    assert not [line for line in PAGE.splitlines() if " no |" in line]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_all_works_or_one_sentence_refuses(case):
    actual = peft_support.run(case)
    assert actual.right, actual.steps
    if f"with PEFT {peft.__version__}:" not in PAGE:
        pytest.skip(f"docs/peft.md lists what another version of PEFT than the installed {peft.__version__} supports")
    part = "Refused" if actual.refusal else "What PEFT itself does not run here" if actual.broken else "Works"
    assert listed(case.name) == [part]
    assert not actual.refusal or actual.refusal in PAGE
    assert not actual.refusal or re.fullmatch(r"`model` .*\.", actual.refusal)


@pytest.mark.parametrize("step", ["mean", "sampled", "model"])
def test_wrong_answers_are_seen(step, monkeypatch):
    (case,) = [case for case in CASES if case.name == "LORA"]
    run = AdapterModel.run

    def shifted(self, inputs):
        if step == "model":
            with torch.no_grad():
                next(p for p in self.model.parameters() if not p.requires_grad).add_(1e-3)
        return run(self, inputs) * 1.01

    monkeypatch.setattr(AdapterModel, "run", shifted)
    actual = peft_support.run(case)
    assert not actual.right
    assert actual.steps[step] != "yes"
