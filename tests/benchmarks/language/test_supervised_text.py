"""Answers as text to learn, on a small model with random weights in SmolLM2's place."""

import language_models as lm
import pytest
import torch
import torch.nn.functional as F

from benchmarks.language import language_model, supervised_text
from benchmarks.language.questions import Question
from benchmarks.language.supervised_text import IGNORED, load, loader, losses, measure, render

ASKED = [
    Question("what do bees make", ["honey", "ink"], 0),
    Question("which one is a metal", ["oak", "iron"], 1),
    Question("what is frozen water", ["steam", "ice"], 1),
]


class Words(lm.Letters):
    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": lm.ids(text).tolist()}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(language_model, "TOP", 2)
    monkeypatch.setattr(supervised_text, "TRAIN", 9)
    monkeypatch.setattr(supervised_text, "BATCH", 4)
    monkeypatch.setattr(supervised_text, "EPOCHS", 2)
    monkeypatch.setattr(supervised_text, "RATES", (3e-3,))
    monkeypatch.setattr(supervised_text, "splits", lambda name: (ASKED * 4, ASKED[:2] * 2))
    monkeypatch.setattr(supervised_text, "text_parts", lambda q: [(f"{q.text} ", own) for own in q.options])
    model = lm.untrained_llama(5)
    monkeypatch.setattr(supervised_text, "smollm2", lambda: (Words(), model))
    return model


def test_losses_from_features_are_those_of_the_whole_model(small):
    texts = load("arc_easy", 0)
    found = losses(supervised_text.zero_shot(texts, 0).log_probs["own"], texts.test)
    expected = []
    for question in ASKED[:2]:
        asked, answer = lm.ids(f"{question.text} "), [*lm.ids(question.options[question.answer]).tolist(), 1]
        ids = torch.cat([asked, torch.tensor(answer)]).unsqueeze(0)
        labels = torch.cat([torch.full_like(asked, IGNORED), torch.tensor(answer)])
        with torch.no_grad():
            logits = small(input_ids=ids).logits[0, :-1]
        expected.append(
            (float(F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")), len(answer))
        )
    assert sorted(zip(found.sums.tolist(), found.counts.tolist(), strict=True)) == [
        (pytest.approx(loss, rel=1e-4), count) for loss, count in sorted(expected * 2)
    ]
    assert found.a_token == pytest.approx(sum(e[0] for e in expected) / sum(e[1] for e in expected), rel=1e-4)


def test_batches_are_padded_and_learn_answers_alone():
    texts = load("arc_easy", 0)
    batch = next(iter(loader(texts.train)))
    lengths = [len(row["labels"]) for row in texts.train[:4]]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [
        int((row["labels"] != IGNORED).sum()) for row in texts.train[:4]
    ]
    assert not bool((batch["labels"] != IGNORED)[batch["attention_mask"] == 0].any())


def test_rows_learn_and_the_table_pairs_their_losses():
    cells = {f"arc_easy/{row}/0": measure("arc_easy", row, 0) for row in supervised_text.ROWS}
    assert cells["arc_easy/adamw/0"]["log_loss"] < cells["arc_easy/zero-shot/0"]["log_loss"]
    assert cells["arc_easy/default/0"]["log_loss_mean"] < cells["arc_easy/zero-shot/0"]["log_loss"]
    gaps = [
        own - base
        for own, base in zip(cells["arc_easy/default/0"]["losses"], cells["arc_easy/adamw/0"]["losses"], strict=True)
    ]
    mean = sum(gaps) / len(gaps)
    assert f"{mean:+.3f} ±".replace("-", "−") in "\n".join(render(cells))
