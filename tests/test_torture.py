"""A short version of `python -m tests.torture`, which runs the full counts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name, count, said", [
    ("pictures", 0, "40 of 40 named or read right; 0 of 68 in another's place"),
    ("bits", 16, "16 of 16 noticed, none used"),
    ("pickles", 0, "0 of 22 executed"),
    ("full", 2, "2 of 2 places, one line and status 1, the old checkpoint loads"),
    ("kills", 1, "runs end bit-identical")])
def test_faults_from_outside(name, count, said):
    line = [sys.executable, "-m", "tests.torture", "--only", name, *(["--count", str(count)] if count else [])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
