"""The runs behind "few labels, many pictures" in results/README.md.

    python -m results.few_labels --kind beans --data FOLDER --labels 60 --teacher-weights FILE --out FOLDER

It makes each run by the command that it prints, one after another. A run that has ended is left alone, and one that was
stopped goes on. So the script may be started again at any time, and several times at once for other labels or seeds.

Six arms see the same labels and take the same number of steps, so that what the gain is made of can be told:

    all         the student learns from the teacher (λ = 1) on all pictures; its control knows the labels only
    smoothing   a control with smoothed labels: what softness alone is worth
    labelled    the student learns from the teacher, on the labelled pictures only: without the other pictures
    hard        the student learns the class that the teacher gives to each picture: without softness
    self        the student learns on all pictures from the control of `all`: without ImageNet

The weights of the last epoch are tested. So validation plays no part in a run, and its pictures may be counted with
those of test.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from kd import few_labels, models
from kd.data.frames import decode
from kd.data.samples import Dataset
from kd.data.sources import open_dataset
from kd.machine import runtime
from kd.predict import predict

ARMS = ("all", "smoothing", "labelled", "hard", "self")
SHARED = ["--recipe", "few", "--allow-weak-teacher"]

# what differs between the data sets, and how long a teacher is fine-tuned on so many labels
KINDS = {"beans": ["--augment", "crop", "--teacher-augment", "crop"],
         "caltech101": ["--epochs", "24"]}
TEACHER_EPOCHS = {15: 120, 60: 60, 120: 40, 505: 24, 1010: 16}


def write_pictures(dataset: Dataset, root: Path, train: list[tuple[int, int]]) -> Path:
    """The data set as folders of files, whose train split has the pictures (row, label), as often as they are listed.

    A picture is written once. Where it is listed again, it has another name as well.
    """
    if (root / "complete").exists():
        return root
    for split, samples in dataset.splits.items():
        listed = train if split == "train" else list(enumerate(samples.labels.tolist()))
        for place, (row, label) in enumerate(listed):
            stored = root / ".pictures" / split / f"{row}.jpg"
            if not stored.exists():
                stored.parent.mkdir(parents=True, exist_ok=True)
                content = samples.read(row)
                assert isinstance(content, bytes)       # as it was encoded
                stored.write_bytes(content)
            named = root / split / dataset.classes[label] / f"{place:05}.jpg"
            named.parent.mkdir(parents=True, exist_ok=True)
            if not named.exists():
                os.link(stored, named)
    (root / "complete").touch()
    return root


def labelled_folder(dataset: Dataset, labels: int, seed: int, root: Path) -> Path:
    """Only the pictures that keep their label, as often round as makes an epoch as long as that of all pictures."""
    known = dataset.splits["train"].labels
    kept = few_labels.keep_labels(known, labels, seed)
    rows = np.resize(kept, len(known)).tolist()
    return write_pictures(dataset, root, [(row, int(known[row])) for row in rows])


def hard_folder(dataset: Dataset, labels: int, seed: int, teacher: Path, cache_dir: str, root: Path) -> Path:
    """All pictures: the labelled ones in their own class, the others in the one that the teacher gives them."""
    known = dataset.splits["train"].labels
    model, prep, size, classes = models.open_saved(str(teacher))
    assert classes == dataset.classes
    data = decode(dataset, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation, cache_dir=cache_dir)
    machine = runtime.start("cpu", "off", "off")
    given = predict(model, data.train.frames, prep, size, machine, "the teacher's classes").argmax(1)
    kept = few_labels.keep_labels(known, labels, seed)
    given[kept] = known[kept]
    return write_pictures(dataset, root, list(enumerate(given.tolist())))


def flags_of(arm: str, seed: int, args: argparse.Namespace, dataset: Dataset) -> list[str]:
    """The flags of one run, after the folders that it reads have been made."""
    first = args.out / name_of("all", seed, args)       # its teacher and its control serve the other arms
    flags = [*SHARED, *KINDS[args.kind], "--seed", str(seed)]
    few = ["--dataset", args.data, "--labels", str(args.labels)]
    tuned = ["--teacher-weights", str(first / "teacher"), "--teacher-epochs", "0"]
    folder = args.out / "pictures" / f"{args.kind}-{args.labels}-{arm}-{seed}"
    if arm == "all":
        return [*flags, *few, "--teacher-weights", args.teacher_weights, "--teacher-epochs",
                str(TEACHER_EPOCHS[args.labels]), "--control"]
    if arm == "smoothing":
        return [*flags, *few, *tuned, "--kd-weight", "0", "--label-smoothing", "0.1"]
    if arm == "labelled":
        labelled_folder(dataset, args.labels, seed, folder)
        return [*flags, "--dataset", str(folder), *tuned]
    if arm == "hard":
        hard_folder(dataset, args.labels, seed, first / "teacher", args.cache_dir, folder)
        return [*flags, "--dataset", str(folder), *tuned, "--kd-weight", "0"]
    return [*flags, *few, "--teacher", "mobilenetv2_100", "--teacher-weights", str(first / "control"),
            "--teacher-epochs", "0"]


def name_of(arm: str, seed: int, args: argparse.Namespace) -> str:
    return f"{args.kind}-{args.labels}-{arm}/seed-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data set")
    parser.add_argument("--kind", required=True, choices=tuple(KINDS))
    parser.add_argument("--labels", required=True, type=int, choices=tuple(TEACHER_EPOCHS))
    parser.add_argument("--teacher-weights", required=True, help="ImageNet weights of the teacher")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    args = parser.parse_args()
    dataset = open_dataset(args.data, say=lambda line: None)
    for arm in args.arms:
        for seed in args.seeds:
            out = args.out / name_of(arm, seed, args)
            if (out / "result.json").exists():
                continue
            command = [sys.executable, "train.py", *flags_of(arm, seed, args, dataset), "--out", str(out),
                       "--cache-dir", args.cache_dir, "--resume"]
            print(shlex.join(command), flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
                subprocess.run(command, stdout=log, stderr=log)


if __name__ == "__main__":
    main()
