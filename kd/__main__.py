"""Everything that is not training: `python -m kd COMMAND`, and `python -m kd COMMAND --help`."""

import errno
import importlib
import os
import signal
import sys

from kd import DISK_FULL, BadInput, TrainingFault, cli

COMMANDS = {
    "predict": "what a saved model sees in photographs",
    "evaluate": "all scores of a saved model on a split of a data set",
    "export": "a saved model as ONNX, torch.export or safetensors, checked against PyTorch",
    "probe": "how far a teacher is above a control, after some minutes",
    "report": "finished runs side by side, with means, deviations and intervals",
    "page": "the page of a finished run, report.html, drawn again",
    "bench": "how fast the training loop and the loss are on this machine",
}

MODULES = {"bench": "kd.bench", "probe": "kd.bench.probe"}      # both run train.py; the tools do without it


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m kd COMMAND ...\n")
        print("\n".join(f"  {name:10} {meaning}" for name, meaning in COMMANDS.items()))
        return 0
    name, *arguments = argv
    try:
        if name not in COMMANDS:
            raise BadInput(f"{name}: no such command{cli.nearest(name, list(COMMANDS))}")
        # imported here, because most tools load libraries that the others do without
        importlib.import_module(MODULES.get(name, f"kd.tools.{name}")).main(arguments)
    except (BadInput, TrainingFault) as error:
        cli.fail(error, error.status, f"kd {name}" if name in COMMANDS else "kd")
    return 0


def run(argv: list[str]) -> int:
    """`main`, also where stdout does not take everything. Returns the exit status."""
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()      # here, where a failure can be told; Python itself would flush only at the very end
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EPIPE, *DISK_FULL):
            raise
        if error.filename:      # an error of stdout names no file
            cli.fail(f"the disk is full or failing ({error})", TrainingFault.status, "kd")
        # What stdout still holds would fail once more when Python ends, with a message of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            # The reader has seen enough, as `head` does. A shell shows 141 for cat or grep that end in this way, since
            # they die of SIGPIPE (13, which Windows lacks), and scripts with `set -o pipefail` know that status.
            return 128 + 13
        cli.fail(f"stdout cannot be written ({error.strerror})", TrainingFault.status, "kd")


if __name__ == "__main__":
    cli.escape_unknown_letters()
    sys.exit(run(sys.argv[1:]))
