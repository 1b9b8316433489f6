"""Exported graphs against the model they came from, on pictures; what cannot be exported, in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import timm
import torch

import train
from kd import BadInput, TrainingFault, models
from kd.tools import export
from kd.data.sources import open_dataset
from kd.data.frames import decode

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64
# odd on purpose: a graph that normalised with anybody's usual mean and std would be found out
PREP = models.Preprocessing((0.31, 0.42, 0.53), (0.21, 0.32, 0.43), "bilinear", 0.9)


def save(folder: Path, name: str, classes: tuple[str, ...]) -> Path:
    """A model whose running statistics are not those it began with, so that BatchNorm does something."""
    torch.manual_seed(0)
    model = models.create("student", name, classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
        # random features are near each other: answers should hang on the picture
        model.get_submodule("classifier").weight.mul_(10)  # type: ignore[operator]
    models.save(model, folder, classes, PREP, SIZE, "---\n---\n")
    return folder


@pytest.fixture
def saved(photos, tmp_path) -> list[str]:
    """The arguments that name a small saved model and its data."""
    folder = save(tmp_path / "student", "test_efficientnet", ("blob", "plain", "stripes"))
    return [str(folder), "--dataset", str(photos), "--cache-dir", str(tmp_path / "cache")]


def run(file: Path, pixels: np.ndarray) -> np.ndarray:
    import onnxruntime
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]


def test_the_onnx_graph_takes_bare_pixels_of_any_batch(saved, capsys):
    result = export.main([*saved, "--to", "onnx", "--json"])
    assert json.loads(capsys.readouterr().out) == result
    file = Path(saved[0]).parent / "student.onnx"
    assert result["file"] == str(file) and result["bytes"] == file.stat().st_size
    assert (result["agree"], result["total"], result["split"]) == (12, 12, "test")
    assert result["max_difference"] < 1e-4 and result["ms"] > 0 and result["pytorch_ms"] > 0
    # what timm makes of the folder, with what timm normalises by
    model = timm.create_model(f"local-dir:{saved[0]}", pretrained=True).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, SIZE, SIZE), np.uint8)
    mean, std = (torch.tensor(one)[:, None, None] for one in (PREP.mean, PREP.std))
    with torch.no_grad():
        expected = model((torch.from_numpy(pixels) / 255 - mean) / std).numpy()
    for count in (1, 2, 5):
        given = run(file, pixels[:count])
        assert given.dtype == np.float32 and np.abs(given - expected[:count]).max() < 1e-4
    import onnx
    proto = onnx.load(file)
    about = {one.key: one.value for one in proto.metadata_props}
    assert json.loads(about["labels"]) == ["blob", "plain", "stripes"]
    assert (about["architecture"], about["size"], about["resize"], about["interpolation"]) == (
        "test_efficientnet", "64", "71", "bilinear")
    assert [one.name for one in proto.graph.input] == ["pixels"]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert sorted(path.name for path in file.parent.iterdir()) == ["cache", "student", "student.onnx"]


def test_torch_export_and_safetensors_are_the_model_to_the_bit(saved, tmp_path, capsys):
    result = export.main([*saved, "--to", "torch-export"])
    assert result["agree"] == 12 and result["max_difference"] < 1e-6
    extra = {"about.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=extra)
    assert program.module()(torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (3, 3)
    assert json.loads(json.loads(extra["about.json"])["labels"]) == ["blob", "plain", "stripes"]
    result = export.main([*saved, "--to", "safetensors", "--out", str(tmp_path / "weights.safetensors")])
    assert result["agree"] == 12 and result["max_difference"] < 1e-6
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mean"]) == list(PREP.mean)
        assert json.loads(file.metadata()["std"]) == list(PREP.std)
    again = models.create("model", "test_efficientnet", ("a", "b", "c"), str(tmp_path / "weights.safetensors"))
    assert models.digest(again) == models.digest(models.open_saved(saved[0])[0])
    said = capsys.readouterr().out
    assert "100.0 % (12/12)" in said and f"written: {tmp_path / 'weights.safetensors'}" in said


def test_real_photographs_get_the_same_answers(beans, tmp_path):
    """The bar: 128 of 128 on beans' test split, logits within 1e-4; int8 from the same graph keeps nearly all."""
    folder = save(tmp_path / "student", "mobilenetv2_100", open_dataset(beans).classes)
    given = [str(folder), "--dataset", beans, "--cache-dir", str(tmp_path / "cache"), "--to", "onnx"]
    result = export.main(given)
    assert (result["agree"], result["total"]) == (128, 128) and result["max_difference"] < 1e-4
    small = export.main([*given, "--int8"])
    assert small["file"] == str(tmp_path / "student-int8.onnx") and small["bytes"] < 0.4 * result["bytes"]
    assert small["agree"] > 100 and small["max_difference"] > result["max_difference"]
    assert small["pytorch_correct"] == result["correct"]
    import onnx
    kinds = [node.op_type for node in onnx.load(small["file"]).graph.node]
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    assert {one.key for one in onnx.load(small["file"]).metadata_props} >= {"labels", "size", "resize"}


