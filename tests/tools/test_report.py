"""Runs compared, against numbers worked out by hand."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from kd import BadInput
from kd.scores import mcnemar_p
from kd.tools import plots, report
from kd.tools.predictions import Predictions


def result(seed: int, student: int, control: int | None, teacher: int = 9, **settings) -> dict:
    counts = {"teacher": teacher, "control": control, "student": student}
    return {"config": {"seed": seed, "out": f"runs/{seed}", "kd_weight": 0.5, **settings}, "commit": "c",
            "environment": {"torch": "1"}, "images_per_second": 10.0 + seed, "seconds": 60.0,
            **{role: {"params": 1234, "test_accuracy": correct / 10, "test_correct": correct, "test_total": 10}
               for role, correct in counts.items() if correct is not None}}


def write_runs(folder: Path, *results: dict) -> list[str]:
    runs = [folder / f"run-{number}" for number in range(len(results))]
    for run, content in zip(runs, results, strict=True):
        run.mkdir()
        (run / "result.json").write_text(json.dumps(content))
    return list(map(str, runs))


def save_predictions(run: str, student: range, control: range, names: str = "abcdefghij", folder: str = "photos/test/b",
                     label: int = 1) -> None:
    """A predictions.npz of two classes and ten samples, all of one class, in which these samples are right."""
    logits = {role: np.eye(2)[np.where(np.isin(np.arange(10), samples), label, 1 - label)]
              for role, samples in (("teacher", student), ("control", control), ("student", student))}
    nothing = np.empty(0)
    content = Predictions(["a", "b"], np.full(10, label), [f"{folder}/{name}.jpg" for name in names], logits,
                          nothing, nothing, nothing, nothing)
    (Path(run) / "predictions.npz").write_bytes(content.to_bytes())


def test_runs_that_differ_in_the_seed_are_a_group_with_mean_and_deviation(tmp_path, capsys):
    names = write_runs(tmp_path, result(0, 7, 5), result(1, 8, 7), result(2, 6, 2), result(0, 9, None, kd_weight=0.9))
    compared = report.main([*names, "--json"])
    assert json.loads(capsys.readouterr().out) == compared
    seeds, single = compared["groups"]
    assert (seeds["n"], seeds["seeds"], single["n"], single["seeds"]) == (3, [0, 1, 2], 1, [0])
    for role, values in (("student", [.7, .8, .6]), ("control", [.5, .7, .2]), ("teacher", [.9, .9, .9]),
                         ("gain", [.2, .1, .4]),    # within each run, not of the means' spreads
                         ("headroom", [.4, .2, .7])):
        assert seeds[role] == {"n": 3, "mean": pytest.approx(statistics.fmean(values)),
                               "sd": pytest.approx(statistics.stdev(values))}
    assert single["student"] == {"n": 1, "mean": 0.9, "sd": None}
    assert single["gain"] == {"n": 0, "mean": None, "sd": None}
    assert compared["differ"] == {"kd_weight": [0.5, 0.9]}  # neither the seed nor --out

    report.main([f"{names[0]}/result.json", *names[1:]])    # a file is the run that it lies in
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [names[1], "1", "1", "90.0", "(9/10)", "70.0", "(7/10)", "80.0", "(8/10)", "+10.0", "(+1)", "1,234", "60",
            "11.0"] in printed
    assert ["1", "3", "0,1,2", *"90.0 ± 0.0 46.7 ± 25.2 70.0 ± 10.0 +23.3 ± 15.3 +43.3 ± 25.2".split()] in printed
    assert ["kd_weight", "0.5", "0.9"] in printed
    assert report.format_mean({"mean": -1e-17, "sd": None}, "+") == "+0.0"


def test_settings_that_decide_nothing_make_no_other_group(tmp_path):
    runs = write_runs(tmp_path, result(0, 7, 5, allow_weak_teacher=False), result(1, 8, 7, allow_weak_teacher=True))
    assert [group["seeds"] for group in report.main(runs)["groups"]] == [[0, 1]]


def test_the_gain_has_a_p_in_each_run_and_an_interval_over_runs_and_images(tmp_path, capsys):
    runs = write_runs(tmp_path, result(0, 6, 5), result(1, 8, 5))
    save_predictions(runs[0], range(6), range(4, 9))
    compared = report.main(runs)
    assert [row["p"] for row in compared["runs"]] == [mcnemar_p(4, 3), None]
    assert "interval" not in compared["groups"][0]["gain"]      # only where every run has it
    assert "+10.0 (+1, p = 1)" in capsys.readouterr().out
    save_predictions(runs[1], range(8), range(5))
    gain = report.main(runs)["groups"][0]["gain"]
    low, high = gain["interval"]
    assert np.isclose(gain["mean"], 0.2) and low < 0 < gain["mean"] < high
    printed = capsys.readouterr().out
    assert f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}" in printed and "p = 0.25" in printed
    assert "above 0.05 the difference is within chance" in printed


@pytest.mark.parametrize("other, same", [
    ({"folder": "/copy/of/test/b"}, True), ({"names": "abcdefghik"}, False), ({"names": "bacdefghij"}, False),
    ({"label": 0}, False)])
def test_only_runs_that_were_tested_on_the_same_pictures_have_an_interval(tmp_path, capsys, other, same):
    runs = write_runs(tmp_path, result(0, 6, 5), result(1, 8, 6))
    save_predictions(runs[0], range(6), range(5))
    save_predictions(runs[1], range(6), range(5), **other)
    group, = report.main(runs)["groups"]
    assert ("interval" in group["gain"]) == same
    assert ("note: group 1: test pictures differ: no interval" in capsys.readouterr().out) == (not same)
    assert group["gain"]["mean"] == pytest.approx(0.15)


def test_the_interval_of_the_gain_is_what_can_be_worked_out():
    assert np.allclose(report.gain_interval(np.ones((5, 40))), 1)
    # one run and images that are 1 or 0: the mean of n draws of a coin of share p
    low, high = report.gain_interval(np.repeat([[1.0, 0.0]], [100, 300], axis=1).reshape(1, 400))
    deviation = (0.25 * 0.75 / 400) ** 0.5
    assert abs(low - (0.25 - 1.96 * deviation)) < 0.005 and abs(high - (0.25 + 1.96 * deviation)) < 0.005
    # only runs differ: four runs of -1 and +1 that agree on every image
    low, high = report.gain_interval(np.array([[1.0] * 50, [1.0] * 50, [-1.0] * 50, [1.0] * 50]))
    assert low <= 0 and np.isclose(high, 1)


def test_what_a_spread_does_not_show_is_noted(tmp_path):
    larger = {**result(3, 8, None), "commit": "d"}
    for role in ("teacher", "student"):
        larger[role]["test_total"] = 11
    group, = report.main(write_runs(tmp_path, result(3, 7, None), larger))["groups"]
    assert [note.split(":")[0] for note in group["notes"]] == [
        "test pictures differ", "a seed occurs twice", "made by different commits, machines or versions"]


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), ("{", "not a run's result"), ("[]", "not a run's result"), ("{}", "KeyError('config')"),
    (json.dumps({**result(0, 7, 5), "config": {}}), "KeyError('seed')"), ("\x00\x01", "not a run's result")])
def test_what_is_not_a_result_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(BadInput, match="result.json: ") as caught:
        report.read_result(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_figure_has_a_dot_a_run_and_the_groups_names(tmp_path):
    names = write_runs(tmp_path, result(0, 7, 5), result(1, 8, 7), result(0, 9, None, kd_weight=0.9))
    report.main([*names, "--figure", str(tmp_path / "one.svg")])
    report.main([*names, "--figure", str(tmp_path / "two.svg")])
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()  # the same runs give the same bytes
    assert "(n = 2)" in drawn and "(n = 1)" in drawn and "test accuracy, %" in drawn
    dots = {role: drawn.count(f"fill: {colour}; fill-opacity: 0.6") for role, colour in plots.COLOURS.items()}
    assert dots == {"teacher": 3 + 1, "control": 2 + 1, "student": 3 + 1}  # and one in the legend
    for file in ("figure.xyz", "nowhere/figure.svg"):
        with pytest.raises(BadInput, match="--figure .*cannot be written"):
            report.main([*names, "--figure", str(tmp_path / file)])
