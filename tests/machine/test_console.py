"""What a run prints: colours, bars, tables, and nothing under --quiet."""

import dataclasses
import json
import os
import pty
from pathlib import Path
from threading import Thread

import pytest

import train
from kd import cli
from kd.machine import console
from kd.scores import gain_lines, mcnemar_p
from tests.helpers import processes
from tests.helpers.runs import command_line

ENTRY = {"role": "student", "epoch": 2, "train_loss": 0.5, "accuracy": 0.75, "macro_f1": 0.7, "loss": 0.6,
         "images_per_second": 12.0}


class Stdout:
    """A stdout that says it is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal, no_color, coloured", [
    (True, None, True), (True, "", True), (True, "1", False), (False, None, False)])
def test_colours_only_on_a_terminal_and_not_under_no_color(monkeypatch, terminal, no_color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(console.sys, "stdout", Stdout(terminal))
    line = console.epoch_line(ENTRY, 10, True)
    assert line.endswith("\x1b[32m  *\x1b[0m" if coloured else "img/s  *") and ("\x1b" in line) == coloured
    assert "\x1b" not in console.epoch_line(ENTRY, 10, False)


def test_the_table_states_counts_gain_and_headroom():
    def row(correct: int) -> dict:
        return {"model": "m", "test_accuracy": correct / 128, "test_correct": correct, "test_total": 128,
                "test_macro_f1": 0.7, "params": 1234567}

    rows = {"teacher": row(124), "control": row(93), "student": row(96)}
    paired = {"gain": 3 / 128, "images": 3, "only_first": 5, "only_second": 2, "p": mcnemar_p(5, 2)}
    lines = console.results_table(rows, paired).splitlines()
    assert lines[-3].startswith("student ") and "75.0 %  (96/128)     0.700   1,234,567" in lines[-3]
    assert lines[-2:] == gain_lines(rows, paired)
    del rows["control"]
    assert console.results_table(rows, None).splitlines() == [lines[0], lines[1], lines[3]]


def test_the_confusion_matrix_of_few_classes_is_whole():
    assert console.confusion_table([[3, 0], [1, 12]], ["cat", "large dog"]).splitlines() == [
        "true class  predicted as 1, 2, ...",
        "cat             3     0",
        "large dog       1    12"]


def test_the_confusion_matrix_of_many_classes_says_how_many_are_left_out_and_where_they_are():
    confusion = [[10 * (row == column) for column in range(23)] for row in range(23)]
    lines = console.confusion_table(confusion, [f"class {number}" for number in range(23)]).splitlines()
    assert len(lines) == 22 and lines[20].split() == ["class", "19", *["0"] * 19, "10"]
    assert lines[21].startswith("... and 3 more classes: ")
    assert "result.json" in lines[21] and "evaluate --json" in lines[21]
    assert "more classes" not in console.confusion_table([[1] * 20] * 20, list("abcdefghijklmnopqrst"))


def test_the_confusion_matrix_stays_aligned_under_long_and_wide_names():
    lines = console.confusion_table([[1, 2, 3]] * 3, ["x" * 300, "猫" * 30, "dog"]).splitlines()
    counts = "      1     2     3"
    assert lines[1] == "x" * 39 + "…" + counts
    assert lines[2] == "猫" * 19 + "… " + counts      # each of these letters is two columns wide
    assert lines[3] == "dog" + " " * 37 + counts


def test_a_quiet_run_prints_its_result_and_nothing_else(tiny, tmp_path, capfd):
    quiet = dataclasses.replace(tiny, quiet=True)
    assert processes.run(command_line(quiet), tmp_path / "stdout", tmp_path / "stderr") == 0
    printed = (tmp_path / "stdout").read_text()
    assert (tmp_path / "stderr").read_text() == "" and printed.count("\n") == 1
    assert json.loads(printed) == json.loads((Path(tiny.out) / "result.json").read_text())

    with pytest.raises(SystemExit) as left:
        cli.run(train.main, quiet)
    printed_here = capfd.readouterr()
    assert left.value.code == 2 and printed_here.out == "" and printed_here.err.count("\n") == 1
    assert printed_here.err.startswith("train.py: error: --out ") and "holds another run" in printed_here.err


def test_a_terminal_sees_bars_of_every_part_and_a_file_none(tiny, tmp_path):
    terminal, end = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:  # all the time, because a terminal that nobody reads makes its writer wait
        try:
            while chunk := os.read(terminal, 65536):
                chunks.append(chunk)
        except OSError:  # Linux says so when the last writer has gone
            pass

    reader = Thread(target=read)
    reader.start()
    try:
        assert processes.run(command_line(tiny), tmp_path / "stdout", Path(os.ttyname(end))) == 0
    finally:
        os.close(end)
        reader.join()
        os.close(terminal)
    printed, bars = (tmp_path / "stdout").read_text(), b"".join(chunks).decode()
    for label in ("decoding", "teacher 1/1", "teacher validation", "teacher test", "student 2/2", "student validation",
                  "student test"):
        assert label in bars
    assert "img/s" in bars and "%|" in bars  # rate and time left, though this terminal has no size
    # stdout is no terminal: no bar and no colour
    assert "%|" not in printed and "\x1b" not in printed and "  *" in printed
    first = next(line for line in printed.splitlines() if line.startswith("cpu ("))
    for fact in ("threads), fp32", "42 + 12 + 12 pictures", "3 classes, 32 px", "teacher test_resnet (",
                 "student test_efficientnet ("):
        assert fact in first
