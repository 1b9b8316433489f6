"""Exported graphs against the model they came from, on pictures; what cannot be exported, in one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from kd import BadInput, TrainingFault, models
from kd.data.frames import decode
from kd.data.table import open_dataset
from kd.machine import runtime
from kd.tools import export

SIZE = 64
# odd on purpose: a graph that normalised with anybody's usual mean and std would be found out
PREP = models.Preprocessing((0.31, 0.42, 0.53), (0.21, 0.32, 0.43), "bilinear", 0.9)


def save(folder: Path, classes: tuple[str, ...], dataset: str) -> list[str]:
    """Save a MobileNetV2, always the same; returns the arguments that name it and its data."""
    torch.manual_seed(0)
    model = models.create("student", "mobilenetv2_100", classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)     # so that BatchNorm does something
        # random features are near each other: answers should hang on the picture
        model.get_submodule("classifier").weight.mul_(10)  # type: ignore[operator]
    classifier = models.Classifier(model, PREP, SIZE, classes, runtime.start("cpu", "off", "off"))
    models.save(classifier, folder / "student", "---\n---\n")
    return [str(folder / "student"), "--dataset", dataset, "--cache-dir", str(folder / "cache")]


@pytest.fixture(scope="module")
def exported(photos, tmp_path_factory) -> tuple[list[str], dict]:
    """The arguments that name a model and its data, and the result of its export."""
    arguments = save(tmp_path_factory.mktemp("exported"), ("blob", "plain", "stripes"), str(photos))
    return arguments, export.main([*arguments, "--to", "onnx"])


@pytest.fixture
def quick(exported, monkeypatch, tmp_path) -> list[str]:
    """Arguments to export this model once more. Its graph is there, because torch's exporter takes seconds."""
    arguments, result = exported
    monkeypatch.setattr(export, "write_onnx", lambda module, size, file: shutil.copy(result["file"], file))
    return [*arguments, "--out", str(tmp_path / "student.onnx")]


def run(file: Path | str, pixels: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]


def test_the_onnx_graph_takes_bare_pixels_of_any_batch(exported):
    (folder, *_), result = exported
    file = Path(result["file"])
    assert file == Path(f"{folder}.onnx") and result["bytes"] == file.stat().st_size
    assert (result["agree"], result["total"], result["split"], result["split_of_run"]) == (12, 12, "test", None)
    assert result["max_difference"] < 1e-4 and result["ms"] > 0 and result["pytorch_ms"] > 0
    assert sorted(path.name for path in file.parent.iterdir()) == ["cache", "student", "student.onnx"]
    # what timm makes of the folder, with what timm normalises by
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, SIZE, SIZE), np.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREP.mean, PREP.std))
    with torch.no_grad():
        expected = model((torch.from_numpy(pixels) / 255 - mean) / std).numpy()
    for count in (1, 2, 5):
        given = run(file, pixels[:count])
        assert given.dtype == np.float32 and np.abs(given - expected[:count]).max() < 1e-4
    assert {entry.key: entry.value for entry in onnx.load(file).metadata_props} == {
        "architecture": "mobilenetv2_100", "labels": '["blob", "plain", "stripes"]', "size": "64", "resize": "71",
        "interpolation": "bilinear",
        "input": "RGB, upright (EXIF orientation applied), transparent parts over white, the shorter side resized to "
                 "71 pixels (bilinear), then the central 64 x 64 pixels"}


def test_real_photographs_get_the_same_answers(beans, quick, tmp_path, capsys):
    """The bar: 128 of 128 on beans' test split, logits within 1e-4; int8 from the same graph keeps nearly all."""
    arguments = save(tmp_path, open_dataset(beans).classes, beans)      # the same model with three other classes
    result = export.main(arguments)
    assert (result["agree"], result["total"]) == (128, 128) and result["max_difference"] < 1e-4
    assert f"100.0 % (128/128)         {result['max_difference']:.1e}\nwritten: " in capsys.readouterr().out

    small = export.main([*arguments, "--int8", "--json"])
    assert json.loads(capsys.readouterr().out) == small
    assert small["file"] == str(tmp_path / "student-int8.onnx") and small["bytes"] < 0.4 * result["bytes"]
    assert small["agree"] > 100 and small["max_difference"] > result["max_difference"]
    assert "QuantizeLinear" in [node.op_type for node in onnx.load(small["file"]).graph.node]


