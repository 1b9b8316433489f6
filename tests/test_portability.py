"""What Windows, macOS and old terminals lack, and what other versions of the libraries may lack."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import command_line

ROOT = Path(__file__).resolve().parents[1]
CP1252 = {**os.environ, "PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0", "LC_ALL": "C",
          "PYTHONCOERCECLOCALE": "0"}


def test_a_run_does_without_what_only_unix_has(trained, tmp_path):
    """Two runs in one process, of which the second replaces the first."""
    config, expected = trained
    config = dataclasses.replace(config, out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))
    flags = command_line(config)
    done = subprocess.run([sys.executable, "-X", "warn_default_encoding", "tests/helpers/other_system.py", *flags, "--",
                           *flags, "--overwrite"], cwd=ROOT, env=CP1252, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    lines = done.stdout.decode("cp1252").splitlines()
    first, second = (json.loads(line) for line in lines if line.startswith("{"))
    assert json.loads((tmp_path / "run" / "result.json").read_text("utf-8")) == second
    for role in ("teacher", "student"):
        assert first[role] == second[role] == expected[role]
    assert (first["teacher_batches"], second["teacher_batches"]) == (expected["teacher_batches"], 0)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("command, said", [
    (["train.py", "--help"], "loss = (1 - \\u03bb)·CE(student, labels) + \\u03bb·T²·KL"),
    (["-m", "kd", "report", "--help"], "means ± sample standard deviations")])
def test_help_goes_through_a_pipe_of_western_windows(command, said):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=CP1252, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and said in " ".join(done.stdout.decode("cp1252").split())


@pytest.mark.parametrize("path", [*(ROOT / "kd").rglob("*.py"), ROOT / "train.py"], ids=lambda path: path.name)
def test_the_syntax_is_that_of_python_3_10(path):
    ast.parse(path.read_text("utf-8"), feature_version=(3, 10))
