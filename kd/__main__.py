"""Everything that is not training: `python -m kd COMMAND`, and `python -m kd COMMAND --help`."""

import errno
import importlib
import os
import signal
import sys

from kd import DISK_FULL, BadInput, TrainingFault, cli

COMMANDS = {
    "minimal": "the idea alone: teacher, control and student on drawn leaves",
    "predict": "what a saved model sees in photographs",
    "evaluate": "all scores of a saved model on a split of a data set",
    "export": "a saved model as ONNX, checked against PyTorch",
    "report": "finished runs side by side, with means, deviations and intervals",
    "page": "the page of a finished run, report.html, drawn again",
    "bench": "how fast the training loop and the loss are on this machine",
}
MODULES = {"minimal": "kd.minimal", "bench": "kd.bench"}    # of the others: kd.tools.COMMAND


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status. A mistake that the user can mend ends the process with one line."""
    name, *arguments = argv or ["--help"]
    program = f"kd {name}" if name in COMMANDS else "kd"
    try:
        try:
            run(name, arguments)
        finally:
            sys.stdout.flush()      # here, where a failure can be told; Python itself would flush only at the very end
    except (BadInput, TrainingFault) as error:
        cli.fail(error, error.status, program)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EPIPE, *DISK_FULL):
            raise
        if not error.filename:
            # It was stdout. What it still holds would fail once more when Python ends, with a message of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # The reader has seen enough, as `head` does. Scripts with `set -o pipefail` know this status.
            return 128 + signal.SIGPIPE
        cli.fail(f"{error.filename or 'stdout'} cannot be written ({error.strerror})", TrainingFault.status, program)
    return 0


def run(name: str, arguments: list[str]) -> None:
    """Run the command of that name, or list all. Raises BadInput for an unknown one."""
    if name in ("-h", "--help"):
        print("usage: python -m kd COMMAND ...\n")
        print("\n".join(f"  {command:10} {meaning}" for command, meaning in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise BadInput(f"{name}: no such command{cli.nearest(name, list(COMMANDS))}")
    # imported here, because most tools load libraries that the others do without
    importlib.import_module(MODULES.get(name, f"kd.tools.{name}")).main(arguments)


if __name__ == "__main__":
    cli.escape_unknown_letters()
    sys.exit(main(sys.argv[1:]))
