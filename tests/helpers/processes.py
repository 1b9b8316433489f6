"""The real train.py in processes of their own, without the seconds that each would take to import the libraries.

They are forked from a server that has imported them and done nothing else.
"""

import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train"])


def start(flags: list[str], stdout: Path, stderr: Path | None = None) -> BaseProcess:
    """Start `python train.py FLAGS`, its output in files.

    `.exitcode` is then the exit status, or minus the number of the signal that ended it.
    """
    process = FORKS.Process(target=_run, args=(flags, str(stdout), str(stderr or stdout)))
    process.start()
    return process


def run(flags: list[str], stdout: Path, stderr: Path | None = None) -> int:
    """`start`, and wait for the exit status."""
    process = start(flags, stdout, stderr)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def wait_until(process: BaseProcess, happened: Callable[[], bool], seconds: float = 120) -> None:
    """Return when it happened, or the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.is_alive() and not happened():
        time.sleep(0.005)


def _run(flags: list[str], stdout: str, stderr: str) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    os.chdir(ROOT)
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")
