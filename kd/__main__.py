"""Everything that is not training: `python -m kd COMMAND`, and `python -m kd COMMAND --help`."""

import importlib
import sys

from kd import BadInput, TrainingFault, cli

COMMANDS = {
    "predict": "what a saved model sees in photographs",
    "evaluate": "all scores of a saved model on a split of a data set",
    "export": "a saved model as ONNX, torch.export or safetensors, checked against PyTorch",
    "report": "finished runs side by side, with means, deviations and intervals",
    "page": "the page of a finished run, report.html, drawn again",
    "bench": "how fast the training loop and the loss are on this machine",
}


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
        module = importlib.import_module("kd.bench" if name == "bench" else f"kd.tools.{name}")
        module.main(arguments)
    except (BadInput, TrainingFault) as error:
        cli.fail(error, error.status, f"kd {name}" if name in COMMANDS else "kd")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
