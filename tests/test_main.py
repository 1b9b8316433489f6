"""`python -m kd`: the commands by name, and a mistake in each of them."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd.__main__ import COMMANDS, MODULES, main

ROOT = Path(__file__).resolve().parents[1]


def kd(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m kd` as a process."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True}
    settings |= options
    return subprocess.run([sys.executable, "-m", "kd", *arguments], **settings)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_command_all_are_listed(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and meaning in printed for name, meaning in COMMANDS.items())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in MODULES])
def test_every_tool_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0 and f"usage: python -m kd {name} " in capsys.readouterr().out


def test_a_mistake_is_one_line_on_stderr_and_status_2(trained, tmp_path, capsys):
    config, _ = trained
    student, text = f"{config.out}/student", tmp_path / "text.png"
    text.write_text("not a picture")
    absent = f"{tmp_path}/result.json: No such file"
    for arguments, message in (
            (["evalute"], "kd: error: evalute: no such command; did you mean evaluate?"),
            (["evaluate", student, "--dataset", "nowhere/at/all"], "kd evaluate: error: --dataset nowhere/at/all: "),
            (["predict", student, str(text)], f"kd predict: error: {text}: "),
            (["export", student, "--to", "tflite"], "kd export: error: argument --to: invalid choice: 'tflite'"),
            (["report", str(tmp_path)], f"kd report: error: {absent}"),
            (["page", str(tmp_path)], f"kd page: error: {absent}")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        printed = capsys.readouterr()
        assert left.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        assert printed.err.startswith(message)


def test_the_module_runs_as_a_process(tmp_path):
    done = kd("report", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_reader_that_leaves_ends_the_command_quietly():
    """As a program that dies of SIGPIPE, without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = kd("--help", stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_stdout_is_one_line_and_status_1():
    with open("/dev/full", "w") as full:
        done = kd("--help", stdout=full)
    assert (done.returncode, done.stderr) == (1, "kd: error: stdout cannot be written (No space left on device)\n")


def test_a_full_disk_behind_a_file_is_not_blamed_on_stdout(monkeypatch, capsys):
    def full(arguments):
        print("said before")
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(importlib.import_module("kd.tools.report"), "main", full)
    with pytest.raises(SystemExit) as left:
        main(["report"])
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (1, "said before\n")
    assert said.err == "kd report: error: /tmp/x cannot be written (No space left on device)\n"


def test_letters_that_the_terminal_lacks_are_escaped():
    done = kd("report", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 0 and done.stderr == "" and "means \\xb1 sample standard deviations" in done.stdout
