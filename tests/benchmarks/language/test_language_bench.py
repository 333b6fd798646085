"""The bench of a language model on questions, on a small model with random weights in SmolLM2's place."""

import json
import lzma

import language_models as lm
import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from torch import distributions

from benchmarks.language import bayesian_lora, figure, kept_search, language_model, measured, questions, rows, run
from benchmarks.language.bayesian_lora import Blob, drawn, lora_factors, tfb
from benchmarks.language.language_model import Halves
from benchmarks.language.questions import LanguageProblem, Question, gibberish, letter_prompt, text_parts
from benchmarks.language.table import render

ASKED = [
    ["What do bees make?", ["honey", "milk", "ink", "silk"], 0],
    ["How many legs has a spider?", ["two", "six", "eight", "none"], 2],
    ["Which one is a metal?", ["oak", "iron", "glass", "wool"], 1],
    ["What is frozen water?", ["steam", "sand", "fire", "ice"], 3],
]
GAPS = [["The trophy did not fit into the case since the _ was large.", ["trophy", "case"], 0]] * 4


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Six layers of an untrained model, letters as tokens, and a few questions."""
    monkeypatch.setattr(language_model, "TOP", 2)
    model, halves = lm.untrained_llama(6), None

    class Words(lm.Letters):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": lm.ids(text.lstrip(" ") if text.strip() in "ABCD" else text).tolist()}

    def given():
        nonlocal halves
        halves = halves or Halves(model)
        return Words(), halves

    monkeypatch.setattr(questions, "_halves", given)
    monkeypatch.setattr(questions.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / "text"
    folder.mkdir()
    for name in questions.SETS:
        rows_of = GAPS if name == "winogrande" else ASKED
        content = {"train": rows_of * 4, "test": rows_of * 3} if name != "winogrande" else {"test": rows_of * 6}
        with lzma.open(folder / f"{name}.json.xz", "wt") as file:
            json.dump(content, file)
    monkeypatch.setattr(questions, "data_folder", lambda: tmp_path)
    questions.splits.cache_clear()
    yield model
    questions.splits.cache_clear()


def test_letters_are_scored_as_by_the_whole_model(small):
    problem = LanguageProblem("arc_easy", "letters")
    stream = problem.load(0).stream
    outputs = problem.model(0, 0.0)(**stream.at(slice(3)).batches(3)[0][0])
    train, _ = questions.splits("arc_easy")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:3].tolist()
    for row, number in enumerate(order):
        ids = lm.ids(letter_prompt(train[number])).unsqueeze(0)
        with torch.no_grad():
            whole = small(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(outputs[row].detach(), whole[lm.ids("ABCD")], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["arc_easy", "winogrande"])
def test_texts_are_scored_as_by_the_whole_model(name, small):
    problem = LanguageProblem(name, "texts")
    stream = problem.load(0).stream
    outputs = problem.model(0, 0.0)(**stream.at(slice(2)).batches(2)[0][0])
    train, _ = questions.splits(name)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:2].tolist()
    for row, number in enumerate(order):
        for column, (before, after) in enumerate(text_parts(train[number])):
            ids, start = lm.ids(before + after), len(lm.ids(before))
            with torch.no_grad():
                log_probs = small(input_ids=ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
            expected = log_probs.gather(-1, ids[1:, None])[start - 1 :].mean()
            torch.testing.assert_close(outputs[row, column].detach(), expected, rtol=1e-4, atol=1e-4)


def test_sets_say_what_is_outside_of_them():
    data = LanguageProblem("arc_easy", "letters").load(1)
    assert set(data.outside) == {"arc_challenge", "openbookqa", "gibberish"}
    assert set(LanguageProblem("winogrande", "texts").load(0).outside) == {"gibberish"}
    assert len(data.stream.labels) == 16
    assert len(data.heldout.labels) == 12
    asked = Question("one two three", ["four five", "six"], 1)
    strange = gibberish(asked)
    assert sorted(word[::-1] for word in strange.text.split()) == ["one", "three", "two"]
    assert strange.answer == 1
    assert "_" in gibberish(Question("the _ was large", ["a", "b"], 0)).text


def test_blobs_divergence_is_that_of_its_gaussians():
    learner = Blob(LanguageProblem("arc_easy", "letters").model(0, 0.0), 0)
    expected = sum(
        distributions.kl_divergence(
            distributions.Normal(mean, root.square()), distributions.Normal(0.0, bayesian_lora.PRIOR_SD)
        ).sum()
        for mean, root in zip(learner.means, learner.roots, strict=True)
    )
    torch.testing.assert_close(learner._divergence(), expected, rtol=1e-4, atol=1e-3)
    sds = torch.cat([root.detach().square().flatten() for root in learner.roots])
    assert float(sds.min()) > 0.02
    assert float(sds.max()) < bayesian_lora.START_SD + 1e-6


def test_tfbs_factors_are_the_trained_adapter_and_its_draws_are_isotropic():
    problem = LanguageProblem("arc_easy", "letters")
    model, stream = problem.model(0, 0.0), problem.load(0).stream
    torch.manual_seed(0)
    with torch.no_grad():
        for _, b in lora_factors(model):
            b.normal_(std=0.3)
    before = [(b @ a).detach().clone() for a, b in lora_factors(model)]
    means, deviations, sigma = tfb(model, stream, 0)
    for (a, b), product in zip(lora_factors(model), before, strict=True):
        torch.testing.assert_close((b @ a).detach(), product, rtol=1e-4, atol=1e-5)
    assert 1e-4 <= sigma <= 1.0
    _, b = lora_factors(model)[0]
    a, _ = lora_factors(model)[0]
    noise = [(b @ (a - means[0])).detach() for _ in drawn(model, means, deviations, 1)]
    spread = torch.stack(noise).square().mean() * b.shape[0]  # of U E: r orthonormal columns times σ
    assert float(spread) == pytest.approx(sigma**2 * len(means[0]), rel=0.2)
    assert torch.equal(a, means[0])


@pytest.mark.filterwarnings("ignore::UserWarning:laplace")  # of its defaults; cells ignore them too
@pytest.mark.parametrize("row", [row for row in rows.ROWS if row != "zero-shot"])
def test_rows_learn_and_are_scored(row, monkeypatch):
    if row in ("laplace", "ivon"):
        pytest.importorskip(row, reason=f"the row runs the peer's own package, {row}, which is not installed")
    monkeypatch.setattr(rows, "PLAN", rows.PLAN._replace(epochs=1, rates=(3e-3,)))
    monkeypatch.setattr(rows, "BLOB_RATES", (3e-3,))
    monkeypatch.setattr(rows, "IVON_RATES", (0.1,))
    problem = LanguageProblem("arc_easy", "letters")
    data = problem.load(0)
    learned = rows.ROWS[row][1](problem, data.stream, 0)
    cell = run.scores(learned.predict, data)
    assert 0.0 <= cell["accuracy"] <= 1.0
    assert cell["nll"] > 0.0
    assert cell["answered_80"] == cell["answered"][run.SHARES.index(0.8)]
    assert cell["answered"][-1] == pytest.approx(cell["accuracy"], abs=1e-4)
    assert sum(cell["losses"]) / len(cell["losses"]) == pytest.approx(cell["nll"], abs=1e-3)
    assert {"ood_gibberish", "ood_openbookqa"} <= set(cell)
    assert ("ood_gibberish_epistemic" in cell) == (cell["epistemic"] is not None)


def test_rows_that_begin_with_the_same_search_run_it_once(monkeypatch):
    monkeypatch.setattr(rows, "PLAN", rows.PLAN._replace(epochs=1, rates=(1e-3, 3e-3)))
    problem = LanguageProblem("arc_easy", "letters")
    data = problem.load(0)
    first = rows.adamw(problem, data.stream, 0)
    monkeypatch.setattr(kept_search, "search", None)
    again = rows.adamw(problem, data.stream, 0)
    assert torch.equal(again.predict(data.heldout).probs, first.predict(data.heldout).probs)
    assert again.facts["search_seconds"] == first.facts["search_seconds"]
    assert again.facts["kept_seconds"] > first.facts["search_seconds"] > 0.0
    assert "kept_seconds" not in first.facts


def test_the_search_of_other_questions_is_another():
    problem = LanguageProblem("arc_easy", "letters")
    data = problem.load(0)
    fitted, heldout = data.stream.first(8), data.stream.at(slice(8, None))
    plan = rows.PLAN._replace(epochs=1, rates=(1e-3,))
    kept_search.adamw_search(problem, fitted, heldout, 0, plan)
    for other in (plan._replace(rates=(3e-3,)), plan._replace(epochs=2)):
        assert "kept_seconds" not in kept_search.adamw_search(problem, fitted, heldout, 0, other).facts
    assert "kept_seconds" not in kept_search.adamw_search(problem, fitted.first(7), heldout, 0, plan).facts
    assert "kept_seconds" in kept_search.adamw_search(problem, fitted, heldout, 0, plan).facts


CELL = {
    "accuracy": 0.5, "nll": 1.2, "ece": 0.1, "ece_null_low": 0.02, "ece_null_high": 0.06, "error_auroc": 0.6,
    "answered_80": 0.55, "answered": [0.5] * 19, "losses": [1.0, 1.5, 1.1], "ood_gibberish": 0.7,
    "ood_gibberish_epistemic": 0.8, "seconds": 30.0, "epoch_seconds": 10.0, "search_seconds": 10.0,
    "predict_seconds": 4.0, "mib": 100.0,
}  # fmt: skip
CELLS = {
    "arc_easy/letters/adamw/0": CELL,
    "arc_easy/letters/adamw/1": CELL | {"accuracy": 0.6},
    "arc_easy/letters/default/0": CELL | {"nll": 1.0, "losses": [0.9, 1.2, 1.0]},
    "openbookqa/texts/adamw/0": CELL,
    "openbookqa/texts/default/0": CELL | {"nll": 1.1, "ece": 0.08, "ood_gibberish": 0.8},
    "arc_easy/letters/ivon/0": {"skipped": "more than 7200 s"},
}


def test_the_table_shows_every_cell():
    text = "\n".join(render(CELLS))
    assert "## arc_easy, by letters" in text
    assert "0.550 ± 0.071" in text
    assert "0.100 ± 0.000 [0.020, 0.060]" in text
    assert "0.700 / 0.800" in text
    assert "3.0 (2.0)" in text
    assert "Without a result: ivon 0: more than 7200 s." in text


def test_differences_are_paired_by_question_and_over_sets():
    first, _ = measured.panels(CELLS)
    gap = measured.paired(first, "default", "adamw")  # of -0.1, -0.3, -0.1
    assert gap.mean == pytest.approx(-1 / 6)
    assert gap.error == pytest.approx(1 / 15)
    assert str(gap) == "−0.167 ± 0.067"
    assert measured.paired(first, "tfb", "adamw") is None
    (line,) = [line for line in render(CELLS) if line.startswith("| **ours, default**") and "| 2 " in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:4] == ["−0.025 ± 0.025", "−0.150 ± 0.050", "−0.010 ± 0.010"]
    assert cells[6] == "+0.050 ± 0.050"


def test_figures_have_an_axes_for_each_set(tmp_path):
    figure.draw_answered(CELLS, run.SHARES, tmp_path / "answered.png")
    figure.draw_log_loss(CELLS, tmp_path / "log_loss.png")
    for name in ("answered.png", "log_loss.png"):
        height, width, _ = matplotlib.image.imread(tmp_path / name).shape
        assert width > 2 * height


def test_a_letter_of_several_tokens_is_refused():
    with pytest.raises(ValueError, match="`tokenizer` must have a token for each letter"):
        questions.letter_ids(lambda text, add_special_tokens: {"input_ids": [1, 2]}, 4)


def test_losses_are_of_the_right_option():
    """A guard of the rows' common convention: labels are numbers of options."""
    problem = LanguageProblem("arc_easy", "letters")
    stream, model = problem.load(0).stream, problem.model(0, 0.0)
    (inputs, labels), *_ = stream.batches(4)
    loss = F.cross_entropy(model(**inputs), labels)
    assert float(loss.detach()) > 0.0
    train, _ = questions.splits("arc_easy")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:4].tolist()
    assert labels.tolist() == [train[number].answer for number in order]