def test_int8_is_calibrated_on_train_alone(quick, photos, monkeypatch):
    """The split that it is checked on is read only when the graph is made."""
    read: list[tuple[int, int]] = []
    read_pixels, quantize = export.read_pixels, export.quantize

    def watched(split, samples, size):
        read.extend((len(split), int(sample)) for sample in samples)
        return read_pixels(split, samples, size)

    def quantize_and_stop(*arguments):
        quantize(*arguments)
        raise TrainingFault("far enough")

    monkeypatch.setattr(export, "read_pixels", watched)
    monkeypatch.setattr(export, "quantize", quantize_and_stop)
    with pytest.raises(TrainingFault, match="far enough"):
        export.main([*quick, "--int8"])
    assert read == [(42, sample) for sample in range(42)]


def test_int8_keeps_channels_that_have_only_a_bias(photos, tmp_path):
    """BatchNorm leaves such channels in MobileNetV3. Here they hold a constant 1, which the head takes off again."""
    split = decode(open_dataset(str(photos)), size=SIZE, crop_pct=0.9, interpolation="bilinear",
                   cache_dir=tmp_path / "cache")["train"]
    strongest_colour = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Linear(6, 3))
    constant_to_red = torch.zeros(3, 3)
    constant_to_red[0] = 3
    strongest_colour.load_state_dict({
        "0.weight": torch.eye(6, 3)[:, :, None, None] + 1e-12, "0.bias": torch.tensor([2., 2., 2., 1., 1., 1.]),
        "4.weight": torch.cat([torch.eye(3), constant_to_red], 1), "4.bias": torch.tensor([-9., 0., 0.])})
    module, file = models.FromPixels(strongest_colour, PREP).eval(), tmp_path / "colours.onnx"
    pixels = export.read_pixels(split, np.arange(42), SIZE)
    expected = module(torch.from_numpy(pixels)).argmax(1).numpy()
    assert len(set(expected)) == 3
    export.write_onnx(module, SIZE, file)
    export.quantize(file, split, SIZE)
    assert (run(file, pixels).argmax(1) == expected).sum() >= 38


@pytest.mark.parametrize("int8, correct, pytorch_correct, p, difference, refused", [
    (True, 58, 64, 0.03, 0.5, True), (True, 58, 64, 0.33, 0.5, False),     # 4.7 points, which may be chance
    (True, 62, 64, 0.03, 0.5, False), (True, 70, 64, 0.03, 0.5, False),    # 1.6 points; a gain
    (False, 64, 64, 1, 3e-4, True), (False, 64, 64, 1, 1e-4, False), (False, 64, 64, 1, float("nan"), True)])
def test_an_export_that_is_not_the_model_is_refused(int8, correct, pytorch_correct, p, difference, refused):
    result = {"total": 128, "agree": 120, "split": "test", "file": "student.onnx", "correct": correct, "p": p,
              "pytorch_correct": pytorch_correct, "max_difference": difference, "largest_logit": 2.0}
    if not refused:
        return export.refuse(result, int8)
    with pytest.raises(TrainingFault, match="45.3 % of test where PyTorch has 50.0 %; student.onnx was not written"
                       if int8 else "logits differ from PyTorch's by .*; student.onnx was not written"):
        export.refuse(result, int8)


def test_a_refused_export_leaves_nothing(quick, tmp_path, monkeypatch):
    (tmp_path / "student.onnx").write_text("the one before")
    monkeypatch.setattr(export, "open_graph", lambda file: lambda pixels: run(file, pixels) + 1e-2)
    with pytest.raises(TrainingFault, match="was not written"):
        export.main(quick)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the one before"]


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "leaves"], "which the model does not know"), (["--to", "tflite"], "--to"),
    (["--int8", "--split", "train"], "--split train would flatter"),
    (["--out", "nowhere/x.onnx"], "cannot be written"), (["--out", "kd"], "--out kd: cannot be written")])
def test_bad_input_is_one_line(quick, flags, message):
    with pytest.raises(BadInput, match=message) as caught:
        export.main([*quick, *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing_is_named(quick, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=f"{missing} is not installed: pip install onnx onnxruntime onnxscript"):
        export.main(quick)
