"""How far a teacher is above a control, after some minutes: `python -m kd probe [--minutes 5] [train.py's flags]`.

What a student gains from its teacher is mostly bounded by that distance, the headroom. A long run is worth its time
where there is some.

The teacher is fine-tuned and the control is trained by `train.main`, as in the run that the flags describe, but for
fewer epochs. Both figures are of validation. Nothing is shown of the test split.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from kd import BadInput, cli
from kd.machine.signals import Stopped


def main(argv: list[str]) -> None:
    """Print teacher, control and headroom. Raises BadInput as train.py does."""
    import train

    parser = cli.OneLineParser(prog="python -m kd probe", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter,
                               epilog="All other flags are those of train.py: python train.py --help")
    parser.add_argument("--minutes", type=float, default=5.0,
                        help="of training, for both together, after a first epoch of each that is timed (default: 5)")
    own, flags = parser.parse_known_args(argv)
    if cli.ranks() > 1:
        raise BadInput("probe: runs in one process; start it without torchrun")
    if not 0 < own.minutes < math.inf:
        raise BadInput(f"--minutes {own.minutes}: must be above 0, and finite")
    cfg = cli.parse_config(train.Config, train.RECIPES, flags, train.__doc__ or "")

    try:
        with tempfile.TemporaryDirectory() as folder:
            # One epoch of each says how long an epoch takes.
            first = short_run(cfg, 1, 1, Path(folder) / "timed")
            epochs, teacher_epochs = affordable(cfg, first, 60 * own.minutes)
            found = first
            if (epochs, teacher_epochs) != (1, min(1, cfg.teacher_epochs)):
                found = short_run(cfg, epochs, teacher_epochs, Path(folder) / "probe")
    except Stopped as stopped:
        cli.fail("stopped; nothing is kept", stopped.status, "kd probe")
    print("\n".join(report(cfg, found, epochs, teacher_epochs)))


def short_run(cfg: Any, epochs: int, teacher_epochs: int, out: Path) -> dict[str, Any]:
    """The result of `train.main` with the teacher of `cfg`, and with its control in the place of the student.

    It also has the seconds that an epoch of each took, and the number of validation pictures.
    """
    import train
    shortened = dataclasses.replace(
        cfg, epochs=epochs, teacher_epochs=min(teacher_epochs, cfg.teacher_epochs), allow_weak_teacher=True,
        out=str(out), resume=False, overwrite=False, push_to_hub="")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        result = train.main(shortened, control_only=True)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = {entry["role"]: entry["seconds"] for entry in map(json.loads, lines)}     # of the last epoch of each
    data = json.loads((out / "config.json").read_text(encoding="utf-8"))["data"]
    return {**result, "seconds_an_epoch": seconds,
            "validation_pictures": data["splits"]["validation"]["pictures"]}


def affordable(cfg: Any, timed: dict[str, Any], seconds: float) -> tuple[int, int]:
    """Epochs of the control and of the teacher that take `seconds` together, half each; at most those of `cfg`.

    What the shorter one leaves goes to the other.
    """
    an_epoch = timed["seconds_an_epoch"]
    wanted = {role: epochs * an_epoch.get(role, 0.0)
              for role, epochs in (("student", cfg.epochs), ("teacher", cfg.teacher_epochs))}
    given = {role: max(seconds / 2, seconds - wanted[other])
             for role, other in (("student", "teacher"), ("teacher", "student"))}
    epochs = {role: max(1, int(given[role] / an_epoch[role])) if an_epoch.get(role) else 0 for role in given}
    return min(epochs["student"], cfg.epochs), min(epochs["teacher"], cfg.teacher_epochs)


def report(cfg: Any, found: dict[str, Any], epochs: int, teacher_epochs: int) -> list[str]:
    """The lines to print."""
    teacher, control = (found[role]["validation_accuracy"] for role in ("teacher", "student"))
    pictures = found["validation_pictures"]

    def share(accuracy: float) -> str:
        return f"{100 * accuracy:.1f} % ({round(accuracy * pictures)}/{pictures}) on validation"

    tuned = f"after {teacher_epochs} of {cfg.teacher_epochs} epochs of fine-tuning"
    tuned = tuned if cfg.teacher_epochs else "as loaded"
    lines = [f"teacher {cfg.teacher}: {share(teacher)}, {tuned}",
             f"control {cfg.student}: {share(control)}, after {epochs} of {cfg.epochs} epochs",
             f"headroom {100 * (teacher - control):+.1f} points, as far as this short run shows; one picture is "
             f"{100 / pictures:.1f}"]
    if epochs < cfg.epochs:
        lines.append("a longer run lifts the control, which leaves less of it")
    if teacher_epochs < cfg.teacher_epochs:
        lines.append("longer fine-tuning may lift the teacher, which adds to it")
    if teacher <= control:
        lines.append("so far this teacher has nothing to give: tune it longer, take another, or train without")
    return lines
