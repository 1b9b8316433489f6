"""What a run prints: bars, tables, and nothing under --quiet."""

import io
import os
import sys

import pytest
import torch
import train
from kd import cli
from kd.machine import console
from kd.scores import gain_lines, mcnemar_p


def test_the_table_states_counts_gain_and_headroom():
    rows = {role: {"model": "m", "test_accuracy": correct / 128, "test_correct": correct, "test_total": 128,
                   "test_macro_f1": 0.7, "params": 1234567}
            for role, correct in (("teacher", 124), ("control", 93), ("student", 96))}
    paired = {"gain": 3 / 128, "images": 3, "only_first": 5, "only_second": 2, "p": mcnemar_p(5, 2)}
    lines = console.results_table(rows, paired).splitlines()
    assert lines[3] == f"student  m{' ' * 27}75.0 %  (96/128)     0.700   1,234,567" and len(lines) == 6
    assert lines[4:] == gain_lines(rows, paired) and console.results_table(rows, None).splitlines() == lines[:4]


def test_the_confusion_matrix_of_few_classes_is_aligned_under_long_and_wide_names():
    assert console.confusion_table([(1, 1, 12), (0, 0, 3), (1, 0, 1)], ["cat", "large dog"]).splitlines() == [
        "true class  predicted as 1, 2, ...",
        "cat             3     0",
        "large dog       1    12"]
    lines = console.confusion_table([(0, 1, 7)], ["x" * 300, "猫" * 30]).splitlines()
    assert lines[1:] == ["x" * 39 + "…      0     7", "猫" * 19 + "…       0     0"]      # 猫 is two columns wide


def test_of_many_classes_the_most_frequent_confusions_are_listed():
    names = [f"class {number}" for number in range(1000)]
    right = [(number, number, 100) for number in range(1000)]
    assert console.confusion_table(right, names).startswith("0 pictures are taken for another class (true → ")
    wrong = [(3, 7, 50), (7, 3, 5), *((number, 999, 1) for number in range(30))]
    lines = console.confusion_table([*right, *wrong], names).splitlines()
    assert lines[0].startswith("85 pictures") and len(lines) == 1 + console.TABLE_CLASSES
    assert lines[1:4] == ["class 3 → class 7, 50", "class 7 → class 3, 5", "class 0 → class 999, 1"]


@pytest.mark.parametrize("quiet", [True, False])
def test_under_quiet_a_run_prints_its_result_and_nothing_else(capsys, quiet):
    def main(config):
        print("a line")
        print("a warning", file=sys.stderr)
        return {"seconds": 1}

    cli.run(main, train.Config(quiet=quiet))
    lines = ("", "") if quiet else ("a line\n", "a warning\n")
    assert capsys.readouterr() == (lines[0] + '{"seconds": 1}\n', lines[1])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_bars_even_if_it_does_not_know_its_size_and_a_file_none(monkeypatch, terminal):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    with console.progress(8, "student 2/2", initial=2) as bar:
        bar.update(2)
        console.show_loss(bar, 0, torch.tensor(0.5))
    bars = stderr.getvalue()
    assert terminal == ("student 2/2:  25%|" in bars) == ("img/s, loss=0.500]" in bars) == bool(bars)
