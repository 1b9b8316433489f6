"""The runs that compare the methods of kd/methods.py.

    python -m results.methods tune    --data FOLDER --teacher-weights FILE --out FOLDER --cache-dir FOLDER
    python -m results.methods compare --data FOLDER --teacher-weights FILE --out FOLDER --cache-dir FOLDER
    python -m results.methods compare --kind beans --data FOLDER --teachers FOLDER --out FOLDER --cache-dir FOLDER

Caltech-101 with all labels of train: a MobileNetV2 from random weights that sees 64 px, and a teacher that sees the
same views at 96 px. All runs of a seed have one teacher, which that seed's control has fine-tuned. `tune` gives each
method three values of one setting, in a third as long a run of another seed, and writes their accuracies on validation
to results/methods/tuning.json. `compare` makes the runs of the table with the best of them.

With `--kind beans` it makes the same runs on beans, with the values that Caltech-101 chose. --teachers is the --out of
`python -m results.few_labels --kind beans --labels 1034 --arms all`, which has fine-tuned their teachers.

It makes each run by the command that it prints, one after another. A run that has ended is left alone, and one that was
stopped goes on. The weights of the last epoch are tested.
"""

import argparse
import json
from pathlib import Path

from kd.machine.files import write_atomic
from results import few_labels, launch

TUNING = Path(__file__).resolve().parent / "methods" / "tuning.json"
STEPS = TUNING.with_name("steps.json")      # written by results/steps.py
SHARED = {"caltech101": ["--recipe", "few", "--size", "64", "--teacher-size", "96"],
          "beans": ["--recipe", "few", *few_labels.KINDS["beans"]]}
EPOCHS, TUNING_EPOCHS, TEACHER_EPOCHS = 30, 10, 8
TUNING_SEED = 100

# what each method is called in the table, its flags, and the setting that `tune` varies
KD = ["--method", "kd", "--temperature", "2"]
CONTROL = ["--kd-weight", "0"]
METHODS: dict[str, tuple[list[str], str, tuple[str, ...]]] = {
    "smoothing": (CONTROL, "--label-smoothing", ("0.05", "0.1", "0.2")),
    "kd": (KD, "--kd-weight", ("0.5", "0.9", "1")),
    "kd-standardised": ([*KD, "--standardise"], "--kd-weight", ("0.5", "0.9", "0.99")),
    "hard": (["--method", "hard"], "--kd-weight", ("0.5", "0.9", "1")),
    "dkd": (["--method", "dkd", "--kd-weight", "0.5"], "--temperature", ("1", "2", "4")),
    "dist": (["--method", "dist", "--kd-weight", "0.5"], "--temperature", ("1", "2", "4")),
    "nkd": (["--method", "nkd", "--kd-weight", "0.5"], "--temperature", ("1", "2", "4")),
    "pkt": (["--method", "pkt"], "--kd-weight", ("0.1", "0.5", "0.9")),
    "rkd": (["--method", "rkd"], "--kd-weight", ("0.1", "0.5", "0.9")),
    "simkd": (["--method", "simkd"], "--kd-weight", ("0.5", "0.9", "1")),
}


def folder_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a run. Those of beans have other names, so that both may be kept in one folder."""
    return args.out / (f"beans-{name}" if args.kind == "beans" else name) / f"seed-{seed}"


def shared_flags(seed: int, epochs: int, args: argparse.Namespace) -> list[str]:
    """What all runs of a seed have in common. Of two --epochs the last one counts."""
    return [*SHARED[args.kind], "--dataset", args.data, "--epochs", str(epochs), "--seed", str(seed)]


def run(folder: Path, flags: list[str], seed: int, epochs: int, args: argparse.Namespace) -> None:
    """A run in that folder, with the teacher of its seed."""
    first = args.teachers / f"beans-1034-all/seed-{seed}" if args.kind == "beans" else folder_of("control", seed, args)
    launch.must_have_ended(first)
    teacher = ["--teacher-weights", str(first / "teacher"), "--teacher-epochs", "0"]
    launch.train([*shared_flags(seed, epochs, args), *teacher, *flags], folder, args.cache_dir)


def control(seed: int, epochs: int, args: argparse.Namespace) -> None:
    """The control of a seed, which on Caltech-101 fine-tunes the teacher of all its runs."""
    folder = folder_of("control", seed, args)
    if args.kind == "beans":
        run(folder, CONTROL, seed, epochs, args)
    else:
        launch.train([*shared_flags(seed, epochs, args), *CONTROL, "--teacher-weights", args.teacher_weights,
                      "--teacher-epochs", str(TEACHER_EPOCHS)], folder, args.cache_dir)


def tuning() -> dict[str, dict[str, float]]:
    """Accuracy on validation by method and value; {} before `tune`."""
    return json.loads(TUNING.read_text("utf-8")) if TUNING.exists() else {}


def tune(names: list[str], args: argparse.Namespace) -> None:
    """Three values for each method."""
    control(TUNING_SEED, TUNING_EPOCHS, args)
    for name in names:
        flags, setting, values = METHODS[name]
        for value in values:
            folder = args.out / f"tune/{name}-{value}"
            run(folder, [*flags, setting, value], TUNING_SEED, TUNING_EPOCHS, args)
            result = json.loads((folder / "result.json").read_text("utf-8"))
            found = tuning()                # read again: another process may tune other methods
            found.setdefault(name, {})[value] = result["student"]["validation_accuracy"]
            TUNING.parent.mkdir(exist_ok=True)
            write_atomic(TUNING, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def chosen(name: str) -> list[str]:
    """The flags of a method with the value that was best on validation; of two equal ones the first."""
    flags, setting, values = METHODS[name]
    found = tuning()[name]
    return [*flags, setting, max(values, key=lambda value: found[value])]


def compare(names: list[str], args: argparse.Namespace) -> None:
    """The runs of the table."""
    for seed in args.seeds:
        control(seed, EPOCHS, args)
        for name in names:
            run(folder_of(name, seed, args), chosen(name), seed, EPOCHS, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "compare"))
    parser.add_argument("--kind", choices=tuple(SHARED), default="caltech101")
    parser.add_argument("--data", required=True, help="the data set")
    parser.add_argument("--teacher-weights", help="ImageNet weights of the teacher, for Caltech-101")
    parser.add_argument("--teachers", type=Path, help="the runs of results/few_labels.py, for beans")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3))
    args = parser.parse_args()
    if args.kind == "beans" and (args.what == "tune" or not args.teachers):
        parser.error("--kind beans is for compare, and needs --teachers")
    if args.kind == "caltech101" and not args.teacher_weights:
        parser.error("--kind caltech101 needs --teacher-weights")
    command = tune if args.what == "tune" else compare
    command(args.methods or list(METHODS), args)


if __name__ == "__main__":
    main()
