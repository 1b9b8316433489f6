"""How far the teacher is above a control: the same models and pictures as in the run, for a shorter time."""

import dataclasses
import signal
from pathlib import Path

import pytest

import train
from kd import BadInput
from kd.bench import probe
from kd.machine.signals import Stopped
from tests.helpers import toy
from tests.helpers.runs import command_line


@pytest.mark.parametrize("others", [0, 20])
def test_teacher_and_control_are_those_of_the_run_and_test_stays_unseen(tiny, tmp_path, capsys, monkeypatch, others):
    config = dataclasses.replace(tiny, epochs=2, teacher_epochs=1, select="last", labels=9)
    if others:      # they make the control's epochs longer
        folder = toy.class_folders(tmp_path / "others", {"": {"any": others}})
        config = dataclasses.replace(config, unlabelled=str(folder))
    run = train.main(dataclasses.replace(config, control=True, out=str(tmp_path / "whole")))
    capsys.readouterr()
    found, short_run = [], probe.short_run

    def remembered(*arguments):
        found.append(short_run(*arguments))
        return found[-1]

    monkeypatch.setattr(probe, "short_run", remembered)
    probe.main(["--minutes", "1", *command_line(config)])
    for probed, role in (("teacher", "teacher"), ("student", "control")):
        assert found[-1][probed]["loss"] == run[role]["loss"]
    printed = capsys.readouterr().out
    teacher, control = (run[role]["validation_accuracy"] for role in ("teacher", "control"))
    assert printed.splitlines()[:3] == [
        f"teacher test_resnet: {100 * teacher:.1f} % ({teacher * 12:.0f}/12) on validation, after 1 of 1 epochs of "
        "fine-tuning",
        f"control test_efficientnet: {100 * control:.1f} % ({control * 12:.0f}/12) on validation, after 2 of 2 epochs",
        f"headroom {100 * (teacher - control):+.1f} points, as far as this short run shows; one picture is 8.3"]
    assert "test " not in printed and not Path(config.out).exists()


def timed(student: float, teacher: float | None) -> dict:
    seconds = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    return {"seconds_an_epoch": seconds}


@pytest.mark.parametrize("student, teacher, epochs", [
    (1.0, 1.0, (30, 8)),            # the teacher needs 8 s, and the control gets the other 52
    (10.0, 10.0, (3, 3)),           # half each
    (1.0, 100.0, (30, 1)),          # at least one epoch
    (4.0, None, (15, 0))])          # a teacher that is not tuned
def test_the_time_is_shared_by_teacher_and_control(student, teacher, epochs):
    config = train.Config(epochs=30, teacher_epochs=0 if teacher is None else 8)
    assert probe.affordable(config, timed(student, teacher), 60) == epochs


def test_what_is_left_out_of_a_shorter_run_and_a_teacher_without_use_are_said():
    found = {"teacher": {"validation_accuracy": 0.5}, "student": {"validation_accuracy": 0.625},
             "validation_pictures": 40}
    assert probe.report(train.Config(epochs=30, teacher_epochs=0), found, 3, 0) == [
        "teacher resnet50: 50.0 % (20/40) on validation, as loaded",
        "control mobilenetv2_100: 62.5 % (25/40) on validation, after 3 of 30 epochs",
        "headroom -12.5 points, as far as this short run shows; one picture is 2.5",
        "a longer run lifts the control, which leaves less of it",
        "so far this teacher has nothing to give: tune it longer, take another, or train without"]
    assert probe.report(train.Config(epochs=3, teacher_epochs=8), found, 3, 2)[3] == (
        "longer fine-tuning may lift the teacher, which adds to it")


def test_mistakes_are_refused(tiny, tmp_path, monkeypatch):
    others = dataclasses.replace(tiny, unlabelled=str(tmp_path / "others"))
    with pytest.raises(BadInput, match="^--unlabelled: nothing learns from pictures without labels at --kd-weight 0"):
        probe.main(command_line(dataclasses.replace(others, kd_weight=0.0)))
    (tmp_path / "others").mkdir()
    with pytest.raises(BadInput, match="^--unlabelled .*others"):
        probe.main(command_line(others))
    for minutes in ("0.0", "inf", "nan"):
        with pytest.raises(BadInput, match=f"^--minutes {minutes}: must be above 0, and finite$"):
            probe.main(["--minutes", minutes])
    with pytest.raises(BadInput, match="^unknown argument --epoch; did you mean --epochs"):
        probe.main(["--epoch", "3"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="^probe: runs in one process; start it without torchrun$"):
        probe.main([])


def test_a_stopped_probe_is_one_line_and_the_status_of_the_signal(monkeypatch, capsys):
    def stopped(*arguments):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(probe, "short_run", stopped)
    with pytest.raises(SystemExit) as left:
        probe.main([])
    assert left.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "kd probe: error: stopped; nothing is kept\n"
