"""The console's colours and bars, a quiet run, and runs compared: against numbers worked out by hand."""

import dataclasses
import json
import os
import pty
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from kd import BadInput, cli
from kd.machine import console
from kd.tools import report
from tests.stress.torture import command_line

ROOT = Path(__file__).resolve().parents[2]
ENTRY = {"role": "student", "epoch": 2, "train_loss": 0.5, "accuracy": 0.75, "macro_f1": 0.7, "loss": 0.6,
         "images_per_second": 12.0}


def result(seed: int, student: int, control: int | None, teacher: int = 9, **settings) -> dict:
    def row(correct: int) -> dict:
        return {"model": "m", "params": 1234, "test_accuracy": correct / 10, "test_correct": correct, "test_total": 10,
                "test_macro_f1": correct / 10}

    made = {"teacher": row(teacher), "student": row(student), "images_per_second": 10.0 + seed, "seconds": 60.0,
            "config": {"seed": seed, "out": f"runs/{seed}", "kd_weight": 0.5, **settings},
            "environment": {"torch": "1"}, "commit": "c"}
    return made if control is None else {**made, "control": row(control)}


def write_runs(folder: Path, **results: dict) -> list[str]:
    for name, one in results.items():
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(one))
    return [str(folder / name) for name in results]


class Terminal:
    """A stdout that says it is a terminal, or not."""

    def __init__(self, real: bool) -> None:
        self.isatty = lambda: real


@pytest.mark.parametrize("terminal, no_color, coloured", [
    (True, None, True), (True, "", True), (True, "1", False), (False, None, False)])
def test_colours_only_on_a_terminal_and_not_under_no_color(monkeypatch, terminal, no_color, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(console.sys, "stdout", Terminal(terminal))
    line = console.epoch_line(ENTRY, 10, True)
    assert line.endswith("\x1b[32m  *\x1b[0m" if coloured else "img/s  *") and ("\x1b" in line) == coloured
    assert "\x1b" not in console.epoch_line(ENTRY, 10, False)
    rows = {role: result(0, 7, 5)[role] for role in ("teacher", "control", "student")}
    told = console.table(rows).splitlines()[-1]
    assert ("\x1b[32m+20.0 points\x1b[0m" in told) == coloured and "(+2 images of 10)" in told
    rows["student"] = result(0, 4, 5)["student"]
    assert ("\x1b[31m-10.0 points\x1b[0m" in console.table(rows)) == coloured


def test_a_quiet_run_prints_its_result_and_nothing_else(tiny, capfd):
    done = subprocess.run([sys.executable, "train.py", *command_line(dataclasses.replace(tiny, quiet=True))], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == json.loads((Path(tiny.out) / "result.json").read_text())
    with pytest.raises(SystemExit) as left:
        cli.run(train.main, dataclasses.replace(tiny, quiet=True))
    said = capfd.readouterr()
    assert left.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("train.py: error: --out ") and "holds another run" in said.err


def test_a_terminal_sees_bars_of_every_part_and_a_file_none(tiny):
    above, below = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, "train.py", *command_line(tiny)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=below, env=environment)
    os.close(below)
    shown = b""
    try:
        while part := os.read(above, 65536):
            shown += part
    except OSError:  # Linux says so when the last writer has gone
        pass
    assert process.stdout is not None
    said, bars = str(process.stdout.read(), "utf-8"), str(shown, "utf-8")
    assert process.wait() == 0
    for label in ("decoding", "teacher 1/1", "teacher validation", "teacher test", "student 2/2", "student validation",
                  "student test"):
        assert label in bars
    assert "img/s" in bars and "%|" in bars  # rate and time left, though this terminal has no size
    assert "%|" not in said and "\x1b" not in said and "  *" in said  # stdout is no terminal: no bar and no colour
    first = next(line for line in said.splitlines() if line.startswith("cpu ("))
    for fact in ("threads), fp32", "42 + 12 + 12 pictures", "3 classes, 32 px", "teacher test_resnet (",
                 "student test_efficientnet ("):
        assert fact in first


def test_runs_that_differ_in_the_seed_are_a_group_with_mean_and_deviation(tmp_path, capsys):
    names = write_runs(tmp_path, a=result(0, 7, 5), b=result(1, 8, 7), c=result(2, 6, 2),
                       d=result(0, 9, None, kd_weight=0.9))
    compared = report.main([*names, "--json"])
    assert json.loads(capsys.readouterr().out) == compared
    seeds, single = compared["groups"]
    assert (seeds["n"], seeds["seeds"], single["n"], single["seeds"]) == (3, [0, 1, 2], 1, [0])
    for role, values in (("student", [.7, .8, .6]), ("control", [.5, .7, .2]), ("teacher", [.9, .9, .9]),
                         ("gain", [.2, .1, .4])):  # the gain: within each run, not of the means' spreads
        assert seeds[role]["n"] == 3
        assert seeds[role]["mean"] == pytest.approx(sum(values) / 3)
        assert seeds[role]["sd"] == pytest.approx(statistics.stdev(values))
    assert single["student"] == {"n": 1, "mean": 0.9, "sd": None}
    assert single["gain"] == {"n": 0, "mean": None, "sd": None}
    assert compared["differ"] == {"kd_weight": [0.5, 0.9]}  # neither the seed nor --out
    report.main(names)
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith(names[1]))
    assert row.split()[1:] == ["1", "1", "90.0", "(9/10)", "70.0", "(7/10)", "80.0", "(8/10)", "+10.0", "(+1)", "1,234",
                               "60", "11.0"]
    assert report.around({"mean": -1e-17, "sd": None}, "+") == "+0.0"
    assert "70.0 ± 10.0" in said and "46.7 ± 25.2" in said and "+23.3 ± 15.3" in said
    differ = next(line for line in said.splitlines() if line.startswith("kd_weight"))
    assert differ.split() == ["kd_weight", "0.5", "0.9"]


