"""The examples that a report shows: which, and what becomes of their pixels and texts."""

import base64
import io

import numpy as np
import pytest
import torch
from evaluation_cases import random_case
from PIL import Image

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.sections.examples import example_section

PROBS = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
TARGETS = torch.tensor([1, 0, 1])
RNG = np.random.default_rng(0)


def galleries(examples, *, probs=PROBS, targets=TARGETS, **settings):
    return example_section(probs, targets, examples, **settings).galleries


def pixels(picture):
    """What the data URI holds."""
    kind, content = picture.uri.split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert not image.info
        return np.asarray(image)


def shown(examples):
    """Pixels of the three examples of the case, in order."""
    actual = {example.index: pixels(example.image) for gallery in galleries(examples) for example in gallery.examples}
    return [actual[index] for index in range(3)]


def test_the_most_uncertain_and_the_surest_of_the_wrong_are_shown():
    probs, targets = random_case(300, 4)
    mistaken, uncertain = galleries([str(i) for i in range(300)], probs=probs, targets=targets, num_examples=7)
    entropy = [-sum(p * np.log(p) for p in row) for row in probs.numpy()]
    by_entropy = sorted(range(300), key=lambda i: -entropy[i])[:7]
    wrong = [i for i in range(300) if probs[i].argmax() != targets[i]]
    by_confidence = sorted(wrong, key=lambda i: -probs[i].max())[:7]
    assert [example.index for example in uncertain.examples] == by_entropy
    assert [example.index for example in mistaken.examples] == by_confidence
    assert [example.text for example in mistaken.examples] == [str(i) for i in by_confidence]
    assert not any(example.is_right for example in mistaken.examples)
    for example in uncertain.examples:
        p = probs[example.index]
        assert example.entropy == pytest.approx(entropy[example.index], rel=1e-12)
        assert example.probability == p.max()
        assert example.label_probability == p[targets[example.index]]
        assert (example.label, example.prediction) == (str(int(targets[example.index])), str(int(p.argmax())))
        assert example.is_right == (example.index not in wrong)
    assert uncertain.note == "The 7 of 300 examples with the highest predictive entropy."
    assert mistaken.note == f"The 7 of {len(wrong)} wrong predictions with the highest confidence."


def test_among_equals_the_earlier_ones_are_shown():
    probs = torch.full((50, 2), 0.5)
    mistaken, uncertain = galleries(["x"] * 50, probs=probs, targets=torch.ones(50, dtype=torch.int64), num_examples=3)
    assert [example.index for example in uncertain.examples] == [0, 1, 2]
    assert [example.index for example in mistaken.examples] == [0, 1, 2]


def test_certain_and_right_predictions_leave_no_mistakes():
    mistaken, uncertain = galleries(["a"], probs=torch.tensor([[1.0, 0.0]]), targets=torch.tensor([0]))
    assert [(example.entropy, example.is_right) for example in uncertain.examples] == [(0.0, True)]
    assert (mistaken.examples, mistaken.note) == ((), "No prediction is wrong.")


def test_only_what_is_shown_is_read():
    class Counting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    probs, targets = random_case(500, 3)
    read: list[int] = []
    actual = galleries(Counting(map(str, range(500))), probs=probs, targets=targets, num_examples=4)
    assert sorted(read) == sorted({example.index for gallery in actual for example in gallery.examples})


def test_names_of_classes_are_used_and_equal_names_are_not_mixed_up():
    mistaken, uncertain = galleries(["x"] * 3, class_names=["same", "same"])
    assert [(e.label, e.prediction, e.is_right) for e in mistaken.examples] == [("same", "same", False)]
    assert [e.is_right for e in uncertain.examples] == [True, True, False]


