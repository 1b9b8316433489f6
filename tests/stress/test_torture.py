"""A short version of `python -m tests.stress.torture`, which runs the full counts."""

import subprocess
import sys

from tests.stress import torture

SAID = ("40 of 40 named or read right; 0 of 68 in another's place", "16 of 16 noticed, none used", "0 of 22 executed",
        "2 of 2 places, one line and status 1, the old checkpoint loads")


def test_faults_from_outside(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.stress.torture", "--short"], env=torture.preload(tmp_path),
                          cwd=torture.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(one in done.stdout for one in SAID), done.stdout + done.stderr
