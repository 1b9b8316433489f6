"""One run of an experiment, by the command that it prints: `python train.py FLAGS`."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Sequence

from kd.tools.predictions import FILE


def train(flags: Sequence[str], out: Path, cache_dir: str) -> None:
    """Make the run in the folder `out`, or go on with it where it was stopped. What it says goes to `out`.log.

    A run that has ended says so and is left alone. One that was made by other flags is refused. Raises SystemExit where
    the run does not end well, so that no later run learns from half a teacher.
    """
    command = [sys.executable, "train.py", *flags, "--out", str(out), "--cache-dir", cache_dir, "--resume"]
    print(shlex.join(command), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{out}.log")
    with open(log, "a", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=file).returncode
    if status:
        raise SystemExit(f"{out}: stopped with status {status}; {log} says why")


def must_have_ended(out: Path) -> None:
    """Raises SystemExit where a run has not ended whose models another one needs."""
    if not (out / "result.json").exists() or not (out / FILE).exists():
        raise SystemExit(f"{out}: make this run first, because its teacher or its control is needed")
