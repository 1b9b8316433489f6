"""What the command says of pictures against the evaluation's own logits, and of files that are none."""

import json
import os
import shutil
import subprocess
import sys
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
                               ([student, str(tmp_path / "none.jpg")], "none.jpg: No such file"),
                               ([student, str(tmp_path / "empty")], "holds no picture"),
                               ([student, str(text)], "not an image"),
                               ([student], "required"),
                               ([student, str(text), "--top", "0"], "--top 0")):
        with pytest.raises(BadInput, match=message) as caught:
            tool.main(arguments)
        assert "\n" not in str(caught.value)


def fill(folder: Path, picture: Path) -> list[str]:
    """Six pictures under odd names, junk, and four files that are no pictures; returns the six, sorted."""
    good = ["a.jpg", "b", os.fsdecode(b"caf\xe9.png"), "d.jfif", "folder.jpg/e.JPG", "folder.jpg/sub/f"]
    junk = [".DS_Store", "._a.jpg", "Thumbs.db", "__MACOSX/a.jpg", ".ipynb_checkpoints/a.jpg"]
    bad = {"empty.png": b"", "notes.txt": b"Monday\n", "zip.jpg": b"PK\3\4"}
    for name in good + junk:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, folder / name)
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "link").symlink_to(folder / "folder.jpg")
    return good


def test_every_visible_file_of_a_folder_is_predicted_and_the_bad_ones_are_named_at_the_end(
        trained, photos, tmp_path, capsys):
    config, _ = trained
    student, picture = f"{config.out}/student", photos / "test" / "blob" / "0.png"
    alone = tool.main([student, str(picture), "--json"])
    good = fill(tmp_path / "folder", picture)
    capsys.readouterr()
    with pytest.raises(BadInput, match="^6 files or .*, named above; pictures predicted: 6$"):
        tool.main([student, str(tmp_path / "folder"), str(tmp_path / "typo.jpg"), "--json"])

    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["file"] for row in rows] == [
        f"{tmp_path}/folder/{name}".replace(os.fsdecode(b"\xe9"), "\\xe9") for name in good]
    for row in rows:
        assert [entry["class"] for entry in row["top"]] == [entry["class"] for entry in alone[0]["top"]]
        assert np.allclose([entry["probability"] for entry in row["top"]],
                           [entry["probability"] for entry in alone[0]["top"]], rtol=1e-5)
    lines = printed.err.splitlines()
    assert [line.split(": ")[0].removeprefix(f"{tmp_path}/") for line in lines] == [
        "folder/empty.png", "folder/gone.jpg", "folder/link", "folder/notes.txt", "folder/zip.jpg", "typo.jpg"]
    assert "No such file" in lines[1] and "link to a folder" in lines[2] and "not an image" in lines[3]


def test_twenty_bad_files_are_named_and_all_are_counted(trained, tmp_path, capsys):
    config, _ = trained
    for number in range(23):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="^23 files .* of which the first 20 are named above; pictures predicted: 0$"):
        tool.main([f"{config.out}/student", str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / f"{number:02}.jpg") for number in range(20)]


def test_a_bad_file_changes_no_probability_of_the_others(trained, photos, tmp_path, monkeypatch, capsys):
    config, _ = trained
    monkeypatch.setattr(tool, "BATCH", 2)
    pictures = sorted(map(str, (photos / "test").rglob("*.png")))
    expected = tool.main([f"{config.out}/student", *pictures, "--json"])
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    capsys.readouterr()
    with pytest.raises(BadInput, match="bad.jpg"):
        tool.main([f"{config.out}/student", *pictures[:3], str(bad), *pictures[3:], "--json"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_rows_come_while_later_pictures_are_not_yet_read(trained, photos, monkeypatch, capsys):
    """A batch is on stdout before the next one is decoded."""
    config, _ = trained
    monkeypatch.setattr(tool, "BATCH", 2)
    read_frame, printed = tool.read_frame, []

    def watched(*arguments):
        printed.append(capsys.readouterr().out.count("\n"))
        return read_frame(*arguments)

    monkeypatch.setattr(tool, "read_frame", watched)
    tool.main([f"{config.out}/student", *sorted(map(str, (photos / "test" / "blob").iterdir()))])
    assert printed == [0, 0, 2, 0] and capsys.readouterr().out.count("\n") == 2


def test_head_ends_the_command_quietly(trained, photos):
    """The reader leaves before the first row. `kd` then ends as a program that dies of SIGPIPE, without a word."""
    config, _ = trained
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", "kd", "predict", f"{config.out}/student", str(photos / "test")],
                              cwd=Path(__file__).parents[2], stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
