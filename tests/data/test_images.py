"""Image folders and the image formats of model folders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bayes_kf.data import ImageFormat, open_dataset
from bayes_kf.models.zoo import DIGITS_VIT

GREY = ImageFormat((4, 4), 1, (0.5,), (0.5,))


@pytest.fixture
def image_folder(tmp_path):
    for name, level in (("cat", 0), ("dog", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 6), (level,) * 3).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_images(image_folder):
    data = open_dataset(image_folder, image_format=GREY, batch_size=4)
    inputs, targets = next(iter(data.loader))
    assert data.class_names == ("cat", "dog")
    assert targets.tolist() == [0, 0, 1, 1]
    assert torch.equal(inputs, torch.tensor([-1.0, -1, 1, 1]).view(4, 1, 1, 1).expand(4, 1, 4, 4))
    assert next(iter(open_dataset(image_folder, model=DIGITS_VIT).loader))[0].shape == (1, 1, 28, 28)
    assert next(iter(open_dataset(image_folder).loader))[0].shape == (1, 3, 224, 224)


def test_images_keep_the_given_class_order(image_folder):
    data = open_dataset(image_folder, image_format=GREY, class_names=["dog", "emu", "cat"], batch_size=4)
    assert next(iter(data.loader))[1].tolist() == [2, 2, 0, 0]
    with pytest.raises(ValueError, match=r"`path` must hold folders named after the classes cat, got dog"):
        open_dataset(image_folder, class_names=["cat"])


def test_image_folder_errors(image_folder, tmp_path):
    (image_folder / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"`path` must hold readable images, got .*cat.0.png"):
        list(open_dataset(image_folder).loader)
    Image.new("I;16", (4, 4)).save(image_folder / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"`path` must hold 8-bit images, got mode I;16"):
        list(open_dataset(image_folder).loader)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`path` must hold one folder of images a class, got .*empty"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"`path` must hold one folder of images a class, got .*empty"):
        open_dataset(tmp_path / "empty")


@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (6, 5, 7, 3)])
def test_pixels_in_either_channel_order(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    last = pixels if shape[-1] == 3 else pixels.transpose(0, 2, 3, 1)
    inputs = ImageFormat((5, 7), 3, (0.0,) * 3, (1.0,) * 3).from_pixels(pixels)
    torch.testing.assert_close(inputs, torch.tensor(last / 255).permute(0, 3, 1, 2).float())


PROCESSORS = {  # as transformers writes them, and with sizes of their own
    "ViTImageProcessor": {"size": 24},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 28}, "crop_pct": 0.875},
    "ConvNextImageProcessor, large": {"size": {"shortest_edge": 384}},
    "MobileNetV2ImageProcessor": {},
    "BeitImageProcessor": {},
}


@pytest.mark.parametrize("shape", [(40, 57), (63, 41)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_what_transformers_own_processors_make_of_them(name, shape, tmp_path):
    """The folders that they write, on a photograph-like image; within two grey levels, as they round in between."""
    import transformers

    processor = getattr(transformers, name.split(",")[0])(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    waves = np.add.outer(np.arange(shape[0]) ** 1.5, 3.0 * np.arange(shape[1]))[..., None] + np.array([0.0, 40.0, 80.0])
    image = Image.fromarray((127 + 120 * np.sin(waves / 25)).astype(np.uint8))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    image_format = ImageFormat.from_pretrained(tmp_path)
    ours = image_format.transform()(image)
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * torch.tensor(image_format.sd)[:, None, None] * 255
    assert levels.max() < 2.01


@pytest.mark.parametrize(
    ("config", "size", "shortest"),
    [
        ({"size": 32}, (32, 32), None),
        ({"size": {"height": 30, "width": 20}}, (30, 20), None),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            (32, 32),
            40,
        ),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 36}, (36, 36), 40),
    ],
)
def test_image_format_of_a_model_folder(tmp_path, config, size, shortest):
    assert ImageFormat.from_pretrained(tmp_path) is None
    config = config | {"resample": 3, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    expected = ImageFormat(size, 3, (0.0,) * 3, (1.0,) * 3, shortest, "bicubic")
    assert ImageFormat.from_pretrained(tmp_path) == expected
    assert expected.transform()(Image.new("RGB", (50, 60))).shape == (3, *size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "`folder` must hold a JSON object in preprocessor_config.json"),
        ('{"size": {"longest_edge": 3}}', "`folder` must hold a preprocessor_config.json with sizes"),
        ('{"image_mean": 0.5}', "`folder` must hold a preprocessor_config.json with sizes"),
        ('{"rescale_factor": 1}', "`rescale_factor` must be 1/255, got 1"),
        ('{"image_std": [0, 0, 0]}', "`mean` and `sd` must be 3 numbers each, `sd` positive"),
    ],
)
def test_image_format_errors(tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ImageFormat.from_pretrained(tmp_path)
