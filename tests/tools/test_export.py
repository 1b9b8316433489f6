"""Exported graphs against the model they came from, on pictures; what cannot be exported, in one line."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors
import timm
import torch

from kd import BadInput, TrainingFault, models
from kd.data.frames import decode
from kd.data.sources import open_dataset
from kd.tools import export

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


def save_small(folder: Path, photos: Path) -> list[str]:
    """Save a small model in `folder`; returns the arguments that name it and its data."""
    saved = save(folder / "student", "test_efficientnet", ("blob", "plain", "stripes"))
    return [str(saved), "--dataset", str(photos), "--cache-dir", str(folder / "cache")]


@pytest.fixture
def saved(photos, tmp_path) -> list[str]:
    return save_small(tmp_path, photos)


class Exported(NamedTuple):
    """An ONNX export of the small model."""

    folder: Path
    result: dict
    printed: str


@pytest.fixture(scope="module")
def exported(photos, tmp_path_factory) -> Exported:
    folder, printed = tmp_path_factory.mktemp("exported"), io.StringIO()
    arguments = save_small(folder, photos)
    with contextlib.redirect_stdout(printed):
        result = export.main([*arguments, "--to", "onnx", "--json"])
    return Exported(folder, result, printed.getvalue())


def reuse(monkeypatch, graph: Path) -> None:
    """Have `--to onnx` take this graph of the same model, because torch's exporter takes seconds."""
    def write(module, size, metadata, file: Path) -> export.Logits:
        shutil.copy(graph, file)
        return export.onnx_logits(file)

    monkeypatch.setitem(export.FORMATS, "onnx", export.Format(".onnx", write))


def run(file: Path, pixels: np.ndarray) -> np.ndarray:
    import onnxruntime
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]


def test_the_onnx_graph_takes_bare_pixels_of_any_batch(exported):
    result = exported.result
    assert json.loads(exported.printed.splitlines()[-1]) == result
    file = exported.folder / "student.onnx"
    assert result["file"] == str(file) and result["bytes"] == file.stat().st_size
    assert (result["agree"], result["total"], result["split"]) == (12, 12, "test")
    assert result["max_difference"] < 1e-4 and result["ms"] > 0 and result["pytorch_ms"] > 0
    # what timm makes of the folder, with what timm normalises by
    model = timm.create_model(f"local-dir:{exported.folder / 'student'}", pretrained=True).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, SIZE, SIZE), np.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREP.mean, PREP.std))
    with torch.no_grad():
        expected = model((torch.from_numpy(pixels) / 255 - mean) / std).numpy()
    for count in (1, 2, 5):
        given = run(file, pixels[:count])
        assert given.dtype == np.float32 and np.abs(given - expected[:count]).max() < 1e-4
    import onnx
    proto = onnx.load(file)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["labels"]) == ["blob", "plain", "stripes"]
    assert (metadata["architecture"], metadata["size"], metadata["resize"], metadata["interpolation"]) == (
        "test_efficientnet", "64", "71", "bilinear")
    assert metadata["input"] == (
        "RGB, upright (EXIF orientation applied), transparent parts over white, the shorter side resized to 71 pixels "
        "(bilinear), then the central 64 x 64 pixels")
    assert [entry.name for entry in proto.graph.input] == ["pixels"]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert sorted(path.name for path in exported.folder.iterdir()) == ["cache", "student", "student.onnx"]


def test_torch_export_and_safetensors_are_the_model_to_the_bit(saved, tmp_path, capsys):
    result = export.main([*saved, "--to", "torch-export"])
    assert result["agree"] == 12 and result["max_difference"] < 1e-6
    extra = {"about.json": ""}
    program = torch.export.load(tmp_path / "student.pt2", extra_files=extra)
    assert program.module()(torch.zeros(3, 3, SIZE, SIZE, dtype=torch.uint8)).shape == (3, 3)
    assert json.loads(json.loads(extra["about.json"])["labels"]) == ["blob", "plain", "stripes"]
    result = export.main([*saved, "--to", "safetensors", "--out", str(tmp_path / "weights.safetensors")])
    assert result["agree"] == 12 and result["max_difference"] < 1e-6
    (tmp_path / "any").write_text("a file as the user's umask makes it")
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mean"]) == list(PREP.mean)
        assert json.loads(file.metadata()["std"]) == list(PREP.std)
    again = models.create("model", "test_efficientnet", ("a", "b", "c"), str(tmp_path / "weights.safetensors"))
    assert models.digest(again) == models.digest(models.open_saved(saved[0])[0])
    printed = capsys.readouterr().out
    assert "100.0 % (12/12)" in printed and f"written: {tmp_path / 'weights.safetensors'}" in printed


