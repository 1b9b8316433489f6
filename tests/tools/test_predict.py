"""Logits in the order of the samples; the command line against the evaluation's own logits."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from kd import BadInput, models, predict
from kd.machine import runtime
from kd.tools import predict as tool

ROOT = Path(__file__).resolve().parents[2]


def test_logits_come_in_the_order_of_the_samples_with_a_ragged_last_batch(monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 3)
    seen = []

    def read(samples: np.ndarray) -> np.ndarray:
        seen.append(samples.tolist())
        return np.broadcast_to(samples.astype(np.uint8)[:, None, None, None], (len(samples), 4, 4, 3))

    class Mean(torch.nn.Module):
        def forward(self, x):
            assert not self.training and x.shape[2:] == (2, 2)
            return torch.stack([x.mean((1, 2, 3)) * 255, -x.mean((1, 2, 3)) * 255], 1)

    prep = models.Preprocessing((0., 0., 0.), (1., 1., 1.), "bicubic", 0.5)
    logits = predict.predict(Mean().train(), read, 7, prep, 2, runtime.start("cpu", "off", "off"), "test")
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]
    assert np.allclose(logits, [[i, -i] for i in range(7)], atol=1e-5) and logits.dtype == np.float32


@pytest.fixture
def trained(tiny):
    train.main(tiny)
    return tiny


def test_the_command_gives_the_logits_of_the_evaluation(trained, photos):
    out = Path(trained.out)
    rows = tool.main([str(out / "student"), str(photos / "test"), "--top", "3", "--json", "--device", "cpu",
                      "--amp", "off"])
    assert [row["file"] for row in rows] == sorted(str(path) for path in (photos / "test").rglob("*.png"))
    result = json.loads((out / "result.json").read_text())
    right = sum(row["top"][0]["class"] == Path(row["file"]).parent.name for row in rows)
    assert (right, len(rows)) == (result["student"]["test_correct"], 12)

    model, prep, size, classes = models.open_saved(str(out / "student"))
    data = train.decode(train.open_dataset(trained.dataset, 0), size=size, crop_pct=prep.crop_pct,
                        interpolation=prep.interpolation, cache_dir=trained.cache_dir)
    logits = predict.predict(model, data.test.frames.read, 12, prep, size, runtime.start("cpu", "off", "off"), "test")
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    for row, expected in zip(rows, shares, strict=True):
        given = {one["class"]: one["probability"] for one in row["top"]}
        assert np.allclose([given[name] for name in classes], expected, rtol=1e-6)


def test_bad_input_is_one_line_and_status_2(trained, tmp_path):
    student, text = str(Path(trained.out) / "student"), tmp_path / "text.png"
    text.write_text("not a picture")
    (tmp_path / "empty").mkdir()
    for arguments, said in (([str(tmp_path / "none"), str(text)], "no saved model"),
                            ([student, str(tmp_path / "none.jpg")], "no such file or folder"),
                            ([student, str(tmp_path / "empty")], "holds no image"),
                            ([student, str(text)], "not an image"),
                            ([student], "required"), ([student, str(text), "--top", "0"], "--top 0")):
        with pytest.raises(BadInput, match=said):
            tool.main([*arguments])
    done = subprocess.run([sys.executable, "-m", "kd", "predict", student, str(text)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"kd predict: error: {text}: not an image")
