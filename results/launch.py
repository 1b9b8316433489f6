"""One run of an experiment, by the command that it prints: `python train.py FLAGS`."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Sequence


def has_ended(out: Path) -> bool:
    """Whether the run in this folder has nothing left to do but its page."""
    return (out / "result.json").exists()


def train(flags: Sequence[str], out: Path, cache_dir: str) -> None:
    """Make the run in the folder `out`, or go on with it where it was stopped. What it says goes to `out`.log."""
    command = [sys.executable, "train.py", *flags, "--out", str(out), "--cache-dir", cache_dir, "--resume"]
    print(shlex.join(command), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log)