def test_real_photographs_get_the_same_answers(beans, tmp_path, monkeypatch):
    """The bar: 128 of 128 on beans' test split, logits within 1e-4; int8 from the same graph keeps nearly all."""
    folder = save(tmp_path / "student", "mobilenetv2_100", open_dataset(beans).classes)
    arguments = [str(folder), "--dataset", beans, "--cache-dir", str(tmp_path / "cache"), "--to", "onnx"]
    result = export.main(arguments)
    assert (result["agree"], result["total"]) == (128, 128) and result["max_difference"] < 1e-4

    reuse(monkeypatch, tmp_path / "student.onnx")
    # another test compares all settings
    monkeypatch.setattr(export, "INT8_SETTINGS", dict([next(iter(export.INT8_SETTINGS.items()))]))
    small = export.main([*arguments, "--int8"])
    assert small["settings"] in export.INT8_SETTINGS
    assert small["file"] == str(tmp_path / "student-int8.onnx") and small["bytes"] < 0.4 * result["bytes"]
    assert small["agree"] > 100 and small["max_difference"] > result["max_difference"]
    assert small["pytorch_correct"] == result["correct"]
    import onnx
    kinds = [node.op_type for node in onnx.load(small["file"]).graph.node]
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    assert {entry.key for entry in onnx.load(small["file"]).metadata_props} >= {"labels", "size", "resize"}


def test_int8_is_calibrated_and_chosen_on_train_alone(saved, exported, photos, tmp_path, monkeypatch):
    """The split that it is checked on is read only once the settings are chosen."""
    data = decode(open_dataset(str(photos)), size=SIZE, crop_pct=0.9, interpolation="bilinear",
                  cache_dir=tmp_path / "cache")
    read: list[tuple[str, int]] = []
    read_pixels, quantize = export.read_pixels, export.quantize

    def watched(split, samples, size):
        read.extend((split.frames.digest, int(sample)) for sample in samples)
        return read_pixels(split, samples, size)

    def quantize_and_stop(*arguments):
        quantize(*arguments)
        raise TrainingFault("far enough")

    reuse(monkeypatch, exported.folder / "student.onnx")
    monkeypatch.setattr(export, "read_pixels", watched)
    monkeypatch.setattr(export, "quantize", quantize_and_stop)
    with pytest.raises(TrainingFault, match="far enough"):
        export.main([*saved, "--to", "onnx", "--int8"])
    assert set(read) == {(data.train.frames.digest, sample) for sample in range(42)}


