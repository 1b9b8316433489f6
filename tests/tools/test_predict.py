"""What the command says of pictures against the evaluation's own logits, and of files that are none."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kd import BadInput, models
from kd.data.frames import decode
from kd.data.table import open_dataset
from kd.machine import runtime
from kd.predict import predict
from kd.tools import predict as tool


@pytest.fixture
def student(trained) -> str:
    return f"{trained[0].out}/student"


def test_the_command_gives_the_logits_of_the_evaluation(trained, student, photos):
    config, result = trained
    rows = tool.main([student, str(photos / "test"), "--top", "3", "--json", "--device", "cpu", "--amp", "off"])
    assert [row["file"] for row in rows] == sorted(str(path) for path in (photos / "test").rglob("*.png"))
    right = sum(row["top"][0]["class"] == Path(row["file"]).parent.name for row in rows)
    assert (right, len(rows)) == (result["student"]["test_correct"], 12)

    classifier = models.open_saved(student, runtime.start("cpu", "off", "off"))
    _, prep, size, classes, _ = classifier
    splits = decode(open_dataset(config.dataset), size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                    cache_dir=config.cache_dir)
    logits = predict(classifier, splits["test"], "test")
    expected = torch.from_numpy(logits).double().softmax(1).numpy()
    for row, probabilities in zip(rows, expected, strict=True):
        given = {entry["class"]: entry["probability"] for entry in row["top"]}
        assert np.allclose([given[name] for name in classes], probabilities, rtol=1e-6)


def test_a_line_a_picture_names_the_likeliest_classes(student, photos, capsys):
    picture = photos / "test" / "blob" / "0.png"
    row, = tool.main([student, str(picture), "--top", "2"])
    first, second = row["top"]
    assert capsys.readouterr().out == (
        f"{picture}  {first['class']} {100 * first['probability']:.1f} %  "
        f"{second['class']} {100 * second['probability']:.1f} %\n")
    assert first["probability"] >= second["probability"]


def test_bad_input_is_one_line(student, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    (tmp_path / "empty").mkdir()
    for arguments, message in (([str(tmp_path / "none"), str(text)], "no saved model"),
                               ([student, str(tmp_path / "none.jpg")], "none.jpg: No such file"),
                               ([student, str(tmp_path / "empty")], "holds no picture"),
                               ([student, str(text)], "text.png: "),
                               ([student], "required"),
                               ([student, str(text), "--top", "0"], "--top 0")):
        with pytest.raises(BadInput, match=message) as caught:
            tool.main(arguments)
        assert "\n" not in str(caught.value)


def fill(folder: Path, picture: Path) -> list[str]:
    """Six pictures under odd names, junk, and five files that are no pictures; returns the six, sorted."""
    good = ["a.jpg", "b", os.fsdecode(b"caf\xe9.png"), "d.jfif", "folder.jpg/e.JPG", "folder.jpg/sub/f"]
    junk = [".DS_Store", "._a.jpg", "Thumbs.db", "__MACOSX/a.jpg", ".ipynb_checkpoints/a.jpg"]
    for name in good + junk:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / name)
    for name, content in {"empty.png": b"", "notes.txt": b"Monday\n", "zip.jpg": b"PK\3\4"}.items():
        (folder / name).write_bytes(content)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "link").symlink_to(folder / "folder.jpg")
    return good


def test_every_visible_file_of_a_folder_is_predicted_and_the_bad_ones_are_named_at_the_end(
        student, photos, tmp_path, capsys):
    picture = photos / "test" / "blob" / "0.png"
    alone = tool.main([student, str(picture), "--json"])
    good = fill(tmp_path / "folder", picture)
    capsys.readouterr()
    with pytest.raises(BadInput, match="^6 files could not be predicted; pictures predicted: 6\n") as caught:
        tool.main([student, str(tmp_path / "folder"), str(tmp_path / "typo.jpg"), "--json"])

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == [
        f"{tmp_path}/folder/{name}".replace(os.fsdecode(b"\xe9"), "\\xe9") for name in good]
    for row in rows:
        assert [entry["class"] for entry in row["top"]] == [entry["class"] for entry in alone[0]["top"]]
        assert np.allclose([entry["probability"] for entry in row["top"]],
                           [entry["probability"] for entry in alone[0]["top"]], rtol=1e-5)
    lines = str(caught.value).split("\n  ")[1:]
    assert [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in lines] == [
        "folder/empty.png", "folder/gone.jpg", "folder/link", "folder/notes.txt", "folder/zip.jpg", "typo.jpg"]
    assert "No such file" in lines[1] and "Is a directory" in lines[2]


def test_a_bad_file_changes_no_probability_of_the_others(student, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "BATCH", 2)
    pictures = sorted(map(str, (photos / "test").rglob("*.png")))
    expected = tool.main([student, *pictures, "--json"])
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    capsys.readouterr()
    with pytest.raises(BadInput, match="bad.jpg"):
        tool.main([student, *pictures[:3], str(bad), *pictures[3:], "--json"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_rows_come_while_later_pictures_are_not_yet_read(student, photos, monkeypatch, capsys):
    """A batch is on stdout before the next one is decoded."""
    monkeypatch.setattr(tool, "BATCH", 2)
    frame_of, printed = tool.frame_of, []

    def watched(*arguments):
        printed.append(capsys.readouterr().out.count("\n"))
        return frame_of(*arguments)

    monkeypatch.setattr(tool, "frame_of", watched)
    tool.main([student, *sorted(map(str, (photos / "test" / "blob").iterdir()))])
    assert printed == [0, 0, 2, 0] and capsys.readouterr().out.count("\n") == 2
