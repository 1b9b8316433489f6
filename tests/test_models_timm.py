"""What a saved folder declares is what was done: timm's own pipeline on it gives our logits, in every family."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from torch import nn

from kd import models
from kd.data.decoding import open_picture, to_frame
from kd.data.frames import center_crop
from kd.machine import runtime

CLASSES = ("ant", "bee", "cat")


def picture(width: int, height: int, turned: int = 1) -> bytes:
    """A PNG of noise; `turned` is its EXIF orientation."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.getexif()[0x0112] = turned
    image.save(file, "PNG", exif=image.getexif())
    return file.getvalue()


# wide, tall, square, smaller than any input, larger, lying on its side
PICTURES = [picture(97, 41), picture(33, 120), picture(64, 64), picture(20, 31), picture(201, 199), picture(90, 51, 6)]


def our_input(size: int, prep: models.Preprocessing) -> torch.Tensor:
    """(6, 3, size, size): PICTURES as in training and prediction."""
    side = math.floor(size / prep.crop_pct)
    frames = np.stack([to_frame(open_picture(encoded, "x"), size, side, prep.interpolation) for encoded in PICTURES])
    pixels = torch.tensor(center_crop(frames, size)).permute(0, 3, 1, 2).contiguous()
    return models.FromPixels(nn.Identity(), prep)(pixels)


def assert_timm_agrees(model: nn.Module, folder: Path, size: int) -> dict[str, Any]:
    """Save `model`; timm must load the same model and make the same input of each picture. Returns what it read."""
    prep = models.preprocessing(model)
    # in training the weights are channels_last; saved and loaded they are contiguous, as timm has them
    on_cpu = runtime.start("cpu", "off", "off")
    classifier = models.Classifier(model.to(memory_format=torch.channels_last), prep, size, CLASSES, on_cpu)
    models.save(classifier, folder, "a card")
    model = model.to(memory_format=torch.contiguous_format).eval()

    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    declared = timm.data.resolve_data_config({}, model=theirs)
    transform = timm.data.create_transform(**declared)
    opened = models.open_saved(str(folder), on_cpu)
    assert opened[1:4] == (prep, size, CLASSES)
    contiguous = opened.model.to(memory_format=torch.contiguous_format)     # channels_last rounds differently
    assert timm.data.resolve_data_config({}, model=theirs, use_test_size=True) == declared
    upright = [ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB") for encoded in PICTURES]
    x = torch.stack([transform(image) for image in upright])
    assert torch.equal(our_input(size, prep), x)        # also mean and std: to the bit
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(theirs(x), expected) and torch.equal(contiguous(x), expected)
    return declared


# Some are made smaller than timm has them, by arguments that the folder has to keep.
@pytest.mark.parametrize("name, size, arguments", [
    ("test_resnet", 32, {}), ("test_vit", 48, {}), ("test_efficientnet", 40, {}), ("test_convnext", 64, {}),
    ("test_nfnet", 33, {}), ("test_byobnet", 64, {}), ("test_mambaout", 64, {}),
    ("convnext_atto", 32, {"depths": (1, 1, 1, 1)}), ("vit_tiny_patch16_224", 48, {"img_size": 48, "depth": 2}),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 2)}),
    ("mixer_s16_224", 64, {"img_size": 64}),
    ("cait_xxs24_224", 48, {"img_size": 48, "depth": 2}), ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2}),
    ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 48, "depth": 2}), ("levit_128s", 64, {"img_size": 64}),
    ("mobilenetv2_035", 47, {}), ("mobilenetv3_small_050", 32, {}), ("lcnet_035", 32, {}),
    ("tf_efficientnet_lite0", 48, {}), ("regnetx_002", 32, {}), ("resnet10t", 41, {}), ("dla46_c", 64, {}),
    ("mobilevit_xxs", 64, {}), ("ghostnet_050", 64, {}), ("edgenext_xx_small", 64, {}), ("fastvit_t8", 64, {}),
    ("repvit_m0_9", 64, {})])
def test_timms_pipeline_on_a_saved_folder_gives_our_pixels_and_logits(tmp_path, name, size, arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(CLASSES), **arguments)
    declared = assert_timm_agrees(model, tmp_path / "student", size)
    assert declared["input_size"] == (3, size, size) and declared["crop_mode"] == "center"


@pytest.mark.parametrize("crop_pct", [1.0, .875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest", "random"])
def test_every_interpolation_and_crop_is_declared(tmp_path, interpolation, crop_pct):
    model: Any = models.create("student", "test_resnet", CLASSES)
    model.pretrained_cfg.update(interpolation=interpolation, crop_pct=crop_pct, mean=(.1, .2, .3), std=(.3, .2, .7))
    declared = assert_timm_agrees(model, tmp_path / "student", 39)
    assert declared["interpolation"] == ("bilinear" if interpolation == "random" else interpolation)
    assert declared["crop_pct"] == crop_pct and list(declared["mean"]) == [.1, .2, .3]


@pytest.mark.parametrize("crop_mode", ["squash", "border"])
def test_another_crop_mode_and_the_sizes_for_tests_of_the_original_weights_are_gone(tmp_path, crop_mode):
    model: Any = models.create("student", "test_resnet", CLASSES)
    model.pretrained_cfg.update(crop_mode=crop_mode, test_input_size=(3, 64, 64), test_crop_pct=1.0, crop_pct=.875,
                                label_names=["x", "y", "z"], label_descriptions={"x": "a letter"})
    assert_timm_agrees(model, tmp_path / "student", 32)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["label_names"] == list(CLASSES) and "letter" not in str(config)
    assert not {"test_input_size", "test_crop_pct", "label_names"} & config["pretrained_cfg"].keys()
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'student'}")
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)


def test_models_that_declare_them_are_the_same():
    """A crop mode, a test size, and a share of more than the whole picture, in timm's own declarations."""
    for name, key, value in (("convnext_tiny.fb_in22k_ft_in1k_384", "crop_mode", "squash"),
                             ("resnet50.a1_in1k", "test_input_size", (3, 288, 288)), ("volo_d4_448", "crop_pct", 1.15)):
        assert getattr(timm.get_pretrained_cfg(name), key) == value


def test_a_share_of_more_than_the_picture_becomes_the_whole(tmp_path):
    model: Any = models.create("student", "test_resnet", CLASSES)
    model.pretrained_cfg.update(crop_pct=1.15)      # as VOLO's of 448 pixels
    assert assert_timm_agrees(model, tmp_path / "student", 40)["crop_pct"] == 1.0