class ColoursBesideDeadChannels(torch.nn.Module):
    """Which of red, green and blue is strongest, of a graph with channels that have a bias and almost no weight.

    BatchNorm leaves such channels in MobileNetV3. What they hold is a constant, here 1, which the head takes off again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 6, 1), torch.nn.Linear(6, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(6, 3)[:, :, None, None] + 1e-12)
            self.conv.bias.copy_(torch.tensor([2., 2., 2., 1., 1., 1.]))  # type: ignore[union-attr]
            self.head.weight.copy_(torch.cat([torch.eye(3), 3 * torch.tensor([[1.], [0.], [0.]]).expand(3, 3)], 1))
            self.head.bias.copy_(torch.tensor([-9., 0., 0.]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def test_int8_takes_the_settings_that_suit_the_network(photos, tmp_path):
    data = decode(open_dataset(str(photos)), size=SIZE, crop_pct=0.9, interpolation="bilinear",
                  cache_dir=tmp_path / "cache")
    module = models.FromPixels(ColoursBesideDeadChannels(), PREP).eval()
    export.write_onnx(module, SIZE, {"labels": "[]"}, tmp_path / "colours.onnx")
    pytorch, everything = export.torch_logits(module), np.arange(42)
    pixels = export.read_pixels(data.train, everything, SIZE)
    assert len(set(pytorch(pixels).argmax(1).tolist())) == 3

    logits, settings = export.quantize(tmp_path / "colours.onnx", pytorch, data.train, SIZE, tmp_path / "int8.onnx")
    first, *others = export.INT8_SETTINGS
    assert settings in others
    assert (logits(pixels).argmax(1) == pytorch(pixels).argmax(1)).sum() >= 38
    # the first settings lose the constant, and with it one of the three answers
    export.quantize_once(tmp_path / "prepared.onnx", data.train, everything, SIZE, first, tmp_path / "first.onnx")
    assert 0 not in run(tmp_path / "first.onnx", pixels).argmax(1)


def counts(total: int, only_pytorch_correct: int, only_correct: int) -> dict:
    """A comparison in which both are right on half of the pictures, and one of them on these."""
    return {"total": total, "agree": total - only_pytorch_correct - only_correct, "split": "test", "settings": "s",
            "correct": total // 2 + only_correct, "pytorch_correct": total // 2 + only_pytorch_correct,
            "only_correct": only_correct, "only_pytorch_correct": only_pytorch_correct, "max_difference": 0.5,
            "largest_logit": 1.0}


@pytest.mark.parametrize("total, only_pytorch_correct, only_correct, refused", [
    (12, 6, 0, True),           # half of all; p = 0.031
    (12, 5, 0, False),          # p = 0.0625: five pictures may be chance
    (128, 6, 0, True),          # 4.7 points, p = 0.031
    (128, 16, 10, False),       # the same loss, but p = 0.33
    (5000, 80, 0, False),       # 1.6 points, not by chance: small
    (5000, 120, 10, True),      # 2.2 points
    (5000, 10, 120, False)])    # a gain
def test_int8_is_refused_for_a_loss_of_two_points_that_is_not_chance(total, only_pytorch_correct, only_correct,
                                                                     refused):
    result = counts(total, only_pytorch_correct, only_correct)
    with pytest.raises(TrainingFault, match="--force keeps it") if refused else contextlib.nullcontext():
        export.refuse_inaccurate(result, Path("student.onnx"))


def test_a_refused_int8_file_is_not_written_unless_forced(saved, exported, tmp_path, monkeypatch, capsys):
    reuse(monkeypatch, exported.folder / "student.onnx")

    def quantize(file, pytorch, split, size, out):
        shutil.copy(file, out)
        return export.onnx_logits(out), "some settings"

    monkeypatch.setattr(export, "quantize", quantize)
    monkeypatch.setattr(export, "compare", lambda *_: counts(128, 12, 2) | {"settings": "some settings"})
    with pytest.raises(TrainingFault) as caught:
        export.main([*saved, "--to", "onnx", "--int8"])
    assert str(caught.value) == ("--int8: 51.6 % of test where PyTorch has 59.4 % (some settings); "
                                 f"{tmp_path}/student-int8.onnx was not written, --force keeps it")
    assert caught.value.status == 1 and not (tmp_path / "student-int8.onnx").exists()

    export.main([*saved, "--to", "onnx", "--int8", "--force"])
    assert (tmp_path / "student-int8.onnx").exists()
    assert "\nint8: some settings; exact McNemar p of the loss = 0.013\n" in capsys.readouterr().out
    monkeypatch.setattr(export, "compare", lambda *_: counts(128, 16, 10) | {"settings": "some settings"})
    export.main([*saved, "--to", "onnx", "--int8"])
    assert "p of the loss = 0.33: within chance on so few pictures\n" in capsys.readouterr().out


def test_an_export_that_differs_is_refused_and_leaves_nothing(saved, exported, tmp_path, monkeypatch):
    (tmp_path / "student.onnx").write_text("the one before")
    reuse(monkeypatch, exported.folder / "student.onnx")
    onnx_logits = export.onnx_logits
    for error in (1e-2, np.nan):
        monkeypatch.setattr(export, "onnx_logits", lambda file: lambda pixels: onnx_logits(file)(pixels) + error)
        with pytest.raises(TrainingFault, match="logits differ from PyTorch's by .* was not written"):
            export.main([*saved, "--to", "onnx"])
    assert (tmp_path / "student.onnx").read_text() == "the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "student", "student.onnx"]


def test_bad_input_is_one_line(saved, tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    for arguments, message in (
            ([str(tmp_path / "none"), *saved[1:], "--to", "onnx"], "no saved model"),
            ([saved[0], "--dataset", "leaves", *saved[3:], "--to", "onnx"], "which the model does not know"),
            ([*saved, "--to", "tflite"], "--to"),
            ([*saved], "--to"),
            ([*saved, "--to", "torch-export", "--int8"], "--int8: only with --to onnx"),
            ([*saved, "--to", "onnx", "--force"], "--force: only with --int8"),
            ([*saved, "--to", "onnx", "--out", "/dev/null"], "is a device or a pipe"),
            ([*saved, "--to", "onnx", "--int8", "--split", "train"], "--split train would flatter"),
            ([*saved, "--to", "onnx", "--out", str(tmp_path / "no" / "x.onnx")], "cannot be written"),
            ([*saved, "--to", "onnx", "--out", str(folder)], "is a folder")):
        with pytest.raises(BadInput, match=message) as caught:
            export.main(arguments)
        assert "\n" not in str(caught.value)
    for missing in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(BadInput, match="pip install onnx onnxruntime onnxscript"):
                export.main([*saved, "--to", "onnx"])


def test_a_trained_student_keeps_its_scores(trained, tmp_path):
    config, result = trained
    found = export.main([f"{config.out}/student", "--dataset", config.dataset, "--cache-dir", config.cache_dir,
                         "--to", "onnx", "--out", str(tmp_path / "student.onnx")])
    assert (found["correct"], found["pytorch_correct"]) == (result["student"]["test_correct"],) * 2
