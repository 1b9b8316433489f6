"""What the command says of pictures against the evaluation's own logits."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from kd import BadInput, models
from kd.machine import runtime
from kd.predict import predict
from kd.tools import predict as tool


def test_the_command_gives_the_logits_of_the_evaluation(trained, photos):
    config, result = trained
    student = f"{config.out}/student"
    rows = tool.main([student, str(photos / "test"), "--top", "3", "--json", "--device", "cpu", "--amp", "off"])
    assert [row["file"] for row in rows] == sorted(str(path) for path in (photos / "test").rglob("*.png"))
    right = sum(row["top"][0]["class"] == Path(row["file"]).parent.name for row in rows)
    assert (right, len(rows)) == (result["student"]["test_correct"], 12)

    model, prep, size, classes = models.open_saved(student)
    data = train.decode(train.open_dataset(config.dataset), size=size, crop_pct=prep.crop_pct,
                        interpolation=prep.interpolation, cache_dir=config.cache_dir)
    logits = predict(model, data.test.frames, prep, size, runtime.start("cpu", "off", "off"), "test")
    expected = torch.from_numpy(logits).double().softmax(1).numpy()
    for row, probabilities in zip(rows, expected, strict=True):
        given = {entry["class"]: entry["probability"] for entry in row["top"]}
        assert np.allclose([given[name] for name in classes], probabilities, rtol=1e-6)


def test_a_line_a_picture_names_the_likeliest_classes(trained, photos, capsys):
    config, _ = trained
    picture = photos / "test" / "blob" / "0.png"
    row, = tool.main([f"{config.out}/student", str(picture), "--top", "2"])
    first, second = row["top"]
    assert capsys.readouterr().out == (
        f"{picture}  {first['class']} {100 * first['probability']:.1f} %  "
        f"{second['class']} {100 * second['probability']:.1f} %\n")
    assert first["probability"] >= second["probability"]


def test_bad_input_is_one_line(trained, tmp_path):
    config, _ = trained
    student, text = f"{config.out}/student", tmp_path / "text.png"
    text.write_text("not a picture")
    (tmp_path / "empty").mkdir()
    for arguments, message in (([str(tmp_path / "none"), str(text)], "no saved model"),
                               ([student, str(tmp_path / "none.jpg")], "no such file or folder"),
                               ([student, str(tmp_path / "empty")], "holds no image"),
                               ([student, str(text)], "not an image"),
                               ([student], "required"),
                               ([student, str(text), "--top", "0"], "--top 0")):
        with pytest.raises(BadInput, match=message) as caught:
            tool.main(arguments)
        assert "\n" not in str(caught.value)
