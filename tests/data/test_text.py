"""Text files, labels, and paths of no known kind."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayes_kf.data import encode_labels, open_dataset

CSV = 'text,label\ngood film,pos\n"bad,\nbad film",neg\n'
JSONL = '{"text": "good film", "label": "pos"}\n\n{"text": "bad, bad film", "label": "neg"}\n'


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("a.jsonl", JSONL), ("a.csv", "\ufeff" + CSV)])
def test_text(tmp_path, text_model, name, text):
    data = open_dataset(write(tmp_path / name, text), model=text_model, batch_size=2)
    batch = next(iter(data.loader))
    assert data.class_names == ("neg", "pos")
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[2, 4, 0, 0], [3, 1, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_text_options(tmp_path, text_model):
    path = write(tmp_path / "a.tsv", "review\tscore\ngood film\t4.5\nbad\t1\n")
    columns = {"text_column": "review", "label_column": "score"}
    data = open_dataset(path, model=text_model, batch_size=2, numeric=True, max_length=1, **columns)
    batch = next(iter(data.loader))
    assert data.class_names == ()
    assert torch.equal(batch["labels"], torch.tensor([4.5, 1.0]))
    assert batch["input_ids"].tolist() == [[2], [3]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text\ngood\n", "`label_column` must be a column of .*a.csv, got 'label'; line 2 has text"),
        ("a.jsonl", '{"label": 1}', "`text_column` must be a column of .*, got 'text'; line 1 has label"),
        ("a.csv", "text,label\ngood\n", "`path` must have the header's 2 fields in every line, got 1 in line 2"),
        ("a.csv", "text,text,label\na,b,c\n", "`path` must name each column once, got text, text, label"),
        ("a.csv", "text,label\n", "`path` must hold at least one row, got none"),
        ("a.csv", "", "`path` must hold at least one row, got none"),
        ("a.csv", "text,label\ngood, \n", "`path` must hold a label in column 'label', got ' ' in line 2"),
        ("a.csv", f"text,label\n{'a' * 200_000},1\n", "`path` must be a readable file, got .* field limit"),
        ("a.jsonl", "[1]\n", "`path` must hold one JSON object per line, got list in line 1"),
        ("a.jsonl", "{\n", "`path` must hold one JSON object per line, got .* in line 1"),
        ("a.jsonl", '{"text": 3, "label": 1}', "`path` must hold text in column 'text', got 3 in line 1"),
        ("a.jsonl", '{"text": "a", "label": null}', "`path` must hold a label in column 'label', got None in line 1"),
    ],
)
def test_text_errors(tmp_path, text_model, name, text, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(write(tmp_path / name, text), model=text_model)


def test_text_label_and_encoding_errors(tmp_path, text_model):
    path = write(tmp_path / "a.csv", CSV)
    with pytest.raises(
        ValueError, match=r"`labels` must be among the classes neg, got 'pos' .* column 'label' in .*a.csv"
    ):
        open_dataset(path, model=text_model, class_names=["neg"])
    with pytest.raises(ValueError, match=r"`labels` must be numbers, got 'pos' at position 0"):
        open_dataset(path, model=text_model, numeric=True)
    latin = write(tmp_path / "latin.csv", "text,label\ncafé,1\n", "latin-1")
    with pytest.raises(ValueError, match=r"`path` must be UTF-8 text, got byte 0xe9 in .*latin.csv"):
        open_dataset(latin, model=text_model)
    with pytest.raises(ValueError, match=r"`model` must be a Hugging Face model folder with a tokenizer"):
        open_dataset(path)
    with pytest.raises(
        ValueError, match=r"`tokenizer` must be a Hugging Face model folder with a tokenizer, got .*gone"
    ):
        open_dataset(path, model=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"`tokenizer` must be a Hugging Face model folder with a tokenizer"):
        open_dataset(path, model=tmp_path)


def test_paths_of_no_known_kind(tmp_path):
    arrays = tmp_path / "a.npz"
    np.savez(arrays, x=np.zeros((6, 2)), y=np.zeros(6, int))
    with pytest.raises(FileNotFoundError, match=r"`path` must be an existing file or folder, got .*gone.csv"):
        open_dataset(tmp_path / "gone.csv")
    with pytest.raises(
        ValueError, match=r"`path` must be an image folder or end in .npz, .csv, .tsv, .jsonl, got .*a.pt"
    ):
        open_dataset(write(tmp_path / "a.pt", ""))
    with pytest.raises(ValueError, match=r"`text_column` must be left out unless `path` is text"):
        open_dataset(arrays, text_column="x")
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1, got 0"):
        open_dataset(arrays, batch_size=0)


def test_encode_labels():
    assert encode_labels([10, 2, "10"])[1] == ("2", "10")
    assert encode_labels(["b", "10", "2"])[1] == ("10", "2", "b")
    indices, names = encode_labels(["neg", 1, "0"], ["neg", "pos"])
    assert (indices.tolist(), names) == ([0, 1, 0], ("neg", "pos"))
    assert encode_labels([3], ["1", "3"])[0].tolist() == [1]
    with pytest.raises(ValueError, match=r"`labels` must be among the classes 1, 3, got '0' at position 0"):
        encode_labels([0], ["1", "3"])
    with pytest.raises(ValueError, match=r"`labels` must not be empty, got an empty label at position 1"):
        encode_labels(["a", " "])
