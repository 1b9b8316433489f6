"""`python -m kd`: the commands by name, and a mistake in each of them."""

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd.__main__ import COMMANDS, MODULES, main, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_command_all_are_listed(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and meaning in printed for name, meaning in COMMANDS.items())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_every_command_has_a_main_and_explains_itself(name, capsys):
    tool = importlib.import_module(MODULES.get(name, f"kd.tools.{name}"))
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    assert left.value.code == 0 and f"usage: python -m kd {name} " in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        main(["evalute"])
    printed = capsys.readouterr()
    assert left.value.code == 2 and printed.out == ""
    assert printed.err == "kd: error: evalute: no such command; did you mean evaluate?\n"


def test_a_mistake_is_one_line_on_stderr_and_status_2(trained, tmp_path):
    """In one process, because each would take seconds to import torch."""
    config, _ = trained
    student, text = f"{config.out}/student", tmp_path / "text.png"
    text.write_text("not a picture")
    mistakes = {
        "evaluate": ([student, "--dataset", "nowhere/at/all"], "--dataset nowhere/at/all: no such folder"),
        "predict": ([student, str(text)], f"{text}: a text file, not an image"),
        "export": ([student, "--dataset", config.dataset, "--to", "tflite"], "argument --to: invalid choice: 'tflite'"),
        "report": ([str(tmp_path)], f"{tmp_path}/result.json: No such file"),
        "page": ([str(tmp_path)], f"{tmp_path}/result.json: No such file"),
    }
    code = """import json, sys
from kd.__main__ import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as left:
        print(left.code)
"""
    commands = [[name, *arguments] for name, (arguments, _) in mistakes.items()]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2\n" * len(mistakes)
    lines = done.stderr.splitlines()
    assert len(lines) == len(mistakes), done.stderr
    for line, (name, (_, message)) in zip(lines, mistakes.items(), strict=True):
        assert line.startswith(f"kd {name}: error: {message}")


def test_the_module_runs_as_a_process(tmp_path):
    done = subprocess.run([sys.executable, "-m", "kd", "report", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("kd report: error: ") and "result.json: No such file" in done.stderr


def test_a_full_disk_behind_stdout_is_one_line_and_status_1():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "kd", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert (done.returncode, done.stderr) == (1, "kd: error: stdout cannot be written (No space left on device)\n")


def test_a_full_disk_behind_anything_else_is_not_blamed_on_stdout(monkeypatch, capsys):
    def full(arguments):
        print("said before")
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(importlib.import_module("kd.tools.report"), "main", full)
    with pytest.raises(SystemExit) as left:
        run(["report"])
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (1, "said before\n")
    assert said.err == "kd: error: the disk is full or failing ([Errno 28] No space left on device: '/tmp/x')\n"


def test_letters_that_the_terminal_lacks_are_escaped():
    done = subprocess.run([sys.executable, "-m", "kd", "report", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 0 and done.stderr == "" and "means \\xb1 sample standard deviations" in done.stdout
