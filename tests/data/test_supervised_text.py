"""Text to be learned, read from files: which tokens have labels, and rows that cannot be read."""

import json

import language_models as lm
import pytest
import torch

from bayes_kf.data import supervised_text
from bayes_kf.data.supervised_text import batches_of_lines, encode, holds_supervised_text

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{{ '\n' if m['role'] == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]


@pytest.fixture
def tokenizer():
    one = lm.tokenizer()
    one.chat_template = TEMPLATE
    return one


def learned(tokenizer, example):
    """The text before the first learned token, and each learned stretch."""
    tokens, labels = example
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
    marks = "".join("." if label == -100 else lm.LETTERS[label] for label in labels)
    return [part for part in marks.split(".") if part]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_a_completion_is_learned_with_its_end(tokenizer):
    example = encode(tokenizer, {"prompt": "Is 7 prime?", "completion": " yes"}, 100)
    assert learned(tokenizer, example) == [" yes\n"]
    assert example[0] == lm.ids("Is 7 prime? yes\n").tolist()


def test_all_of_a_text_is_learned_but_its_first_token(tokenizer):
    assert learned(tokenizer, encode(tokenizer, {"text": "Hello."}, 100)) == ["ello", "\n"]  # a dot marks none


def test_what_the_assistant_says_is_learned(tokenizer):
    tokens, labels = encode(tokenizer, {"messages": TALK}, 100)
    assert "".join(lm.LETTERS[token] for token in tokens) == "<u>2+2?<a>4\n<u>3+3?<a>6\n"
    assert learned(tokenizer, (tokens, labels)) == ["4\n", "6\n"]
    one = encode(tokenizer, {"prompt": TALK[:3], "completion": TALK[3:]}, 100)
    assert learned(tokenizer, one) == ["6\n"]
    assert one[0] == tokens


def test_batches_are_padded_on_the_right(tokenizer, tmp_path):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcdef"}]
    data = supervised_text(write(tmp_path / "rows.jsonl", rows), tokenizer, batch_size=2)
    (batch,) = data.loader
    assert data.class_names == ()
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 7)
    assert batch["attention_mask"].sum(1).tolist() == [4, 7]
    assert batch["labels"][0].tolist() == [-100, -100, *lm.ids("c\n").tolist(), -100, -100, -100]
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    csv = tmp_path / "rows.csv"
    csv.write_text("prompt,completion\nab,c\na,bcdef\n", encoding="utf-8")
    (again,) = supervised_text(csv, tokenizer, batch_size=2).loader
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    (cut,) = supervised_text(csv, tokenizer, batch_size=2, max_length=3).loader
    assert cut["input_ids"].shape == (2, 3)


def test_lines_come_one_by_one(tokenizer):
    lines = [json.dumps({"prompt": "ab", "completion": "c"}), "", json.dumps({"text": "xyz"}), "{"]
    read = batches_of_lines(lines, tokenizer, 100)
    assert [next(read)["input_ids"].shape for _ in range(2)] == [(1, 4), (1, 4)]
    with pytest.raises(ValueError, match="in line 4"):
        next(read)


def test_the_columns_say_whether_text_is_to_be_learned(tmp_path):
    assert holds_supervised_text(write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]))
    assert holds_supervised_text(write(tmp_path / "b.jsonl", [{"messages": TALK}]))
    assert holds_supervised_text(write(tmp_path / "c.jsonl", [{"text": "a"}]))
    assert not holds_supervised_text(write(tmp_path / "d.jsonl", [{"text": "a", "label": 1}]))
    assert not holds_supervised_text(write(tmp_path / "e.jsonl", [{"text": "a", "mark": 1}]), "mark")
    assert not holds_supervised_text(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a"},
            "`path` must have the columns prompt and completion, messages, or text, got question, in line 2",
        ),
        ({"prompt": "a", "completion": 3}, "`path` must hold text in column 'completion', got 3, in line 2"),
        ({"messages": "hello"}, "`path` must hold messages with role and content, got 'hello', in line 2"),
        ({"messages": TALK[:1]}, "`path` must have a token to learn among the first 16 tokens of each row, got none"),
        ({"prompt": "a" * 16, "completion": "b"}, "`path` must have a token to learn among the first 16 tokens"),
    ],
)
def test_bad_rows_are_named(row, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        supervised_text(write(tmp_path / "bad.jsonl", [{"text": "fine"}, row]), tokenizer, max_length=16)


def test_messages_need_a_template_that_goes_on(tokenizer, tmp_path):
    path = write(tmp_path / "talk.jsonl", [{"messages": TALK}])
    with pytest.raises(ValueError, match="`tokenizer` must have a chat template to read messages, got one without"):
        supervised_text(path, lm.tokenizer())
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="`tokenizer` must have a chat template that only adds to what it wrote"):
        supervised_text(path, tokenizer)
