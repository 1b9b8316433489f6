"""The runs behind "The methods" in results/README.md.

    python -m results.methods tune    --data FOLDER --teacher-weights FILE --out FOLDER --cache-dir FOLDER
    python -m results.methods compare --data FOLDER --teacher-weights FILE --out FOLDER --cache-dir FOLDER

Caltech-101 at 64 px: all labels of train, a MobileNetV2 from random weights, and one teacher for all runs. That is the
teacher of the first control. `tune` gives each method three values of one setting, in half as long a run of another
seed, and prints its accuracy on validation. `compare` makes the runs of the table with the best of them.

It makes each run by the command that it prints, one after another. A run that has ended is left alone, and one that was
stopped goes on. The weights of the last epoch are tested.
"""

import argparse
import json
from pathlib import Path

from results import launch

SHARED = ["--recipe", "few", "--size", "64", "--teacher-lr", "3e-4"]
EPOCHS, TUNING_EPOCHS, TEACHER_EPOCHS = 20, 10, 12
TUNING_SEED = 100

# what each method is called in the table, its flags, and the setting that `tune` varies
KD = ["--method", "kd", "--kd-weight", "0.9"]
METHODS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "kd": (KD, "--temperature", ("1", "2", "4")),
    "kd-standardised": ([*KD, "--standardise"], "--temperature", ("1", "2", "4")),
    "hard": (["--method", "hard"], "--kd-weight", ("0.5", "0.9", "1")),
    "dkd": (["--method", "dkd", "--kd-weight", "0.5"], "--temperature", ("1", "2", "4")),
    "dist": (["--method", "dist", "--kd-weight", "0.5"], "--temperature", ("1", "2", "4")),
    "nkd": (["--method", "nkd", "--kd-weight", "0.5"], "--temperature", ("1", "2", "4")),
    "pkt": (["--method", "pkt"], "--kd-weight", ("0.1", "0.5", "0.9")),
    "rkd": (["--method", "rkd"], "--kd-weight", ("0.1", "0.5", "0.9")),
    "simkd": (["--method", "simkd"], "--kd-weight", ("0.5", "0.9", "1")),
}
CONTROLS = {"control": ["--kd-weight", "0"], "smoothing": ["--kd-weight", "0", "--label-smoothing", "0.1"]}


def run(name: str, flags: list[str], args: argparse.Namespace) -> None:
    """One run in the folder of that name, unless it has ended."""
    out = args.out / name
    if launch.has_ended(out):
        return
    if name == "control/seed-0":
        teacher = ["--teacher-weights", args.teacher_weights, "--teacher-epochs", str(TEACHER_EPOCHS)]
    else:
        teacher = ["--teacher-weights", str(args.out / "control/seed-0/teacher"), "--teacher-epochs", "0"]
    launch.train([*SHARED, "--dataset", args.data, *teacher, *flags], out, args.cache_dir)


def validation_accuracy(folder: Path) -> float:
    """Of the student's last epoch."""
    return json.loads((folder / "result.json").read_text())["student"]["validation_accuracy"]


def tune(names: list[str], args: argparse.Namespace) -> None:
    """Three values for each method; prints the accuracy on validation of each."""
    for name in names:
        flags, setting, values = METHODS[name]
        for value in values:
            folder = f"tune/{name}-{value}"
            run(folder, [*flags, setting, value, "--epochs", str(TUNING_EPOCHS), "--seed", str(TUNING_SEED)], args)
            print(f"{name} {setting} {value}: {100 * validation_accuracy(args.out / folder):.1f} % on validation",
                  flush=True)


def chosen(name: str, args: argparse.Namespace) -> list[str]:
    """The flags of a method with the value that was best on validation; of two equal ones the first."""
    flags, setting, values = METHODS[name]
    best = max(values, key=lambda value: validation_accuracy(args.out / f"tune/{name}-{value}"))
    return [*flags, setting, best]


def compare(names: list[str], args: argparse.Namespace) -> None:
    """The runs of the table."""
    for seed in args.seeds:
        for name in names:
            flags = CONTROLS[name] if name in CONTROLS else chosen(name, args)
            run(f"{name}/seed-{seed}", [*flags, "--epochs", str(EPOCHS), "--seed", str(seed)], args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "compare"))
    parser.add_argument("--data", required=True, help="Caltech-101")
    parser.add_argument("--teacher-weights", required=True, help="ImageNet weights of the teacher")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--methods", nargs="+", choices=(*CONTROLS, *METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3))
    args = parser.parse_args()
    if args.what == "tune":
        tune(args.methods or list(METHODS), args)
    else:
        compare(args.methods or [*CONTROLS, *METHODS], args)


if __name__ == "__main__":
    main()
