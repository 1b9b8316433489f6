"""The real train.py in processes of their own, without the seconds that each would take to import the libraries.

They are forked from a server that has imported them and done nothing else.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Callable, NamedTuple

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


class Done(NamedTuple):
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str


def torchrun(folder: Path, ranks: int, module: str, *arguments: str, restarts: int = 0) -> Done:
    """`torchrun --standalone --nproc-per-node=RANKS --max-restarts=RESTARTS -m MODULE ARGUMENTS`, a thread a rank.

    torchrun's own agent starts, watches and restarts the ranks. It and they are forked, too. Output goes through files
    in `folder`.
    """
    number = len(list(folder.glob("agent-*")))
    stdout, stderr = folder / f"agent-{number}.out", folder / f"agent-{number}.err"
    process = FORKS.Process(target=_agent, args=(ranks, module, arguments, restarts, str(stdout), str(stderr)))
    process.start()
    process.join(150)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"not over after 150 s: {stderr.read_text()}")
    return Done(process.exitcode, stdout.read_text(), stderr.read_text())


def wait_until(process: BaseProcess, happened: Callable[[], bool], seconds: float = 120) -> None:
    """Return when it happened, or the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.is_alive() and not happened():
        time.sleep(0.005)


def _agent(ranks: int, module: str, arguments: tuple[str, ...], restarts: int, stdout: str, stderr: str) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    _redirect(stdout, stderr)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", run_id="test", max_restarts=restarts, monitor_interval=0.1,
                          start_method="fork")
    try:
        elastic_launch(config, _rank)(module, arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)


def _rank(module: str, arguments: tuple[str, ...]) -> None:
    import torch
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)   # the agent's handlers are not for its ranks
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run(flags: list[str], stdout: str, stderr: str) -> None:
    _redirect(stdout, stderr)
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")


def _redirect(stdout: str, stderr: str) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    os.chdir(ROOT)