def test_calibration_sees_train_alone(saved, photos, tmp_path, monkeypatch):
    prep_data = decode(open_dataset(str(photos)), size=SIZE, crop_pct=0.9, interpolation="bilinear",
                       cache_dir=tmp_path / "cache")
    read: list[tuple[str, int]] = []
    pixels_of = export.pixels_of

    def watched(split, samples, size):
        read.extend((split.frames.digest, int(sample)) for sample in samples)
        return pixels_of(split, samples, size)

    monkeypatch.setattr(export, "pixels_of", watched)
    monkeypatch.setattr(export, "compare", lambda *_: pytest.fail("calibrated") if not read else stop())

    def stop():
        raise TrainingFault("far enough")

    with pytest.raises(TrainingFault, match="far enough"):
        export.main([*saved, "--to", "onnx", "--int8"])
    assert read == [(prep_data.train.frames.digest, sample) for sample in range(42)]


def test_an_export_that_differs_is_refused_and_leaves_nothing(saved, tmp_path, monkeypatch):
    (tmp_path / "student.onnx").write_text("the one before")
    honest = export.by_onnxruntime
    for wrong in (1e-2, np.nan):
        monkeypatch.setattr(export, "by_onnxruntime", lambda file: lambda pixels: honest(file)(pixels) + wrong)
        with pytest.raises(TrainingFault, match="logits differ from PyTorch's by .* was not written"):
            export.main([*saved, "--to", "onnx"])
    assert (tmp_path / "student.onnx").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "student", "student.onnx"]


def test_bad_input_is_one_line_and_status_2(saved, tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    for arguments, said in (([str(tmp_path / "none"), *saved[1:], "--to", "onnx"], "no saved model"),
                            ([saved[0], "--dataset", "leaves", *saved[3:], "--to", "onnx"], "its classes"),
                            ([*saved, "--to", "tflite"], "--to"),
                            ([*saved], "--to"),
                            ([*saved, "--to", "torch-export", "--int8"], "--int8: only with --to onnx"),
                            ([*saved, "--to", "onnx", "--int8", "--split", "train"], "--split train would flatter"),
                            ([*saved, "--to", "onnx", "--out", str(tmp_path / "no" / "x.onnx")], "cannot be written"),
                            ([*saved, "--to", "onnx", "--out", str(folder)], "is a folder")):
        with pytest.raises(BadInput, match=said):
            export.main(arguments)
    done = subprocess.run([sys.executable, "-m", "kd", "export", *saved, "--to", "tflite"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("kd export: error: ")
    for missing in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(BadInput, match="pip install onnx onnxruntime onnxscript"):
                export.main([*saved, "--to", "onnx"])


def test_a_trained_student_keeps_its_scores(tiny):
    result = train.main(tiny)
    found = export.main([f"{tiny.out}/student", "--dataset", tiny.dataset, "--cache-dir", tiny.cache_dir, "--to",
                         "onnx"])
    assert (found["correct"], found["pytorch_correct"]) == (result["student"]["test_correct"],) * 2
