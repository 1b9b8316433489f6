"""kd/models.py: names, weights, heads, and folders that timm loads by itself."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from timm.data import resolve_data_config

from kd import BadInput, models
from kd.machine import runtime

CLASSES = ("angular", "rust", "healthy")
MACHINE = runtime.start("cpu", "off", "off", "off")


def save(model: Any, folder: Path, classes: tuple[str, ...], size: int) -> None:
    models.save(models.Classifier(model, models.preprocessing(model), size, classes, MACHINE), folder, "# card\n")


def make(weights: str = "none", name: str = "test_resnet", classes: tuple[str, ...] = CLASSES,
         said: list | None = None):
    return models.create("teacher", name, classes, weights, say=(said if said is not None else []).append)


def test_a_model_has_one_output_a_class_and_random_weights_from_the_seed():
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    assert models.digest(make()) == models.digest(model)
    assert models.digest(make()) != models.digest(model)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name, hint", [("resnet5O", "resnet50"), ("mobilenet_v2_100", "mobilenetv2_100")])
def test_an_unknown_model_is_named_with_its_neighbours(name, hint):
    with pytest.raises(BadInput, match=f"--teacher {name}: .*{hint}"):
        make(name=name)


@pytest.mark.parametrize("name", [
    "test_resnet.r160_in1k", "timm/test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_a_name_as_the_hub_shows_it_is_timms_model(name):
    models.check("teacher", name, "imagenet")
    torch.manual_seed(0)
    model = make(name=name)
    torch.manual_seed(0)
    assert models.digest(model) == models.digest(make()) and models.architecture(model) == "test_resnet"


def test_names_that_lead_nowhere_are_one_line(tmp_path):
    for name, text in (("timm/resnet5O", "no model of that name; did you mean .*resnet50"),
                       ("hf-hub:timm/resnet5O", "no model of that name; did you mean .*resnet50"),
                       ("acme/resnet", "hf-hub:acme/resnet"), ("runs/demo/teacher", "local-dir:runs/demo/teacher"),
                       ("ftp:x/y", "Unknown model source 'ftp'"),
                       (f"local-dir:{tmp_path}", "no config.json in that folder"), ("local-dir:", "no model id"),
                       ("hf-hub:a/b/c", "a/b/c"), ("hf-hub:", "no model id")):
        with pytest.raises(BadInput, match=f"^--student {name}: .*{text}") as caught:
            models.check("student", name)
        assert "\n" not in str(caught.value)


def test_weights_come_from_a_file_and_a_head_of_another_size_is_replaced(tmp_path):
    big = make(classes=tuple("abcdefg"))
    safetensors.torch.save_file(big.state_dict(), tmp_path / "big.safetensors")
    said: list[str] = []
    small = make(str(tmp_path / "big.safetensors"), said=said)
    assert said == ["big.safetensors: the head of 7 classes was replaced by a random one of 3"]
    for key, value in small.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, big.state_dict()[key]), key
    same = make(str(tmp_path / "big.safetensors"), classes=tuple("abcdefg"), said=said)
    assert models.digest(same) == models.digest(big) and len(said) == 1


def test_weights_that_cannot_be_used_are_named(tmp_path):
    good = make().state_dict()
    cases = {
        "absent.safetensors": (None, "no such file"),
        "weights.pt": (b"x", "not a readable weights file"),
        "corrupt.safetensors": (b"x" * 100, "not a readable weights file"),
        "empty.safetensors": (b"", "not a readable weights file"),
        "other.safetensors": (make(name="test_efficientnet").state_dict(), "holds another model than test_resnet"),
        "nan.safetensors": ({**good, "conv1.0.weight": good["conv1.0.weight"] * torch.nan}, "NaN or infinite"),
    }
    for name, (content, expected) in cases.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content:
            safetensors.torch.save_file(content, tmp_path / name)
        with pytest.raises(BadInput, match=expected) as caught:
            make(str(tmp_path / name))
        assert name in str(caught.value)


def test_a_model_that_declares_another_crop_is_said_to():
    said: list[str] = []
    models.create("teacher", "convnext_tiny.fb_in22k_ft_in1k_384", ("a", "b"), say=said.append)
    models.create("teacher", "test_resnet", ("a", "b"), say=said.append)
    assert said == ["convnext_tiny.fb_in22k_ft_in1k_384: timm declares crop_mode squash; here its pictures are cropped "
                    "in the centre"]


def test_a_size_that_a_model_cannot_take_is_refused_by_name():
    models.create("student", "test_efficientnet", ("a", "b"), size=40)
    for name, size in (("test_vit", 40), ("mixer_s16_224", 40), ("swin_tiny_patch4_window7_224", 34)):
        with pytest.raises(BadInput, match=f"^--student {name}: takes no pictures of {size} × {size} pixels .*--size"
                           ) as caught:
            models.create("student", name, ("a", "b"), size=size)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="--size or --teacher-size"):
        models.create("teacher", "test_vit", ("a", "b"), size=40)


@pytest.mark.parametrize("name, size", [
    ("test_resnet", 48), ("test_vit", 48), ("mobilenetv2_035", 48), ("vit_tiny_patch16_224", 224)])
def test_a_model_that_takes_the_size_anyway_is_created_as_without_it(name, size):
    digests = []
    for given in (None, size):
        torch.manual_seed(0)
        digests.append(models.digest(models.create("student", name, ("a", "b"), size=given)))
    torch.manual_seed(0)
    plain: Any = timm.create_model(name, num_classes=2)
    plain.get_classifier().reset_parameters()   # see _reset_head
    assert digests == [models.digest(plain)] * 2


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 32), ("mixer_s16_224", 48), ("levit_128s", 64)])
def test_a_model_of_a_fixed_size_is_built_for_the_size_of_the_run(tmp_path, name, size):
    model = models.create("student", name, ("a", "b"), size=size)
    save(model, tmp_path / "student", ("a", "b"), size)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["model_args"]["img_size"] == [size, size] and config["pretrained_cfg"]["fixed_input_size"]
    opened = models.open_saved(str(tmp_path / "student"), MACHINE)
    assert models.digest(opened.model) == models.digest(model) and opened.size == size
    # as a teacher at twice the size: resampled as timm does
    if name == "vit_tiny_patch16_224":
        folder = f"local-dir:{tmp_path / 'student'}"
        theirs = timm.create_model(folder, pretrained=True, img_size=2 * size)
        for given in (name, folder):
            ours = models.create("teacher", given, ("a", "b"), str(tmp_path / "student"), 2 * size)
            assert models.digest(ours) == models.digest(theirs) != models.digest(model)


def test_an_unreachable_hub_is_one_line_within_20_seconds(unreachable_hub):
    start = time.monotonic()
    with pytest.raises(BadInput, match="^--teacher-weights imagenet: resnet18: the Hub cannot be reached") as caught:
        make("imagenet", "resnet18")
    assert "python train.py --recipe demo" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - start < 20
    assert not constants.HF_HUB_OFFLINE     # what comes after asks the Hub again


def test_a_saved_folder_is_a_timm_model_with_its_preprocessing(tmp_path):
    model = make().to(memory_format=torch.channels_last).eval()
    prep = models.Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    for _ in range(2):  # the second replaces the first
        models.save(models.Classifier(model, prep, 48, CLASSES, MACHINE), tmp_path / "student", "---\n---\n# card\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student"]
    modes = {path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert len(modes) == 1      # safetensors would make its file readable to its owner only
    loaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(x), model.to(memory_format=torch.contiguous_format)(x))
    config = resolve_data_config({}, model=loaded)
    assert config == {"input_size": (3, 48, 48), "interpolation": "bilinear", "mean": list(prep.mean),
                      "std": list(prep.std), "crop_pct": 0.9, "crop_mode": "center"}
    assert json.loads((tmp_path / "student" / "config.json").read_text())["label_names"] == list(CLASSES)
    assert models.digest(make(str(tmp_path / "student"))) == models.digest(model)


def test_the_folder_of_a_run_is_not_a_model(tmp_path):
    save(make(), tmp_path / "student", CLASSES, 48)
    with pytest.raises(BadInput, match=f"{tmp_path}: a run, not one of its models; give {tmp_path / 'student'}$"):
        models.open_saved(str(tmp_path), MACHINE)


def test_normalize_is_what_timm_does():
    from PIL import Image
    model = make()
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    config = {**resolve_data_config({}, model=model), "input_size": (3, 32, 32), "crop_pct": 1.0}
    expected = timm.data.create_transform(**config)(Image.fromarray(pixels[0].numpy()))
    normalise = models.FromPixels(torch.nn.Identity(), models.preprocessing(model))
    assert torch.allclose(normalise(pixels.permute(0, 3, 1, 2))[0], expected, atol=1e-6)


def test_a_frozen_teacher_does_not_move():
    teacher = models.freeze(make())
    before = models.digest(teacher)
    teacher(torch.randn(4, 3, 32, 32) * 5 + 3)
    assert models.digest(teacher) == before  # BatchNorm's running statistics are part of the digest
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_parameters_of_the_default_pair():
    # the counts that the literature gives for ImageNet's head: 25.6 M and 3.5 M
    counts = [models.parameters(timm.create_model(name)) for name in ("resnet50", "mobilenetv2_100")]
    assert counts == [25_557_032, 3_504_872]