GREY = RNG.integers(0, 256, (3, 9, 7)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (3, 9, 7, 3)).astype(np.uint8)
LAYOUTS = {
    "grey": (GREY, GREY),
    "grey torch": (torch.from_numpy(GREY), GREY),
    "one channel first": (GREY[:, None], GREY),
    "one channel last": (GREY[..., None], GREY),
    "colours last": (COLOUR, COLOUR),
    "colours first": (np.moveaxis(COLOUR, 3, 1), COLOUR),
    "colours first torch": (torch.from_numpy(COLOUR).permute(0, 3, 1, 2), COLOUR),
    "shares": (GREY / 255, GREY),
    "shares float32": (torch.from_numpy(GREY / 255).float(), GREY),
    "list of arrays": (list(GREY), GREY),
    "list of tensors": ([torch.from_numpy(image) for image in COLOUR], COLOUR),
    "list of PIL images": ([Image.fromarray(image) for image in COLOUR], COLOUR),
    "zeros and ones": (GREY > 99, 255 * (GREY > 99)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_shows_the_same_pixels(layout):
    given, wanted = LAYOUTS[layout]
    for actual, expected in zip(shown(given), wanted, strict=True):
        assert np.array_equal(actual, expected)


def test_transparent_images_keep_their_transparency():
    images = RNG.integers(0, 256, (3, 5, 6, 4)).astype(np.uint8)
    assert np.array_equal(shown(images)[1], images[1])


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_standardized_images_are_rescaled_one_by_one(dtype):
    images = (100 * RNG.standard_normal((3, 9, 7))).astype(dtype)
    for actual, image in zip(shown(images), images, strict=True):
        values = image.astype(np.float64)
        expected = np.round(255 * (values - values.min()) / (values.max() - values.min()))
        assert np.array_equal(actual, expected)


def test_one_image_outside_0_to_1_among_those_shown_rescales_all():
    images = np.stack([np.array([[0.25, 0.5]]), np.array([[-1.0, 1.0]]), np.array([[0.5, 0.5]])])
    assert [image.tolist() for image in shown(images)] == [[[0, 255]], [[0, 255]], [[0, 0]]]
    half = torch.from_numpy(images).bfloat16()
    assert [image.tolist() for image in shown(half)] == [[[0, 255]], [[0, 255]], [[0, 0]]]


@pytest.mark.parametrize(
    ("size", "held", "width_height", "is_enlarged"),
    [
        ((8, 6), (8, 6), (128, 96), True),
        ((28, 28), (28, 28), (112, 112), True),
        ((128, 3), (128, 3), (128, 3), False),
        ((160, 90), (160, 90), (160, 90), False),
        ((640, 480), (160, 120), (160, 120), False),
        ((1, 1000), (1, 160), (1, 160), False),
    ],
)
def test_sizes(size, held, width_height, is_enlarged):
    image = Image.new("RGB", size, (10, 200, 30))
    picture = galleries([image] * 3)[0].examples[0].image
    assert pixels(picture).shape[:2] == held[::-1]
    assert (picture.width, picture.height, picture.is_enlarged) == (*width_height, is_enlarged)
    assert image.size == size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_images_of_every_mode_are_shown(mode):
    image = Image.fromarray(COLOUR[0]).convert(mode if mode != "LAB" else "RGB")
    if mode == "LAB":
        image = Image.new("LAB", (7, 9))
    assert shown([image] * 3)[0].shape[:2] == (9, 7)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_images_of_numbers_are_rescaled(mode):
    ramp = np.array([[0, 500, 1000]])
    image = {
        "I": Image.fromarray(ramp.astype(np.int32)),
        "F": Image.fromarray(ramp.astype(np.float32)),
        "I;16": Image.fromarray(ramp.astype(np.uint16)),
    }[mode]
    assert image.mode == mode
    assert shown([image] * 3)[0].tolist() == [[0, 128, 255]]


def test_turned_photographs_stand_upright_and_lose_their_metadata():
    image = Image.fromarray(COLOUR[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "taken at home"
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    with Image.open(buffer) as turned:
        actual = shown([turned] * 3)[0]
        assert turned.size == (7, 9)
    assert np.array_equal(actual, np.rot90(COLOUR[0], -1))
    uri = galleries([turned] * 3)[0].examples[0].image.uri
    assert b"taken at home" not in base64.b64decode(uri.split(",")[1])


def test_texts_are_cut_and_pairs_stand_on_two_lines():
    long = "word " * 100
    _, uncertain = galleries([("premise", "hypothesis"), "a" * 300, long])
    texts = {example.index: example.text for example in uncertain.examples}
    assert texts[0] == "premise\nhypothesis"
    assert texts[1] == "a" * 300
    assert texts[2] == long[:299].rstrip() + "…"
    assert uncertain.examples[0].image is None


def test_arrays_and_columns_of_texts_are_taken_by_place():
    pandas = pytest.importorskip("pandas")
    texts = ["zero", "one", "two"]
    column = pandas.Series(texts, index=[2, 0, 1])
    for examples in (np.array(texts), np.array(texts, dtype=object), column):
        assert {example.text: example.index for example in galleries(examples)[1].examples} == {
            "zero": 0,
            "one": 1,
            "two": 2,
        }


BAD = [
    (["a", "b"], "`examples` must hold 3, as many as `probs` has rows, got 2."),
    (np.zeros((2, 8, 8)), "`examples` must hold 3, as many as `probs` has rows, got 2."),
    ("abc", "`examples` must be a sequence of texts or images, got str."),
    ({0: "a", 1: "b", 2: "c"}, "`examples` must be a sequence of texts or images, got dict."),
    (iter("abc"), "`examples` must be a sequence of texts or images, got str_ascii_iterator."),
    (
        np.zeros((3, 8)),
        "`examples` must be images of shape (N, H, W), (N, C, H, W) or (N, H, W, C), or texts, got shape (3, 8).",
    ),
    (
        torch.zeros(3, 5, 8, 8),
        "`examples` must hold images of shape (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels, "
        "got (5, 8, 8) in example 0.",
    ),
    (
        np.zeros((3, 0, 8)),
        "`examples` must hold images of shape (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels, "
        "got (0, 8) in example 0.",
    ),
    ([1.0, 2.0, 3.0], "`examples` must hold texts or images, got float in example 0."),
    ([("a", 1)] * 3, "`examples` must hold texts or images, got tuple in example 0."),
    (np.full((3, 2, 2), np.nan), "`examples` must be finite, got NaN or infinity in example 0."),
    (np.zeros((3, 2, 2), dtype=complex), "`examples` must hold numbers as pixels, got complex128 in example 0."),
]


@pytest.mark.parametrize(("examples", "message"), BAD)
def test_bad_examples_are_refused(examples, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        galleries(examples)
    assert str(caught.value) == message


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"^`class_names` must hold 2 names, got 1\.$"):
        galleries(["x"] * 3, class_names=["a"])
    with pytest.raises(ValueError, match=r"^`num_examples` must be a positive integer, got 0\.$"):
        galleries(["x"] * 3, num_examples=0)


def test_the_page_shows_them_escaped():
    sections = example_section(PROBS, TARGETS, ["<img src=x onerror=alert(1)>", "b", "c"], ["<i>", "&"])
    html = ev.Report("t", {}, sections).to_html()
    assert "<img" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "<strong>&lt;i&gt;</strong>, 90.0&nbsp;%" in html
    assert '"examples": {' in ev.Report("t", {}, sections).to_json()


def test_the_same_examples_give_the_same_page():
    first, second = (ev.Report("t", {}, example_section(PROBS, TARGETS, COLOUR)).to_html() for _ in range(2))
    assert first == second