def keep(run: str, right: dict[str, list[int]]) -> None:
    """A predictions.npz of two classes in which these samples of ten are right."""
    logits: dict = {role: np.eye(2)[np.isin(np.arange(10), ones).astype(int)] for role, ones in right.items()}
    np.savez(Path(run) / "predictions.npz", labels=np.ones(10, np.int64), classes=np.array(["a", "b"]),
             names=np.array(list("abcdefghij")), pictures=np.empty(0), shown=np.empty(0), views=np.empty(0),
             view_labels=np.empty(0), teacher=logits["student"], **logits)


def test_the_gain_has_an_interval_over_runs_and_images(tmp_path, capsys):
    runs = write_runs(tmp_path, a=result(0, 6, 5), b=result(1, 8, 6))
    keep(runs[0], {"student": [0, 1, 2, 3, 4, 5], "control": [0, 1, 2, 3, 9]})
    assert "interval" not in report.main([*runs, "--json"])["groups"][0]["gain"]  # only where every run has it
    keep(runs[1], {"student": [0, 1, 2, 3, 4, 5, 6, 7], "control": [0, 1, 2, 3, 4, 9]})
    first = report.gains(Path(runs[0]), result(0, 6, 5))
    assert first is not None and first.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, -1]
    gain = report.main(runs)["groups"][0]["gain"]
    low, high = gain["interval"]
    assert np.isclose(gain["mean"], 0.15) and low < 0 < gain["mean"] < high
    assert f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}" in capsys.readouterr().out


def test_the_bootstrap_knows_what_can_be_worked_out():
    assert np.allclose(report.bootstrap(np.ones((5, 40))), 1)
    # one run and images that are 1 or 0: the mean of n draws of a coin of share p
    low, high = report.bootstrap(np.repeat([[1.0, 0.0]], [100, 300], axis=1).reshape(1, 400))
    deviation = (0.25 * 0.75 / 400) ** 0.5
    assert abs(low - (0.25 - 1.96 * deviation)) < 0.005 and abs(high - (0.25 + 1.96 * deviation)) < 0.005
    # what differs between runs alone: five runs of -1 and +1 that agree on every image
    low, high = report.bootstrap(np.array([[1.0] * 50, [1.0] * 50, [-1.0] * 50, [1.0] * 50]))
    assert low <= 0 and np.isclose(high, 1)


def test_what_a_spread_does_not_show_is_noted(tmp_path, capsys):
    twin = {**result(3, 7, 5), "commit": "d", "environment": {"torch": "2"}}
    report.main(write_runs(tmp_path, a=result(3, 7, 5), b=twin))
    said = capsys.readouterr().out
    assert "note: group 1: a seed occurs twice" in said
    assert "different commits" in said and "different machines or versions" in said
    assert "nothing but the seed" in said


@pytest.mark.parametrize("content, told", [
    (None, "No such file"), ("{", "not readable as a result"), ("[]", "not a run's result"),
    ("{}", "lacks 'teacher'"), (json.dumps({"teacher": 3}), "not a run's result"),
    (json.dumps({**result(0, 7, 5), "config": {}}), "lacks 'seed'"), ("\x00\x01", "not readable")])
def test_what_is_not_a_result_is_named(tmp_path, content, told):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(BadInput, match="result.json: ") as caught:
        report.read_result(tmp_path)
    assert told in str(caught.value)


def test_the_figure_has_a_dot_a_run_and_the_groups_names(tmp_path):
    names = write_runs(tmp_path, a=result(0, 7, 5), b=result(1, 8, 7), d=result(0, 9, None, kd_weight=0.9))
    report.main([*names, "--figure", str(tmp_path / "one.svg")])
    report.main([*names, "--figure", str(tmp_path / "two.svg")])
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()  # the same runs give the same bytes
    assert "(n = 2)" in drawn and "(n = 1)" in drawn and "test accuracy, %" in drawn
    dots = {role: drawn.count(f"fill: {colour}; fill-opacity: 0.6") for role, colour in report.COLOURS.items()}
    assert dots == {"teacher": 3 + 1, "control": 2 + 1, "student": 3 + 1}  # and one in the legend
    for file in ("figure.xyz", "nowhere/figure.svg"):
        with pytest.raises(BadInput, match="--figure .*cannot be written"):
            report.main([*names, "--figure", str(tmp_path / file)])


def test_the_command_takes_folders_and_files_and_refuses_in_one_line(tmp_path, capsys):
    names = write_runs(tmp_path, a=result(0, 7, 5))
    report.main([names[0] + "/result.json"])
    assert "70.0 (7/10)" in capsys.readouterr().out
    for arguments, told in (([str(tmp_path)], "result.json: No such file"), ([names[0]] * 2, "given twice"),
                            ([], "arguments are required: RUN")):
        with pytest.raises(BadInput, match=told):
            report.main(arguments)
    done = subprocess.run([sys.executable, "-m", "kd", "report", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("kd report: error: ") and "result.json: No such file" in done.stderr
