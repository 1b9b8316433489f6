"""Runs compared, against numbers worked out by hand."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from kd import BadInput
from kd.scores import compare_paired, mcnemar_p
from kd.tools import report
from kd.tools.predictions import Predictions


def result(seed: int, student: int, control: int | None, teacher: int = 9, **settings) -> dict:
    def row(correct: int) -> dict:
        return {"model": "m", "params": 1234, "test_accuracy": correct / 10, "test_correct": correct, "test_total": 10,
                "test_macro_f1": correct / 10}

    made = {"teacher": row(teacher), "student": row(student), "images_per_second": 10.0 + seed, "seconds": 60.0,
            "config": {"seed": seed, "out": f"runs/{seed}", "kd_weight": 0.5, **settings},
            "environment": {"torch": "1"}, "commit": "c"}
    return made if control is None else {**made, "control": row(control)}


def write_runs(folder: Path, **results: dict) -> list[str]:
    for name, content in results.items():
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(content))
    return [str(folder / name) for name in results]


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
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(names[1]))
    assert row.split()[1:] == ["1", "1", "90.0", "(9/10)", "70.0", "(7/10)", "80.0", "(8/10)", "+10.0", "(+1)", "1,234",
                               "60", "11.0"]
    assert report.format_mean({"mean": -1e-17, "sd": None}, "+") == "+0.0"
    assert "70.0 ± 10.0" in printed and "46.7 ± 25.2" in printed and "+23.3 ± 15.3" in printed
    differ = next(line for line in printed.splitlines() if line.startswith("kd_weight"))
    assert differ.split() == ["kd_weight", "0.5", "0.9"]


def test_settings_that_decide_nothing_make_no_other_group(tmp_path):
    runs = write_runs(tmp_path, a=result(0, 7, 5, allow_weak_teacher=False), b=result(1, 8, 7, allow_weak_teacher=True))
    assert [group["seeds"] for group in report.main([*runs, "--json"])["groups"]] == [[0, 1]]


def save_predictions(run: str, right: dict[str, list[int]], names: str = "abcdefghij", folder: str = "photos/test/b",
                     label: int = 1) -> Predictions:
    """A predictions.npz of two classes and ten samples, all of one class, in which these samples are right."""
    logits = {role: np.eye(2)[np.where(np.isin(np.arange(10), samples), label, 1 - label)]
              for role, samples in right.items()}
    nothing = np.empty(0)
    logits["teacher"] = logits["student"]
    content = Predictions(["a", "b"], np.full(10, label), [f"{folder}/{name}.jpg" for name in names], logits,
                          nothing, nothing, nothing, nothing)
    (Path(run) / "predictions.npz").write_bytes(content.to_bytes())
    return content


def test_the_gain_has_an_interval_over_runs_and_images(tmp_path, capsys):
    runs = write_runs(tmp_path, a=result(0, 6, 5), b=result(1, 8, 6))
    save_predictions(runs[0], {"student": [0, 1, 2, 3, 4, 5], "control": [0, 1, 2, 3, 9]})
    assert "interval" not in report.main([*runs, "--json"])["groups"][0]["gain"]  # only where every run has it
    save_predictions(runs[1], {"student": [0, 1, 2, 3, 4, 5, 6, 7], "control": [0, 1, 2, 3, 4, 9]})
    first = report.read_by_image(Path(runs[0]), result(0, 6, 5))
    assert first is not None and first.gains is not None and first.gains.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, -1]
    assert first.images == [(f"{name}.jpg", "b") for name in "abcdefghij"]
    by_file = report.read_by_image(Path(runs[0]) / "result.json", result(0, 6, 5))      # as the help allows
    assert by_file is not None and by_file.images == first.images
    gain = report.main(runs)["groups"][0]["gain"]
    low, high = gain["interval"]
    assert np.isclose(gain["mean"], 0.15) and low < 0 < gain["mean"] < high
    assert f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("other, same", [
    ({"folder": "/copy/of/test/b"}, True), ({"names": "abcdefghik"}, False), ({"names": "bacdefghij"}, False),
    ({"label": 0}, False)])
def test_only_runs_that_were_tested_on_the_same_pictures_have_an_interval(tmp_path, capsys, other, same):
    runs = write_runs(tmp_path, a=result(0, 6, 5), b=result(1, 8, 6))
    right = {"student": [0, 1, 2, 3, 4, 5], "control": [0, 1, 2, 3, 9]}
    save_predictions(runs[0], right)
    save_predictions(runs[1], right, **other)
    group, = report.main(runs)["groups"]
    assert ("interval" in group["gain"]) == same
    assert ("note: group 1: test pictures differ: no interval" in capsys.readouterr().out) == (not same)
    assert group["gain"]["mean"] == pytest.approx(0.15)


def test_means_over_test_sets_of_other_sizes_are_noted_also_without_predictions(tmp_path, capsys):
    larger = result(1, 8, None)
    larger["student"]["test_total"] = larger["teacher"]["test_total"] = 11
    report.main(write_runs(tmp_path, a=result(0, 7, None), b=larger))
    assert "note: group 1: test pictures differ" in capsys.readouterr().out


def test_names_are_compared_below_the_folder_that_they_share():
    below = report.below_common_folder
    assert below(["/data/test/cat/1.jpg", "/data/test/dog/1.jpg"]) == ["cat/1.jpg", "dog/1.jpg"]
    assert below(["test/cat/1.jpg", "test/cats/1.jpg"]) == ["cat/1.jpg", "cats/1.jpg"]
    assert below(["owner/beans test row 0 (a.jpg)", "owner/beans test row 1"]) == [
        "beans test row 0 (a.jpg)", "beans test row 1"]
    assert below(["a/1.jpg"]) == ["1.jpg"] and below(["1.jpg", "a/2.jpg"]) == ["1.jpg", "a/2.jpg"] and below([]) == []


def test_the_gain_of_a_run_has_the_p_of_its_images_or_else_of_its_result(tmp_path, capsys):
    paired = {"gain": 0.1, "images": 1, "only_first": 4, "only_second": 3, "p": 0.875}
    runs = write_runs(tmp_path, a=result(0, 6, 5), b={**result(1, 6, 5), "gain": paired}, c=result(2, 6, 5),
                      d=result(3, 6, None))
    content = save_predictions(runs[0], {"student": [0, 1, 2, 3, 4, 5], "control": [0, 1, 2, 3, 9]})
    rows = report.main(runs)["runs"]
    expected = compare_paired(content.logits["student"], content.logits["control"], content.labels)["p"]
    assert expected == mcnemar_p(2, 1) == 1
    assert [row["p"] for row in rows] == [expected, 0.875, None, None]
    printed = capsys.readouterr().out
    assert "+10.0 (+1, p = 1)" in printed and "+10.0 (+1, p = 0.88)" in printed and "+10.0 (+1) " in printed
    assert "above 0.05 the difference is within chance" in printed
    report.main(runs[2:])
    assert "within chance" not in capsys.readouterr().out


def test_the_headroom_of_a_group_is_teacher_minus_control_within_each_run(tmp_path, capsys):
    runs = write_runs(tmp_path, a=result(0, 7, 5), b=result(1, 8, 7, teacher=10), c=result(2, 6, None))
    compared = report.main(runs)
    assert [row["headroom"] for row in compared["runs"]] == [pytest.approx(0.4), pytest.approx(0.3), None]
    headroom = compared["groups"][0]["headroom"]
    assert headroom == {"n": 2, "mean": pytest.approx(0.35), "sd": pytest.approx(statistics.stdev([0.4, 0.3]))}
    assert "+35.0 ± 7.1 (n = 2)" in capsys.readouterr().out


def test_a_damaged_gain_is_named(tmp_path):
    run, = write_runs(tmp_path, a={**result(0, 7, 5), "gain": {}})
    with pytest.raises(BadInput, match="lacks 'p'"):
        report.read_result(Path(run))


def test_the_interval_of_the_gain_is_what_can_be_worked_out():
    assert np.allclose(report.gain_interval(np.ones((5, 40))), 1)
    # one run and images that are 1 or 0: the mean of n draws of a coin of share p
    low, high = report.gain_interval(np.repeat([[1.0, 0.0]], [100, 300], axis=1).reshape(1, 400))
    deviation = (0.25 * 0.75 / 400) ** 0.5
    assert abs(low - (0.25 - 1.96 * deviation)) < 0.005 and abs(high - (0.25 + 1.96 * deviation)) < 0.005
    # only runs differ: four runs of -1 and +1 that agree on every image
    low, high = report.gain_interval(np.array([[1.0] * 50, [1.0] * 50, [-1.0] * 50, [1.0] * 50]))
    assert low <= 0 and np.isclose(high, 1)


def test_what_a_spread_does_not_show_is_noted(tmp_path, capsys):
    twin = {**result(3, 7, 5), "commit": "d", "environment": {"torch": "2"}}
    report.main(write_runs(tmp_path, a=result(3, 7, 5), b=twin))
    printed = capsys.readouterr().out
    assert "note: group 1: a seed occurs twice" in printed
    assert "different commits" in printed and "different machines or versions" in printed
    assert "nothing but the seed" in printed


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), ("{", "not readable as a result"), ("[]", "not a run's result"),
    ("{}", "lacks 'teacher'"), (json.dumps({"teacher": 3}), "not a run's result"),
    (json.dumps({**result(0, 7, 5), "config": {}}), "lacks 'seed'"), ("\x00\x01", "not readable")])
def test_what_is_not_a_result_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(BadInput, match="result.json: ") as caught:
        report.read_result(tmp_path)
    assert message in str(caught.value)


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
    for arguments, message in (([str(tmp_path)], "result.json: No such file"), ([names[0]] * 2, "given twice"),
                               ([], "arguments are required: RUN")):
        with pytest.raises(BadInput, match=message) as caught:
            report.main(arguments)
        assert "\n" not in str(caught.value)
